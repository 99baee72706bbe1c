// C interface of the kernels of training. Python mirrors these structs with ctypes (llmqat/kernels/training.py). They run on
// the threads of torch (team.h); errors are those of llmqat.h.
#pragma once

#include <cstdint>

#include "llmqat.h"

// A matrix of bfloat16, whose element (i, j) is data[i * row_stride + j * column_stride]; one of the strides is 1.
struct llmqat_operand {
    const uint16_t* data;
    int64_t rows, columns, row_stride, column_stride;
};

// Where a product goes: c (rows, columns), contiguous in `dtype`, float32 or bfloat16; bias (columns) float32 or null.
struct llmqat_product {
    void* c;
    const float* bias;
    int32_t dtype, accumulate;  // nonzero: c += the product, in float32
};

// What LoRA adds to a weight, b a: each entry is summed by fused multiply-adds, from the first rank to the last.
struct llmqat_adapter_sums {
    const float *b, *a;  // (rows, rank), (rank, columns)
    float* sums;         // (rows, columns)
    int64_t rows, columns, rank;
};

// Rows of a weight on its grid. The latent is the weight, to which adapters and then GPTQ's change `multiples * step` are
// added in float32:
//     v = latent / code_scale    q = clamp(round(v) + zero_point, qmin, qmax)    W_hat = scale * (q - zero_point)
// with W_hat rounded to the dtype of the scale.
struct llmqat_grid {
    const void* weight;        // (rows, columns), weight_dtype
    const float* added;        // (rows, columns); null without adapters
    const int8_t* multiples;   // (rows, columns); null without
    const uint16_t* step;      // (rows, groups) bfloat16; null without multiples
    const void* scale;         // (rows, groups), scale_dtype
    const float* code_scale;   // (rows, groups); null where it is the scale
    const float* zero_point;   // (rows, groups); null if symmetric
    int64_t rows, columns, groups;
    int32_t weight_dtype, scale_dtype, qmin, qmax;
};

// RMSNorm of rows: x * inverse * (offset + weight) with inverse = 1 / sqrt(mean(x^2) + eps); unless `rounds_once`, x * inverse is
// rounded to the dtype of x before the weight multiplies it. The forward writes y, and `inverse` unless that is null; the
// backward reads inverse and g, the gradient of y, and writes dx and dweight where they are not null.
struct llmqat_rms_norm {
    const void *x, *weight;  // (rows, count) x_dtype; (count) weight_dtype
    void* y;                 // (rows, count) y_dtype
    float* inverse;          // (rows)
    const void* g;           // (rows, count) y_dtype
    void* dx;                // (rows, count) x_dtype
    float* dweight;          // (count)
    int64_t rows, count;
    float eps, offset;
    int32_t rounds_once, x_dtype, weight_dtype, y_dtype;
};

// y = activation(gate) * up, of one dtype; the activation is rounded to it. The forward writes y; the backward reads g, the
// gradient of y, and writes dgate and dup.
struct llmqat_gate {
    const void *gate, *up;  // (rows, count), rows `stride` apart, as are those of dgate and dup
    void* y;                // (rows, count), contiguous, as is g
    const void* g;
    void *dgate, *dup;
    int64_t rows, count, stride;
    int32_t activation, dtype;  // activation: 0 silu, 1 gelu with tanh
};

// Rotary embedding: the first `rotary` features i of each head turn with those half of `rotary` further on; the rest is copied.
// y[i] = x[i] cosine[i] - x[i + half] sine[i], y[i + half] = x[i + half] cosine[i + half] + x[i] sine[i + half], where products
// are rounded to the dtype of y. `back` computes the gradient of x from that of y, and rounds once.
struct llmqat_rotation {
    const void *x, *cosine, *sine;  // (batch, heads, length, dim) x_dtype; tables (batch or 1, length, rotary) table_dtype
    void* y;                        // like x, y_dtype
    int64_t batch, heads, length, dim, rotary;
    int64_t x_strides[3], y_strides[3];  // of batch, heads, length
    int64_t table_stride;                // of batch; 0 where all share a table
    int32_t x_dtype, y_dtype, table_dtype, back;
};

