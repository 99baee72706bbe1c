// What the instruction-set variants share: prepared inputs, scales of a row, and the table of functions they fill.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <type_traits>

#include "errors.h"
#include "float16.h"
#include "llmqat.h"
#include "steps.h"
#include "train_steps.h"

namespace llmqat {

using Matrix = llmqat_matrix;

// How a layer is computed. The integer path is the arithmetic of `act_bits: 8`; the others multiply W_hat itself.
enum class Path {
    FLOAT,    // any storage dtype: W_hat in float32, activations in float32
    BFLOAT,   // W_hat is bfloat16, made in that dtype; the products and sums are at least as fine as those of float32
    INTEGER,  // int8 activations times codes, exact in int32 per group, scaled in float32
};

// Memory that a thread keeps between calls, 64-byte aligned.
class Scratch {
public:
    ~Scratch() { std::free(data_); }
    template <class T>
    T* get(size_t count) {
        if (count > MOST_BYTES / sizeof(T)) fail_without_memory(MOST_BYTES);
        const size_t bytes = (count * sizeof(T) + 127) & ~size_t(63);  // 64 spare bytes: vectors may read past the end
        if (bytes > size_) grow(bytes);
        return static_cast<T*>(data_);
    }

private:
    static constexpr size_t MOST_BYTES = size_t(1) << 62;

    void grow(size_t bytes) {
        std::free(data_);
        size_ = 0, data_ = std::aligned_alloc(64, bytes);
        if (!data_) fail_without_memory(bytes);
        size_ = bytes;
    }

    void* data_ = nullptr;
    size_t size_ = 0;
};

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

constexpr int64_t K_PAD = 128;     // inputs are zero beyond `in`, up to a multiple of this
constexpr int64_t TILE_ROWS = 16;  // tokens of a tile: inputs of the tiled kernels are padded to a multiple

// Activations in float32, (m, k_pad): for Path::FLOAT, and for Path::BFLOAT without tiles. The order within 128 is the
// variant's, as in all forms without tiles.
struct FloatInput {
    float* x;
};

// Activations of Path::BFLOAT in tiles, (planes, m_pad / 16, k_pad / 32, 16, 32): bfloat16 parts that add up to a value.
struct PartsInput {
    uint16_t* x;
    int planes;
};

// Activations of Path::BFLOAT as integers, where the variant wants that.
struct FixedInput {
    int16_t* x;                     // (m, k_pad), integers of `unit`
    float* unit;                    // (m, k_pad / 128)
    int32_t* excess;                // (m, k_pad / 128, 32), the variant's
    std::atomic<bool>* too_coarse;  // set if 16 bits lose too much of some token; the caller then prepares floats
};

// Activations of Path::INTEGER: int8 codes.
struct IntegerInput {
    int8_t* q;        // (m, k_pad); in tiles: (k_pad / 128, m_pad / 16, 2, 16, 64)
    float* scale;     // (m_pad,)
    float* lane_sum;  // without tiles: (m, k_pad / 64, 16), the variant's
};

// The activations of one call, in the one form that its path and variant read; pointers of the others are null.
struct Input {
    Path path;
    bool tiled;  // tiles of 16 tokens by 64 bytes, for AMX; else rows of k_pad elements
    int64_t m, k, k_pad, m_pad;
    FloatInput floats;
    PartsInput parts;
    FixedInput fixed;
    IntegerInput integers;
};

// Rows of a layer for one task: numbers [first, last) of each of RUNS runs that divide the rows [begin, end). Several runs
// keep the memory busy, and the next task of a thread goes on where they stopped.
constexpr int64_t RUNS = 4;
struct Runs {
    int64_t begin, end, first, last;

    static int64_t length(int64_t rows) { return (rows + RUNS - 1) / RUNS; }

    // Number i of a run; beyond `end` there is none.
    int64_t row(int64_t run, int64_t i) const { return begin + run * length(end - begin) + i; }

    template <class Use>
    void each(Use&& use) const {
        for (int64_t run = 0; run < RUNS; ++run)
            for (int64_t i = first; i < last && row(run, i) < end; ++i) use(row(run, i));
    }
};

struct Output {
    void* y;  // (m, stride) elements of dtype
    int64_t stride;
    int32_t dtype;
};

// One instruction set. What it does not have is null.
struct Variant {
    float (*quantize)(const float* x, int64_t k, int8_t* q);  // int8 codes of a token, and its scale
    // Write token m, `row` of k_pad values, in the form that `rows` reads. In Path::FLOAT, `row` is where it goes.
    void (*pack)(const Matrix&, const Input&, int64_t m, const float* row);
    // These outputs of all tokens. Tiled, they are all of [begin, end).
    void (*rows)(const Matrix&, const Input&, const Output&, const Runs&);
    const Steps* steps;
    const TrainSteps* train;
    bool bfloat = false;                                      // whether it knows Path::BFLOAT
    bool (*tiles)(const Matrix&, Path, int64_t m) = nullptr;  // whether it wants tiled input for this call
    bool (*fixed)(const Matrix&) = nullptr;                   // whether it wants bfloat16 activations as integers
    Multiply multiply = nullptr;                              // products of tiles, for training
    const AttendTraining* attend = nullptr;                   // attention of training
};

const Variant* portable_variant();
const Variant* neon_variant();
const Variant* dotprod_variant();
const Variant* i8mm_variant();
const Variant* avx2_variant();
const Variant* avxvnni_variant();
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

// f(bits), the number as a constant.
template <class F>
inline void by_bits(int bits, F&& f) {
    switch (bits) {
        case 2: return f(std::integral_constant<int, 2>());
        case 3: return f(std::integral_constant<int, 3>());
        case 4: return f(std::integral_constant<int, 4>());
        default: return f(std::integral_constant<int, 8>());
    }
}

// Tokens [first, count) four, two and one at a time: use(how many, the first of them), the number as a constant.
template <class Use>
inline void by_tokens(int64_t first, int64_t count, Use&& use) {
    for (; first + 4 <= count; first += 4) use(std::integral_constant<int, 4>(), first);
    if (first + 2 <= count) use(std::integral_constant<int, 2>(), first), first += 2;
    if (first < count) use(std::integral_constant<int, 1>(), first);
}

// The scales of a row as the kernels read them, an entry for each unit: a group where its size suits, else 16 weights.
struct RowScales {
    int64_t unit;    // weights per entry
    int64_t stride;  // from an entry to the next
    float* scale;
    float* zero;     // zero point or, if symmetric, the offset of the stored codes
};

inline int64_t units_of(const Matrix& w, int64_t unit) { return (w.in + unit - 1) / unit; }

inline void fill_row_scales(const Matrix& w, int64_t n, const RowScales& row) {
    int64_t per_group = group_size(w) / row.unit;
    float offset = float(code_offset(w));
    for (int64_t g = 0; g < w.groups; ++g) {
        float s = load(w.scale, n * w.groups + g, w.scale_dtype);
        float z = w.zero_point ? float(zero_point(w, n, g)) : offset;
        for (int64_t u = g * per_group; u < (g + 1) * per_group; ++u) row.scale[u * row.stride] = s, row.zero[u * row.stride] = z;
    }
}

// The scale of a token that holds a NaN or an infinity, and its codes: all that is computed of it is NaN.
static inline float quantize_not_finite(int64_t k, int8_t* q) {
    std::memset(q, 0, size_t(k));
    return bits_to_float(0x7fc00000u);
}

}  // namespace llmqat
