// C interface of the native decoder: the blocks of a Llama-like model, from embeddings to the last norm.
#pragma once

#include "llmqat.h"

// y (m, hidden) = what stands in the place of attention in block `block`, of x (m, hidden), both in the decoder's dtype. Called
// by the thread that called the library; 0, or else the call ends with an error.
typedef int32_t (*llmqat_mix)(int64_t block, const void* x, int64_t m, void* y);

// One transformer block. A layer without codes is none: without q it has no attention, but what llmqat_mix computes; without
// k the cache holds keys and values that a block before wrote; without v values are what k gives; without side_gate there is
// no third branch, which reads a side input of the block (Gemma 4 has the last three). Norm weights are (hidden,), those of q, k and v (head_dim,), or as wide as q and k where these have
// norms of all heads together; null where the model has none. attended_norm, mlp_out_norm and side_norm are applied to the
// output of a branch before it is added to the residual (Gemma 2 and 3, OLMo 2).
struct llmqat_block {
    llmqat_matrix q, k, v, o, gate, up, down, side_gate, side_up;
    const void *input_norm, *attended_norm, *mlp_norm, *mlp_out_norm, *q_norm, *k_norm, *v_norm, *side_norm;
    const void* scale;             // (1,), a factor of what the block gives; or null
    int64_t kv_heads, head_dim;
    int64_t window;                // tokens that a query sees, itself included
    int64_t rotary, query_rotary;  // which of the rotary tables turn keys, and which queries
};

struct llmqat_decoder {
    const llmqat_block* blocks;
    const void* norm;
    int64_t count, hidden, heads, side;  // side: features of the side input of each block
    float eps, norm_offset, attention_scale, softcap;  // see steps.h
    float embedding_scale, residual_scale;  // factors of the embeddings, and of what a branch adds to the residual; or 1
    int32_t dtype, activation;  // dtype of weights of norms, activations and cache; every result is rounded to it
    int32_t norm_rounds_once, head_norm, neighbours;  // see steps.h; whether rotary pairs are neighbours (GLM), or halves
    int32_t output_gate;  // whether q gives (heads, 2, head_dim), queries and a gate of what they attend (Qwen 3.5)
};
static_assert(sizeof(llmqat_block) == 9 * 80 + 112 && sizeof(llmqat_decoder) == 96, "llmqat/kernels/decoder.py lays these out by hand");

// The cache of a block, or of several that share one: (kv_heads, capacity, head_dim), of which the first `past` tokens are
// filled. With scales, (kv_heads, capacity), it holds int8 codes (llmqat/quant/affine.py, quantize_activation); without,
// `dtype`.
struct llmqat_cache {
    void *keys, *values;
    float *key_scale, *value_scale;
};

// A sequence that goes on: its caches, one for each block, with room for `capacity` tokens.
struct llmqat_sequence {
    const llmqat_cache* cache;
    int64_t capacity, past;
};

// Tables (m, dim) of the new positions, in the model's dtype, or in float32: then only the rotated features are rounded, and
// not the products (OLMo 2). `dim` is even and at most the head_dim of its blocks; features of a head beyond it are not rotated.
struct llmqat_rotary {
    const void *cosine, *sine;
    int64_t dim;
    int32_t dtype;
};

// Greedy decoding of one sequence: what stays the same from token to token.
struct llmqat_greedy {
    const llmqat_decoder* decoder;
    const llmqat_matrix* embedding;  // packed; or null:
    const void* embedding_rows;      // (vocabulary, hidden) in the decoder's dtype
    int64_t vocabulary;              // rows of the embedding
    const llmqat_matrix* head;
    const llmqat_cache* cache;
    const llmqat_rotary* rotary;     // tables of all positions there is room for, (capacity, dim)
    int64_t rotary_tables, capacity, threads;
    llmqat_mix mix;                  // null where all blocks have attention
    void *hidden, *logits;           // (hidden,) and (rows of head,) in the decoder's dtype: written by each token
};
static_assert(sizeof(llmqat_greedy) == 104, "llmqat/kernels/greedy.py lays this struct out by hand");

#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif
extern "C" {
// hidden (m, hidden) of m new tokens in place: embeddings in, last norm out. They follow each other in one sequence, or are
// one of each of m sequences; mix takes those of one. side (m, count, side): the side inputs of each block, in the decoder's
// dtype; null where no block has any; so is mix where all have attention. Errors: see llmqat.h.
int32_t llmqat_decode(const llmqat_decoder* model, const llmqat_sequence* sequences, int64_t count, int64_t m,
                      const llmqat_rotary* rotary, int64_t rotary_tables, const void* side, llmqat_mix mix,
                      void* hidden);
// The token that follows `token`: the one of the largest logit. The cache holds `past` tokens and has room for one more.
int64_t llmqat_next_token(const llmqat_greedy* model, int64_t token, int64_t past);
// Where the largest of `count` values is, as numpy has it: of equal ones the first, and a NaN before all others.
int64_t llmqat_argmax(const void* x, int64_t count, int32_t dtype);
}
#if defined(__GNUC__)
#pragma GCC visibility pop
#endif
