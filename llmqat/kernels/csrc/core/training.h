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

// Rows of a weight on its grid. The latent is the weight, to which GPTQ's change `multiples * step` is added in float32:
//     v = latent / code_scale    q = clamp(round(v) + zero_point, qmin, qmax)    W_hat = scale * (q - zero_point)
// with W_hat rounded to the dtype of the scale.
struct llmqat_grid {
    const void* latent;        // (rows, columns), latent_dtype
    const int8_t* multiples;   // (rows, columns); null without
    const uint16_t* step;      // (rows, groups) bfloat16; null without multiples
    const void* scale;         // (rows, groups), scale_dtype
    const float* code_scale;   // (rows, groups); null where it is the scale
    const float* zero_point;   // (rows, groups); null if symmetric
    int64_t rows, columns, groups;
    int32_t latent_dtype, scale_dtype, qmin, qmax;
};

#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif
extern "C" {
// Whether llmqat_multiply is faster here than what torch does: it needs tiles of bfloat16.
int32_t llmqat_has_tiles();
// c (a.rows, b.columns) = a b + bias, summed in float32.
int32_t llmqat_multiply(const llmqat_operand* a, const llmqat_operand* b, const llmqat_product* out);
// w_hat (rows, columns), contiguous in `dtype`.
int32_t llmqat_fake_quantize(const llmqat_grid* grid, void* w_hat, int32_t dtype);
// ds (rows, groups) float32 = the sum over each group of g (q - zero_point - v), of g (rows, columns) in float32, without
// the last term where there is a code scale; and w_hat, unless that is null, as above.
int32_t llmqat_scale_gradients(const llmqat_grid* grid, const float* g, float* ds, void* w_hat, int32_t dtype);
}
#if defined(__GNUC__)
#pragma GCC visibility pop
#endif
