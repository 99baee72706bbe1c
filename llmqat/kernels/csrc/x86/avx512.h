// Codes to vectors, for the AVX-512 and AMX variants. Needs AVX512 F, BW, VL, DQ, VBMI, VNNI and BF16.
#pragma once

#include <immintrin.h>
#include <limits>

#include "core/matrix.h"

namespace llmqat {
namespace {

// The first `count` of a vector: all or none of them, where that is above or below.
inline __mmask64 low_bytes(int64_t count) { return count >= 64 ? ~__mmask64(0) : count > 0 ? (__mmask64(1) << count) - 1 : 0; }
inline __mmask16 low_lanes(int64_t count) { return __mmask16(count >= 16 ? 0xffff : count > 0 ? (1 << count) - 1 : 0); }

// 64 bytes of a row, of which `left` remain in it: those beyond read as zero where TAIL.
template <bool TAIL>
inline __m512i line_of(const uint8_t* p, int64_t left) {
    return TAIL ? _mm512_maskz_loadu_epi8(low_bytes(left), p) : _mm512_loadu_si512(p);
}

// Sixteen scales of a row as float32, from element i of the matrix's scales.
inline __m512 load_scales(const Matrix& w, int64_t i, __mmask16 mask) {
    if (w.scale_dtype == LLMQAT_FLOAT32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(w.scale) + i);
    __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(w.scale) + i);
    if (w.scale_dtype == LLMQAT_FLOAT16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// Sixteen zero points of row n, or the offset of symmetric codes.
inline __m512 load_zeros(const Matrix& w, int64_t n, int64_t g, __mmask16 mask) {
    if (!w.zero_point) return _mm512_set1_ps(float(code_offset(w)));
    int64_t bit = n * w.bits;
    unsigned shift = unsigned(bit % 32);
    const uint32_t* z = w.zero_point + bit / 32 * w.groups + g;
    __m512i zero = _mm512_srli_epi32(_mm512_maskz_loadu_epi32(mask, z), shift);
    if (int(shift) + w.bits > 32)
        zero = _mm512_or_si512(zero, _mm512_slli_epi32(_mm512_maskz_loadu_epi32(mask, z + w.groups), 32 - shift));
    return _mm512_cvtepi32_ps(_mm512_and_si512(zero, _mm512_set1_epi32((1 << w.bits) - 1)));
}

// `fill_row_scales` by vectors, where an entry is a group and entries are adjacent.
inline void expand_scales(const Matrix& w, int64_t n, const RowScales& row) {
    if (row.unit != group_size(w)) return fill_row_scales(w, n, row);
    for (int64_t g = 0; g < w.groups; g += 16) {
        __mmask16 mask = low_lanes(w.groups - g);
        _mm512_mask_storeu_ps(row.scale + g, mask, load_scales(w, n * w.groups + g, mask));
        _mm512_mask_storeu_ps(row.zero + g, mask, load_zeros(w, n, g, mask));
    }
}

// to[4 i + r] = value[r][i].
inline void store_interleaved(const __m512 (&value)[4], float* to) {
    __m512 a = _mm512_unpacklo_ps(value[0], value[1]), b = _mm512_unpackhi_ps(value[0], value[1]);
    __m512 c = _mm512_unpacklo_ps(value[2], value[3]), d = _mm512_unpackhi_ps(value[2], value[3]);
    auto pair = [](__m512 x, __m512 y, bool high) {
        __m512d p = _mm512_castps_pd(x), q = _mm512_castps_pd(y);
        return _mm512_castpd_ps(high ? _mm512_unpackhi_pd(p, q) : _mm512_unpacklo_pd(p, q));
    };
    const __m512 entry[4] = {pair(a, c, false), pair(a, c, true), pair(b, d, false), pair(b, d, true)};
    for (int j = 0; j < 4; ++j) {  // lane l of entry[j]: entry 4 l + j of the four rows
        _mm_storeu_ps(to + 4 * j, _mm512_extractf32x4_ps(entry[j], 0));
        _mm_storeu_ps(to + 4 * (4 + j), _mm512_extractf32x4_ps(entry[j], 1));
        _mm_storeu_ps(to + 4 * (8 + j), _mm512_extractf32x4_ps(entry[j], 2));
        _mm_storeu_ps(to + 4 * (12 + j), _mm512_extractf32x4_ps(entry[j], 3));
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
    inline __m512i spread(__m128i bytes) const {
        return _mm512_srlv_epi16(_mm512_shuffle_epi8(_mm512_broadcast_i32x4(bytes), control), shift);
    }
    inline __m512i indices(const uint8_t* p) const {
        if constexpr (BITS == 4) return spread(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        return spread(_mm_maskz_loadu_epi8(__mmask16((1 << BYTES) - 1), p));
    }
    // The last codes of a row, of which `left` bytes remain.
    inline __m512i indices(const uint8_t* p, int64_t left) const {
        return spread(_mm_maskz_loadu_epi8(__mmask16(low_bytes(left < BYTES ? left : BYTES)), p));
    }
};

// Values (code - zero) * scale of all codes, in bfloat16: entries 0..15 from the first unit, 16..31 from the second.
template <int BITS>
inline __m512i value_table(float scale_a, float zero_a, float scale_b, float zero_b) {
    const __m512 code = _mm512_cvtepi32_ps(_mm512_and_si512(
        _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32((1 << BITS) - 1)));
    auto values = [&](float scale, float zero) {
        return _mm512_mul_ps(_mm512_sub_ps(code, _mm512_set1_ps(zero)), _mm512_set1_ps(scale));
    };
    return (__m512i)_mm512_cvtne2ps_pbh(values(scale_b, zero_b), values(scale_a, zero_a));
}

// Let the upper 16 lanes read the second half of a table of two units.
inline __m512i second_unit(__m512i indices) {
    const __m512i half = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
    return _mm512_ternarylogic_epi32(indices, _mm512_set1_epi16(15), half, 0xea);  // (indices & 15) | half
}

// 32 weights of 8 bits: the first 16 belong to unit a, the others to unit b. `shift` is zero * scale: like the result, it
// has 16 bits, so that code * scale - shift is exact.
inline __m512i weights_int8(__m256i codes, float scale_a, float shift_a, float scale_b, float shift_b) {
    auto half = [](__m128i part, float scale, float shift) {
        __m512 code = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(part));
        return _mm512_fmsub_ps(code, _mm512_set1_ps(scale), _mm512_set1_ps(shift));
    };
    return (__m512i)_mm512_cvtne2ps_pbh(half(_mm256_extracti128_si256(codes, 1), scale_b, shift_b),
                                        half(_mm256_castsi256_si128(codes), scale_a, shift_a));
}

// The unit of `RowScales` that the bfloat16 kernels need: whole groups if 32 divides them, else 16 weights.
inline int64_t bfloat_unit(const Matrix& w) {
    int64_t group = group_size(w);
    return w.groups == 1 || group % 32 == 0 ? group : 16;
}

// Weights of R rows between two changes of unit.
template <int BITS, int R, bool SMALL>
struct UnitWeights {
    const Lanes32<BITS == 8 ? 4 : BITS>& lanes;
    const uint8_t* const* row;
    const RowScales* scales;
    int64_t a, b;  // entries of the lower and the upper 16 weights
    __m512i table[R];
    float shift_a[R], shift_b[R];

    void start(int64_t unit_a, int64_t unit_b) {
        a = unit_a * scales[0].stride, b = unit_b * scales[0].stride;
        if constexpr (BITS == 8)
            for (int r = 0; r < R; ++r) {
                shift_a[r] = scales[r].zero[a] * scales[r].scale[a];
                shift_b[r] = scales[r].zero[b] * scales[r].scale[b];
            }
        if constexpr (BITS < 8)
            for (int r = 0; r < R; ++r)
                table[r] = value_table<BITS>(scales[r].scale[a], scales[r].zero[a], scales[r].scale[b], scales[r].zero[b]);
    }

    template <bool TAIL>
    __m512i at(int r, int64_t offset, int64_t left) const {
        const uint8_t* p = row[r] + offset;
        if constexpr (BITS == 8) {
            __m256i codes = TAIL ? _mm256_maskz_loadu_epi8(__mmask32(low_bytes(left < 32 ? left : 32)), p)
                                 : _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
            const RowScales& s = scales[r];
            return weights_int8(codes, s.scale[a], shift_a[r], s.scale[b], shift_b[r]);
        } else {
            __m512i index = TAIL ? lanes.indices(p, left) : lanes.indices(p);
            return _mm512_permutexvar_epi16(SMALL ? second_unit(index) : index, table[r]);
        }
    }
};

template <int BITS, int R, bool SMALL, class Use>
inline void each_bfloat_unit(const Matrix& w, UnitWeights<BITS, R, SMALL>& weights, int64_t k0, int64_t k1, Use&& use) {
    constexpr int BYTES = 4 * BITS;
    const int64_t unit = weights.scales[0].unit, row_bytes = (w.in * BITS + 7) / 8;
    for (int64_t k = k0; k < k1;) {
        int64_t a = w.groups == 1 ? 0 : k / unit, end = SMALL ? k + 32 : w.groups == 1 ? k1 : (a + 1) * unit;
        if (end > k1) end = k1;
        weights.start(a, SMALL && k + 16 < w.in ? a + 1 : a);
        int64_t offset = k * BITS / 8;
        for (; k + 128 <= end; k += 128) {
            for (int r = 0; r < R; ++r) __builtin_prefetch(weights.row[r] + offset + 2048);
            for (int c = 0; c < 4; ++c, offset += BYTES)
                for (int r = 0; r < R; ++r) use(r, k + 32 * c, weights.template at<false>(r, offset, 0));
        }
        for (; k + 32 <= end; k += 32, offset += BYTES)
            for (int r = 0; r < R; ++r) use(r, k, weights.template at<false>(r, offset, 0));
        if (k >= end) continue;
        for (int r = 0; r < R; ++r) use(r, k, weights.template at<true>(r, offset, row_bytes - offset));
        k = end;
    }
}

// Calls use(r, k, weights) for W_hat[k, k + 32) of R rows, bfloat16, k in [k0, k1); k0 is a multiple of 32. Beyond `in`
// the codes read as zero bits.
template <int BITS, int R, class Use>
inline void each_bfloat(const Matrix& w, const uint8_t* const* row, const RowScales* scales, int64_t k0, int64_t k1,
                        Use&& use) {
    const Lanes32<BITS == 8 ? 4 : BITS> lanes;
    if (scales[0].unit == 16 && w.groups > 1) {
        UnitWeights<BITS, R, true> weights{lanes, row, scales, 0, 0, {}, {}, {}};
        each_bfloat_unit(w, weights, k0, k1, use);
    } else {
        UnitWeights<BITS, R, false> weights{lanes, row, scales, 0, 0, {}, {}, {}};
        each_bfloat_unit(w, weights, k0, k1, use);
    }
}

// ---- int8 path: 64 codes at a time --------------------------------------------------------------------------------

// Unsigned codes [k, k + 64) as bytes.
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
    // `left` bytes remain in the row.
    inline __m512i codes(const uint8_t* p, int64_t left) const {
        __m512i bytes = _mm512_maskz_loadu_epi8(low_bytes(left < BYTES ? left : BYTES), p);
        if constexpr (BITS == 8) return bytes;
        return _mm512_and_si512(_mm512_multishift_epi64_epi8(shift, _mm512_permutexvar_epi8(control, bytes)), mask);
    }
};

// Units of the integer kernels: whole groups if 128 divides them (any multiple of 64 but for 4 bits), else 16, 32 or 64.
template <int BITS>
inline int64_t integer_unit(const Matrix& w) {
    int64_t group = group_size(w), whole = BITS == 4 ? 128 : 64;
    if (w.groups == 1 || group % whole == 0 || group == 32 || group == 64) return group;
    return 16;
}

// Entries of the units in the codes of a vector, spread over its dword lanes of CODES codes each.
template <int CODES>
struct SmallUnits {
    __m512i index;
    explicit SmallUnits(int64_t unit) {
        alignas(64) int32_t i[16];
        for (int lane = 0; lane < 16; ++lane) i[lane] = int32_t(lane * CODES / unit);
        index = _mm512_load_si512(i);
    }
    inline __m512 operator()(const float* p) const {
        return _mm512_permutexvar_ps(index, _mm512_castps256_ps512(_mm256_loadu_ps(p)));
    }
};

// Each value in all four bytes of its lane.
inline __m512i repeat_bytes(__m512 values) {
    return _mm512_mullo_epi32(_mm512_cvtps_epi32(values), _mm512_set1_epi32(0x01010101));
}

// ---- outputs ------------------------------------------------------------------------------------------------------

// The sums of the lanes of four vectors.
inline __m128 sum_lanes(__m512 a, __m512 b, __m512 c, __m512 d) {
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    __m512d p = _mm512_castps_pd(ab), q = _mm512_castps_pd(cd);
    __m512 all = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(p, q)), _mm512_castpd_ps(_mm512_unpackhi_pd(p, q)));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

inline void store_lanes(const Output& out, int64_t i, __mmask16 mask, __m512 value) {
    if (out.dtype == LLMQAT_FLOAT32) return _mm512_mask_storeu_ps(static_cast<float*>(out.y) + i, mask, value);
    __m256i half = out.dtype == LLMQAT_FLOAT16 ? _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
                                               : (__m256i)_mm512_cvtneps_pbh(value);
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(out.y) + i, mask, half);
}

// Sixteen values as sums of bfloat16 numbers, `stride` apart: 8 + 8 + 8 bits hold the 24 of a float32.
inline void split(__m512 value, int planes, uint16_t* to, int64_t stride) {
    for (int p = 0; p < planes; ++p) {
        __m256i part = (__m256i)_mm512_cvtneps_pbh(value);
        _mm256_store_si256(reinterpret_cast<__m256i*>(to + p * stride), part);
        value = _mm512_sub_ps(value, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(part), 16)));
    }
}

