// The steps of a decoder block that are not layers, as every instruction set offers them (steps.inc).
#pragma once

#include <cstdint>

#include "llmqat.h"

namespace llmqat {

constexpr int64_t MAX_HEAD_DIM = 512, ATTEND_QUERIES = 64, ATTEND_HEADS = 4;

enum Activation : int32_t { SILU, GELU_TANH, SIGMOID };  // of a gate; the last one of what attention gives

// Norms of q and k: of each head, before (Qwen 3) or after (HunYuan) it is rotated; or of all heads together (OLMo 2).
enum HeadNorm : int32_t { OF_HEAD, OF_ROTATED_HEAD, OF_ALL_HEADS };

// RMSNorm: x / sqrt(mean(x^2) + eps) * (offset + weight). Only the product is rounded (Gemma, OLMo 2), or what it multiplies
// is rounded too (Llama).
struct NormKind {
    float eps, offset;
    bool rounds_once;
};

// Norm over `count` values of each token.
struct Norm {
    const void *x, *weight;
    void* y;
    int64_t count;
    NormKind kind;
    int32_t dtype;
};

// Rotary embedding of one head of one token, and its norm if it has one.
struct Rope {
    const void *from, *norm, *cosine, *sine;
    void* to;
    int64_t from_start, to_start, token, head_dim, rotary_dim;  // starts in elements; cosine, sine: (tokens, rotary_dim)
    NormKind kind;
    int32_t dtype, table_dtype;
    bool norm_rotated, neighbours;
};

// Keys or values of all tokens, (kv_heads, capacity, head_dim): of the model's dtype, or int8 codes where there are scales
// (kv_heads, capacity).
struct Cached {
    void* data;
    float* scale;
};

// q and out: (m, heads, head_dim). `past` tokens lie before the m new ones. A query sees `window` tokens, itself included.
struct Attention {
    const void* q;
    Cached keys, values;
    void* out;
    int64_t m, past, capacity, window, heads, kv_heads, head_dim;
    float scale, softcap;  // softcap * tanh(score / softcap), unless that is 0 (Gemma 2, arXiv 2408.00118, section 2)
    int32_t dtype;
};

// First token that the query at `position` sees.
inline int64_t seen_from(const Attention& a, int64_t position) { return position >= a.window ? position + 1 - a.window : 0; }

struct Steps {
    void (*load)(const void* from, int64_t start, int64_t count, int32_t dtype, float* to);
    void (*row)(const llmqat_matrix&, int64_t n, void* y, int64_t start, int32_t dtype);
    void (*norm)(const Norm&, int64_t token);
    void (*scale)(void* x, int64_t start, int64_t count, int32_t dtype, float factor);  // x *= factor
    // x += factor * y, where the product is rounded too.
    void (*add)(void* x, const void* y, int64_t start, int64_t count, int32_t dtype, float factor);
    void (*gate)(int32_t activation, void* gate, const void* up, int64_t start, int64_t count, int32_t dtype);
    void (*rope)(const Rope&);
    // Put the vector of one head and token, `count` values, at `row` of all.
    void (*cache)(const void* from, int64_t start, int64_t count, int32_t dtype, const Cached&, int64_t row);
    void (*attend_decode)(const Attention&, int64_t head, int64_t count);  // heads of one group, m == 1
    void (*attend_prefill)(const Attention&, int64_t kv_head, int64_t first);  // ATTEND_QUERIES tokens from `first` on
    // The largest of `count` values; NaN if one of them is.
    float (*largest)(const void* x, int64_t start, int64_t count, int32_t dtype);
};

}  // namespace llmqat