// A bfloat16 matrix of each head of each sequence: element i of a row is
// data[sequence * sequence_stride + head * head_stride + row * row_stride + i].
struct llmqat_heads {
    void* data;
    int64_t sequence_stride, head_stride, row_stride;
};

// softmax(cap(scale q k^T)) v over the keys that a query sees; of none, zeros. Consecutive heads share keys and values. With
// a softcap, cap(x) = softcap * tanh(x / softcap).
struct llmqat_attention {
    llmqat_heads q, k, v, out;
    float* log_sum;       // (sequences, heads, queries): of e^score; written by the forward unless null, read by the backward
    const int32_t* seen;  // (queries, 2) of each sequence: a query sees keys [first, end)
    int64_t seen_stride;  // from a sequence to the next; 0 where all see the same
    int64_t sequences, heads, kv_heads, queries, keys, head_dim;
    float scale, softcap;  // softcap 0: none
};

// Gradients: of `out`, read; of q, k and v, written.
struct llmqat_attention_gradients {
    llmqat_heads out, q, k, v;
};

// Losses of tokens by their logits: KL(teacher || student), or cross-entropy.
struct llmqat_token_losses {
    const void* logits;   // (tokens, vocabulary), dtype
    const void* teacher;  // (tokens, vocabulary), teacher_dtype; null with ids
    const int64_t* ids;   // (tokens); null with a teacher
    float* losses;        // (tokens)
    void* gradient;       // (tokens, vocabulary), dtype: of each loss, times `factor`; may be the logits; null without
    int64_t tokens, vocabulary;
    int32_t dtype, teacher_dtype;
    float factor;
};

// Errors of hidden states relative to their targets: |state - target|^2 / |target|^2.
struct llmqat_state_errors {
    const void* states;    // (tokens, width), dtype
    const void* targets;   // (tokens, width), target_dtype
    const float* factors;  // (tokens): of the gradients
    float* errors;         // (tokens)
    void* gradient;        // (tokens, width), dtype: of each error, times its factor
    int64_t tokens, width;
    int32_t dtype, target_dtype;
};

#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif
extern "C" {
// Whether llmqat_multiply is faster here than what torch does: it needs tiles of bfloat16.
int32_t llmqat_has_tiles();
// c (a.rows, b.columns) = a b + bias, summed in float32.
int32_t llmqat_multiply(const llmqat_operand* a, const llmqat_operand* b, const llmqat_product* out);
int32_t llmqat_sum_adapters(const llmqat_adapter_sums* sums);
// w_hat (rows, columns), contiguous in `dtype`.
int32_t llmqat_fake_quantize(const llmqat_grid* grid, void* w_hat, int32_t dtype);
// ds (rows, groups) float32 = the sum over each group of g (q - zero_point - v), of g (rows, columns) in float32, without
// the last term where there is a code scale; then g becomes the gradient of the latents, g * (scale / code_scale); and w_hat,
// unless that is null, as above.
int32_t llmqat_grid_gradients(const llmqat_grid* grid, float* g, float* ds, void* w_hat, int32_t dtype);
int32_t llmqat_norm_forward(const llmqat_rms_norm* norm);
int32_t llmqat_norm_backward(const llmqat_rms_norm* norm);
int32_t llmqat_gate_forward(const llmqat_gate* gate);
int32_t llmqat_gate_backward(const llmqat_gate* gate);
int32_t llmqat_rotate(const llmqat_rotation* rotation);
// Attention of training, and its gradients: with tiles alone.
int32_t llmqat_has_attention();
int32_t llmqat_attend(const llmqat_attention* attention);
int32_t llmqat_attend_backward(const llmqat_attention* attention, const llmqat_attention_gradients* gradients);
// Write what each query sees by a mask (sequences, queries, keys) of bytes 0 and 1, whose last stride is 1. Returns 1 if the
// keys of every query are one run; else 0, and `seen` (sequences, queries, 2) is of no use.
int32_t llmqat_seen_keys(const uint8_t* mask, const int64_t* sizes, const int64_t* strides, int32_t* seen);
int32_t llmqat_find_losses(const llmqat_token_losses* losses);
int32_t llmqat_find_state_errors(const llmqat_state_errors* errors);
}
#if defined(__GNUC__)
#pragma GCC visibility pop
#endif
