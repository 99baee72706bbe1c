// Codes to vectors, for the AVX-512 and AMX variants. Needs AVX512 F, BW, VL, DQ, VBMI, VNNI and BF16.
#pragma once

#include <immintrin.h>

#include "matrix.h"

namespace llmqat {
namespace {

inline __mmask64 low_bytes(int64_t count) { return count >= 64 ? ~__mmask64(0) : (__mmask64(1) << count) - 1; }
inline __mmask16 low_lanes(int64_t count) { return count >= 16 ? __mmask16(0xffff) : __mmask16((1 << count) - 1); }

// Sixteen scales of a row as float32, from element i of the matrix's scales.
inline __m512 load_scales(const Matrix& w, int64_t i, __mmask16 mask) {
    if (w.scale_dtype == LLMQAT_FLOAT32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(w.scale) + i);
    __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(w.scale) + i);
    if (w.scale_dtype == LLMQAT_FLOAT16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// `fill_row_scales` by vectors where an entry is a group.
inline void expand_scales(const Matrix& w, int64_t n, RowScales& row) {
    if (row.unit != group_size(w)) return fill_row_scales(w, n, row);
    int64_t bit = n * w.bits, word = bit / 32;
    int shift = int(bit % 32);
    __m512i code_mask = _mm512_set1_epi32((1 << w.bits) - 1), offset = _mm512_set1_epi32(code_offset(w));
    for (int64_t g = 0; g < w.groups; g += 16) {
        __mmask16 mask = low_lanes(w.groups - g);
        _mm512_mask_storeu_ps(row.scale + g, mask, load_scales(w, n * w.groups + g, mask));
        __m512i zero = offset;
        if (w.zero_point) {
            const uint32_t* z = w.zero_point + word * w.groups + g;
            zero = _mm512_srli_epi32(_mm512_maskz_loadu_epi32(mask, z), unsigned(shift));
            if (shift + w.bits > 32) {
                __m512i high = _mm512_maskz_loadu_epi32(mask, z + w.groups);
                zero = _mm512_or_si512(zero, _mm512_slli_epi32(high, unsigned(32 - shift)));
            }
            zero = _mm512_and_si512(zero, code_mask);
        }
        _mm512_mask_storeu_epi32(row.zero + g, mask, zero);
    }
}

// ---- bfloat16 weights: 32 at a time -------------------------------------------------------------------------------

// Up to 4 bits a code indexes a table of the 2^bits values of its group. A 16-bit lane looks at the two bytes that hold
// its code and shifts; vpermw reads the low 5 bits of a lane, and what lies above the code is another code's bits: the
// table repeats its values so that they do not matter.
template <int BITS>
struct Lanes32 {
    static constexpr int BYTES = 4 * BITS;
    __m512i control, shift;
    Lanes32() {
        alignas(64) uint8_t c[64];
        alignas(64) uint16_t s[32];
        for (int i = 0; i < 32; ++i) {
            int byte = i * BITS / 8;
            c[2 * i] = uint8_t(byte), c[2 * i + 1] = uint8_t(byte + 1 < 16 ? byte + 1 : 0x80);
            s[i] = uint16_t(i * BITS % 8);
        }
        control = _mm512_load_si512(c), shift = _mm512_load_si512(s);
    }
    // `left` bytes remain in the row.
    inline __m512i indices(const uint8_t* p, int64_t left) const {
        __m512i bytes;
        if (BITS == 4 && left >= 16) bytes = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        else {
            int64_t count = left < BYTES ? left : BYTES;
            bytes = _mm512_broadcast_i32x4(_mm_maskz_loadu_epi8(__mmask16(low_bytes(count)), p));
        }
        return _mm512_srlv_epi16(_mm512_shuffle_epi8(bytes, control), shift);
    }
};

// Values (code - zero) * scale of all codes, in bfloat16: entries 0..15 from the first group, 16..31 from the second.
template <int BITS>
inline __m512i value_table(float scale_a, int32_t zero_a, float scale_b, int32_t zero_b) {
    const __m512i code = _mm512_and_si512(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                          _mm512_set1_epi32((1 << BITS) - 1));
    auto values = [&](float scale, int32_t zero) {
        return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(code, _mm512_set1_epi32(zero))), _mm512_set1_ps(scale));
    };
    return (__m512i)_mm512_cvtne2ps_pbh(values(scale_b, zero_b), values(scale_a, zero_a));
}

// W_hat[k, k + 32) of one row as bfloat16. `table` belongs to the units of k and k + 16 (BITS < 8).
template <int BITS>
inline __m512i weights32(const Lanes32<BITS>& lanes, const uint8_t* p, int64_t left, __m512i table, bool two_units) {
    __m512i index = lanes.indices(p, left);
    if (two_units) {
        const __m512i second = _mm512_set_epi16(16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0,
                                                0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
        index = _mm512_ternarylogic_epi32(index, _mm512_set1_epi16(15), second, 0xea);  // (index & 15) | second
    }
    return _mm512_permutexvar_epi16(index, table);
}

inline __m512i weights32_int8(const uint8_t* p, int64_t left, float sa, int32_t za, float sb, int32_t zb) {
    __m256i bytes = _mm256_maskz_loadu_epi8(__mmask32(low_bytes(left < 32 ? left : 32)), p);
    auto half = [](__m128i codes, float scale, int32_t zero) {
        __m512i centered = _mm512_sub_epi32(_mm512_cvtepu8_epi32(codes), _mm512_set1_epi32(zero));
        return _mm512_mul_ps(_mm512_cvtepi32_ps(centered), _mm512_set1_ps(scale));
    };
    return (__m512i)_mm512_cvtne2ps_pbh(half(_mm256_extracti128_si256(bytes, 1), sb, zb),
                                        half(_mm256_castsi256_si128(bytes), sa, za));
}

// The step of `RowScales` that the bfloat16 kernels need: whole groups if 32 divides them, else 16 weights.
inline int64_t bfloat_unit(const Matrix& w) {
    int64_t group = group_size(w);
    return w.groups == 1 || group % 32 == 0 ? group : 16;
}

// Calls use(r, k, weights) for W_hat[k, k + 32) of R rows, k over [k0, k1). k0 is a multiple of 32 and of the unit, or
// lies inside a unit of whole vectors; beyond `in` the codes read as zero bits.
template <int BITS, int R, class Use>
inline void each_bfloat(const Matrix& w, const uint8_t* const* row, const RowScales* scales, int64_t k0, int64_t k1,
                        Use&& use) {
    const Lanes32<BITS == 8 ? 4 : BITS> lanes;
    int64_t unit = scales[0].unit;
    bool small = unit == 16 && w.groups > 1;
    __m512i table[R];
    for (int64_t k = k0; k < k1;) {
        int64_t a = k / unit, b = small && k + 16 < w.in ? a + 1 : a;
        int64_t end = small ? k + 32 : (a + 1) * unit;
        if (w.groups == 1 || end > k1) end = k1;
        if constexpr (BITS < 8)
            for (int r = 0; r < R; ++r)
                table[r] = value_table<BITS>(scales[r].scale[a], scales[r].zero[a], scales[r].scale[b], scales[r].zero[b]);
        for (; k < end; k += 32) {
            int64_t offset = k * BITS / 8, left = (w.in * BITS + 7) / 8 - offset;
            for (int r = 0; r < R; ++r) {
                if ((k & 127) == 0) _mm_prefetch(reinterpret_cast<const char*>(row[r] + offset + 2048), _MM_HINT_T0);
                if constexpr (BITS == 8)
                    use(r, k, weights32_int8(row[r] + offset, left, scales[r].scale[a], scales[r].zero[a],
                                             scales[r].scale[b], scales[r].zero[b]));
                else use(r, k, weights32<BITS>(lanes, row[r] + offset, left, table[r], small));
            }
        }
    }
}

// ---- int8 path: 64 codes at a time --------------------------------------------------------------------------------

// Unsigned codes [k, k + 64) as bytes; `left` bytes remain in the row.
template <int BITS>
struct Lanes64 {
    static constexpr int BYTES = 8 * BITS;
    __m512i control, shift, mask;
    Lanes64() {
        alignas(64) uint8_t c[64], s[64];
        for (int i = 0; i < 64; ++i) {
            int byte = i / 8 * BITS + i % 8;
            c[i] = uint8_t(byte < 64 ? byte : 0), s[i] = uint8_t(i % 8 * BITS);
        }
        control = _mm512_load_si512(c), shift = _mm512_load_si512(s);
        mask = _mm512_set1_epi8(char((1 << BITS) - 1));
    }
    inline __m512i codes(const uint8_t* p, int64_t left) const {
        if constexpr (BITS == 8)
            return left >= 64 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8(low_bytes(left), p);
        __m512i fields;
        if (BITS == 4 && left >= 32)
            fields = _mm512_cvtepu32_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
        else fields = _mm512_permutexvar_epi8(control, _mm512_maskz_loadu_epi8(low_bytes(left < BYTES ? left : BYTES), p));
        return _mm512_and_si512(_mm512_multishift_epi64_epi8(shift, fields), mask);
    }
};

// Units of the integer kernels: groups of a multiple of 64, or 32, or 16 weights.
inline int64_t integer_unit(const Matrix& w) {
    int64_t group = group_size(w);
    return w.groups == 1 || group % 64 == 0 || group == 32 ? group : 16;
}

// Spread the entries of the units in [k, k + 64) over the dword lanes of 4 codes each, for units of 16 or 32.
struct SmallUnits {
    __m512i index;
    explicit SmallUnits(int64_t unit) {
        alignas(64) int32_t i[16];
        for (int lane = 0; lane < 16; ++lane) i[lane] = int32_t(lane * 4 / unit);
        index = _mm512_load_si512(i);
    }
    inline __m512 scales(const float* p) const {
        return _mm512_permutexvar_ps(index, _mm512_castps128_ps512(_mm_loadu_ps(p)));
    }
    inline __m512i zeros(const int32_t* p) const {
        __m512i entries = _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        return _mm512_permutexvar_epi32(index, entries);
    }
};

inline __m512i repeat_bytes(__m512i dwords) { return _mm512_mullo_epi32(dwords, _mm512_set1_epi32(0x01010101)); }

// ---- outputs ------------------------------------------------------------------------------------------------------

inline void store_lanes(const Output& out, int64_t i, __mmask16 mask, __m512 value) {
    if (out.dtype == LLMQAT_FLOAT32) return _mm512_mask_storeu_ps(static_cast<float*>(out.y) + i, mask, value);
    __m256i half = out.dtype == LLMQAT_FLOAT16 ? _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
                                               : (__m256i)_mm512_cvtneps_pbh(value);
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(out.y) + i, mask, half);
}

inline float quantize_lanes(const float* x, int64_t k, int8_t* q) {
    __m512 most = _mm512_setzero_ps();
    for (int64_t i = 0; i < k; i += 16)
        most = _mm512_max_ps(most, _mm512_abs_ps(_mm512_maskz_loadu_ps(low_lanes(k - i), x + i)));
    float absmax = _mm512_reduce_max_ps(most), scale = absmax > 0 ? absmax / 127.0f : 1.0f;
    __m512 divisor = _mm512_set1_ps(scale);
    for (int64_t i = 0; i < k; i += 16) {
        __mmask16 mask = low_lanes(k - i);
        __m512i code = _mm512_cvtps_epi32(_mm512_div_ps(_mm512_maskz_loadu_ps(mask, x + i), divisor));
        _mm512_mask_cvtsepi32_storeu_epi8(q + i, mask, code);
    }
    return scale;
}

}  // namespace
}  // namespace llmqat
