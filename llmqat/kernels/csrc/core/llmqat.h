// C interface of the CPU kernels. Python mirrors these structs with ctypes (llmqat/kernels/native.py).
#pragma once

#include <cstdint>

enum llmqat_dtype : int32_t { LLMQAT_FLOAT32 = 0, LLMQAT_BFLOAT16 = 1, LLMQAT_FLOAT16 = 2 };

// Instruction sets; of those that a machine has, the last is preferred.
enum llmqat_isa : int32_t {
    LLMQAT_PORTABLE, LLMQAT_NEON, LLMQAT_DOTPROD, LLMQAT_I8MM, LLMQAT_AVX2, LLMQAT_AVXVNNI, LLMQAT_AVX512, LLMQAT_AMX
};

// A packed weight as it lies in the file: W_hat = scale * (code - zero_point), rounded to the dtype of scale.
struct llmqat_matrix {
    const uint8_t* codes;        // (out, row_bytes): the bit stream of llmqat/quant/packing.py, unsigned codes
    const void* scale;           // (out, groups), scale_dtype
    const uint32_t* zero_point;  // (ceil(out * bits / 32), groups), packed along `out`; null if symmetric
    const void* bias;            // (out,), bias_dtype; or null
    int64_t out, in, groups, row_bytes;
    int32_t bits, scale_dtype, bias_dtype, act_bits;  // act_bits: 8 or 0
};
static_assert(sizeof(llmqat_matrix) == 80, "llmqat/kernels/native.py lays this struct out by hand");

#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif
extern "C" {
// Functions that compute return 0 or a result that is not negative; after an error they return -1. Sizes are checked;
// pointers have to lead to as much memory as the sizes say.

// The last error of this thread, in one line.
const char* llmqat_error();
// SHA-256 of llmqat.h, of decoder.h and of training.h, in hexadecimal.
const char* llmqat_interface();
// Best instruction set of this machine, whatever was forced.
int32_t llmqat_best_isa();
// Whether `isa` can run here and was compiled in.
int32_t llmqat_has_isa(int32_t isa);
// Run this instruction set from now on; nonzero if it cannot run here.
int32_t llmqat_use_isa(int32_t isa);
// Number of threads of the next calls, the calling one included. Returns how many there will be: at most 256, and no more
// than the system started when a call needed them.
int32_t llmqat_set_threads(int32_t threads);
// y (m, out) = x (m, in) @ W_hat.T + bias, x and y contiguous in `dtype`. Group size: a multiple of 16, or the whole row.
int32_t llmqat_linear(const llmqat_matrix* matrix, const void* x, void* y, int64_t m, int32_t dtype);
// llmqat_linear of `count` matrices one after another, each on this x and into this y: what a kernel costs without its
// callers.
int32_t llmqat_linears(const llmqat_matrix* matrices, int64_t count, const void* x, void* y, int64_t m, int32_t dtype);
// y (count, in): the rows `index` of W_hat.
int32_t llmqat_rows(const llmqat_matrix* matrix, const int64_t* index, int64_t count, void* y, int32_t dtype);
// Bytes per second of reading `bytes` from `data` once with the threads of the pool.
double llmqat_read_bandwidth(const void* data, int64_t bytes);
}
#if defined(__GNUC__)
#pragma GCC visibility pop
#endif
