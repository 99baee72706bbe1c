// What the instruction-set variants share: prepared inputs, scales of a row, and the table of functions they fill.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "float16.h"
#include "llmqat.h"

namespace llmqat {

using Matrix = llmqat_matrix;

// How a layer is computed. The integer path is the arithmetic of `act_bits: 8`; the others multiply W_hat itself.
enum class Path {
    FLOAT,    // any storage dtype: W_hat in float32, activations in float32
    BFLOAT,   // W_hat is bfloat16: products of bfloat16, activations split into 1 to 3 bfloat16 parts without loss
    INTEGER,  // int8 activations times codes, exact in int32 per group, scaled in float32
};

// Memory that a thread keeps between calls, 64-byte aligned.
class Scratch {
public:
    ~Scratch() { std::free(data_); }
    template <class T>
    T* get(size_t count) {
        size_t bytes = (count * sizeof(T) + 127) & ~size_t(63);  // 64 spare bytes: vectors may read past the end
        if (bytes > size_) {
            std::free(data_);
            data_ = std::aligned_alloc(64, bytes);
            if (!data_) std::abort();
            size_ = bytes;
        }
        return static_cast<T*>(data_);
    }

private:
    void* data_ = nullptr;
    size_t size_ = 0;
};

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

constexpr int64_t K_PAD = 64;    // inputs are zero beyond `in`, up to a multiple of this
constexpr int64_t TILE_ROWS = 16;  // inputs of the tiled kernels come in blocks of this many tokens

// The activations of one call, in the form its path reads. Row strides are k_pad elements.
struct Input {
    Path path;
    bool tiled;             // 16-token tiles of 64 bytes a row, for AMX; else plain rows
    int64_t m, k, k_pad, m_pad;
    int planes;             // BFLOAT: number of bfloat16 parts
    const float* x;         // FLOAT: (m, k_pad)
    const uint16_t* parts;  // BFLOAT: (m, planes, k_pad); tiled: (planes, m_pad / 16, k_pad / 32, 16, 32)
    const int8_t* q;        // INTEGER: (m, k_pad); tiled: (m_pad / 16, k_pad / 64, 16, 64)
    const float* q_scale;   // INTEGER: (m_pad,)
};

struct Output {
    void* y;  // (m, stride) elements of dtype
    int64_t stride;
    int32_t dtype;
};

// One instruction set. `rows` computes outputs [n0, n1) of all tokens.
struct Variant {
    const char* name;
    bool bfloat;                                    // whether `rows` knows Path::BFLOAT
    bool (*tiles)(const Matrix&, Path, int64_t m);  // whether `rows` wants tiled input for this call
    void (*rows)(const Matrix&, const Input&, const Output&, int64_t n0, int64_t n1);
    float (*quantize)(const float* x, int64_t k, int8_t* q);  // int8 codes of a token, and its scale
};

const Variant* portable_variant();
const Variant* neon_variant();
const Variant* avx2_variant();
const Variant* avx512_variant();
const Variant* amx_variant();
bool request_amx();  // ask the kernel for the tile registers, once

inline int64_t group_size(const Matrix& w) { return w.in / w.groups; }
inline int code_offset(const Matrix& w) { return w.zero_point ? 0 : 1 << (w.bits - 1); }

inline int zero_point(const Matrix& w, int64_t n, int64_t g) {
    int64_t bit = n * w.bits, word = bit / 32, shift = bit % 32;
    uint32_t value = w.zero_point[word * w.groups + g] >> shift;
    if (shift + w.bits > 32) value |= w.zero_point[(word + 1) * w.groups + g] << (32 - shift);
    return int(value & ((1u << w.bits) - 1));
}

// Units are what the kernels step over scales by: a group where its size suits, else 16 weights.
struct RowScales {
    int64_t unit;  // weights per entry
    float* scale;
    int32_t* zero;  // zero point or, if symmetric, the offset of the stored codes
};

inline int64_t units_of(const Matrix& w, int64_t unit) { return (w.in + unit - 1) / unit; }

inline void fill_row_scales(const Matrix& w, int64_t n, RowScales& row) {
    int64_t per_group = group_size(w) / row.unit;
    int offset = code_offset(w);
    for (int64_t g = 0; g < w.groups; ++g) {
        float s = load(w.scale, n * w.groups + g, w.scale_dtype);
        int z = w.zero_point ? zero_point(w, n, g) : offset;
        for (int64_t u = 0; u < per_group; ++u) row.scale[g * per_group + u] = s, row.zero[g * per_group + u] = z;
    }
}

}  // namespace llmqat