inline float quantize_lanes(const float* x, int64_t k, int8_t* q) {
    const int64_t whole = k / 64 * 64;
    __m512i most[4] = {};  // sizes as integers: NaN is the largest
    auto larger = [](__m512i sizes, __m512 value) {
        return _mm512_max_epi32(sizes, _mm512_castps_si512(_mm512_abs_ps(value)));
    };
    for (int64_t i = 0; i < whole; i += 64)
        for (int64_t j = 0; j < 4; ++j) most[j] = larger(most[j], _mm512_loadu_ps(x + i + 16 * j));
    for (int64_t i = whole; i < k; i += 16) most[0] = larger(most[0], _mm512_maskz_loadu_ps(low_lanes(k - i), x + i));
    most[0] = _mm512_max_epi32(_mm512_max_epi32(most[0], most[1]), _mm512_max_epi32(most[2], most[3]));
    const uint32_t absmax = uint32_t(_mm512_reduce_max_epi32(most[0]));
    if (absmax >= INFINITY_BITS) return quantize_not_finite(k, q);
    const float scale = absmax ? bits_to_float(absmax) / 127.0f : 1.0f;
    const __m512 divisor = _mm512_set1_ps(scale), inverse = _mm512_set1_ps(1.0f / scale);
    const __m512 least = _mm512_set1_ps(-127.0f), greatest = _mm512_set1_ps(127.0f);
    // The product is off the quotient by 3e-5 at most: both round alike, except near ties, or where the scale is denormal.
    const __m512 tie = _mm512_set1_ps(scale < std::numeric_limits<float>::min() ? -1.0f : 0.4999f);
    auto codes = [&](__m512 value) {
        __m512 code = _mm512_mul_ps(value, inverse);
        const __m512 off = _mm512_abs_ps(_mm512_sub_ps(code, _mm512_roundscale_ps(code, 0)));
        if (_mm512_cmp_ps_mask(off, tie, _CMP_NLT_UQ))
            code = _mm512_max_ps(_mm512_min_ps(_mm512_div_ps(value, divisor), greatest), least);
        return _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(code));
    };
    for (int64_t i = 0; i < whole; i += 16)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(q + i), codes(_mm512_loadu_ps(x + i)));
    for (int64_t i = whole; i < k; i += 16)
        _mm_mask_storeu_epi8(q + i, low_lanes(k - i), codes(_mm512_maskz_loadu_ps(low_lanes(k - i), x + i)));
    return scale;
}

}  // namespace
}  // namespace llmqat
