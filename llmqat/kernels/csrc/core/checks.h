// Checks of what crosses the C interface, before anything is read: each throws an Error with the value and the limit.
#pragma once

#include "decoder.h"

namespace llmqat {

// Largest size of one dimension. A product of two such sizes, in bytes, is far from the end of int64_t.
constexpr int64_t MAX_SIZE = int64_t(1) << 28;

void check_size(const char* name, int64_t size, int64_t least, int64_t most = MAX_SIZE);
void check_dtype(const char* name, int32_t dtype);
void check_pointer(const char* name, const void* pointer);

void check_matrix(const llmqat_matrix& w);
// A matrix whose groups suit the kernels of layers.
void check_layer(const llmqat_matrix& w);
void check_layer(const char* name, const llmqat_matrix& w, int64_t out, int64_t in);

// A decoder, and one call of it.
void check_decoder(const llmqat_decoder& d, int64_t rotary_tables);
void check_caches(const llmqat_decoder& d, const llmqat_cache* cache, int64_t capacity, int64_t past, int64_t m);
void check_sequences(const llmqat_decoder& d, const llmqat_sequence* sequences, int64_t count, int64_t m);
void check_rotary(const llmqat_decoder& d, const llmqat_rotary* rotary, int64_t count);
void check_side(const llmqat_decoder& d, const void* side);
void check_mix(const llmqat_decoder& d, llmqat_mix mix);
void check_greedy(const llmqat_greedy& g, int64_t token, int64_t past);

}  // namespace llmqat
