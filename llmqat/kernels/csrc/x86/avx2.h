// Vectors of 32 bytes for lanes.inc: AVX2, FMA and F16C, with AVX-VNNI where the file is compiled for it.
#pragma once

#include <immintrin.h>

#include "core/matrix.h"

namespace llmqat {
namespace {

constexpr int BYTES = 32, LANES = 8, TILE_TOKENS = 3;
using Bytes = __m256i;
using Ints = __m256i;
using Floats = __m256;

inline Bytes load_bytes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store_bytes(void* p, Bytes v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
inline Bytes repeat_byte(int value) { return _mm256_set1_epi8(char(value)); }
inline Bytes and_bytes(Bytes a, Bytes b) { return _mm256_and_si256(a, b); }
inline Bytes or_bytes(Bytes a, Bytes b) { return _mm256_or_si256(a, b); }
inline Bytes xor_bytes(Bytes a, Bytes b) { return _mm256_xor_si256(a, b); }
// Bits from the byte above come in: mask them.
inline Bytes shift_bytes(Bytes v, int right) { return _mm256_srli_epi16(v, right); }

// The same, of which the compiler knows nothing: it keeps a constant where it would make it again and again.
inline Bytes opaque(Bytes v) {
    asm("" : "+x"(v));
    return v;
}
inline Bytes upper_words() { return _mm256_set1_epi32(int(0xffff0000)); }

inline Floats load_floats(const float* p) { return _mm256_loadu_ps(p); }
inline void store_floats(float* p, Floats v) { _mm256_storeu_ps(p, v); }
inline Floats repeat(float value) { return _mm256_set1_ps(value); }
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats subtract(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
inline Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats divide(Floats a, Floats b) { return _mm256_div_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats multiply_subtract_from(Floats a, Floats b, Floats c) { return _mm256_fnmadd_ps(a, b, c); }  // c - a * b
// Of the sizes as integers: NaN is the largest.
inline Floats larger_magnitude(Floats most, Floats v) {
    const __m256i size = _mm256_castps_si256(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), v));
    return _mm256_castsi256_ps(_mm256_max_epi32(size, _mm256_castps_si256(most)));
}
inline Floats to_floats(Ints v) { return _mm256_cvtepi32_ps(v); }
inline Ints no_ints() { return _mm256_setzero_si256(); }
inline Ints nearest_ints(Floats v) { return _mm256_cvtps_epi32(v); }

inline __m128 halves_added(Floats v) { return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)); }

// to[i] = the sum of the lanes of v[i].
inline void sum_lanes(const Floats (&v)[4], float* to) {
    Floats pairs = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    _mm_storeu_ps(to, halves_added(pairs));
}

// The lanes of four vectors as int8, in their order.
inline Bytes narrow(Ints a, Ints b, Ints c, Ints d) {
    Bytes mixed = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
    return _mm256_permutevar8x32_epi32(mixed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

inline void split_even_odd(Bytes a, Bytes b, Bytes& even, Bytes& odd) {
    const Bytes low = _mm256_set1_epi16(0xff);
    Bytes e = _mm256_packus_epi16(_mm256_and_si256(a, low), _mm256_and_si256(b, low));
    Bytes o = _mm256_packus_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8));
    even = _mm256_permute4x64_epi64(e, 0xd8), odd = _mm256_permute4x64_epi64(o, 0xd8);
}

// ---- codes --------------------------------------------------------------------------------------------------------

constexpr int THREE_BITS_READ = 16;  // bytes that unpack_three reads, of which it uses 12

// 32 codes of 3 bits: a 16-bit lane takes the two bytes that hold its code, which moves to the top and down again.
inline Bytes unpack_three(const uint8_t* p) {
    const Bytes first = _mm256_setr_epi8(0, 1, 0, 1, 0, 1, 1, 2, 1, 2, 1, 2, 2, 3, 2, 3,  // of the first 16 codes
                                         6, 7, 6, 7, 6, 7, 7, 8, 7, 8, 7, 8, 8, 9, 8, 9);
    const Bytes power = _mm256_broadcastsi128_si256(
        _mm_setr_epi16(1 << 13, 1 << 10, 1 << 7, 1 << 12, 1 << 9, 1 << 6, 1 << 11, 1 << 8));
    Bytes raw = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    Bytes low = _mm256_shuffle_epi8(raw, first);
    Bytes high = _mm256_shuffle_epi8(raw, _mm256_add_epi8(first, _mm256_set1_epi8(3)));
    return _mm256_packus_epi16(_mm256_srli_epi16(_mm256_mullo_epi16(low, power), 13),
                               _mm256_srli_epi16(_mm256_mullo_epi16(high, power), 13));
}

// ---- integer dot products: lane i of the sum takes bytes 4 i to 4 i + 3 -----------------------------------------------

#ifdef __AVXVNNI__
constexpr int CENTER = 0;  // what comes off 8-bit codes before they are multiplied

template <int BITS, int PARTS>
inline Ints dot(Ints sum, const Bytes (&codes)[PARTS], const int8_t* x) {
    for (int p = 0; p < PARTS; ++p) sum = _mm256_dpbusd_avx_epi32(sum, codes[p], load_bytes(x + p * BYTES));
    return sum;
}
#else
constexpr int CENTER = 128;

// vpmaddubsw adds two products in 16 bits, with saturation: 4 bits leave room for more than are added here (15 * 127 * 4).
// Eight bits have none, so their signs go to the activations: 128 * 127 * 2 still fits.
template <int BITS, int PARTS>
inline Ints dot(Ints sum, const Bytes (&codes)[PARTS], const int8_t* x) {
    Bytes pairs;
    if constexpr (BITS == 8) {
        pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(codes[0]), _mm256_sign_epi8(load_bytes(x), codes[0]));
    } else {
        pairs = _mm256_maddubs_epi16(codes[0], load_bytes(x));
        for (int p = 1; p < PARTS; ++p)
            pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(codes[p], load_bytes(x + p * BYTES)));
    }
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#endif

// ---- scales -------------------------------------------------------------------------------------------------------

// LANES scales from element i of the matrix's scales on.
inline Floats load_scales(const Matrix& w, int64_t i) {
    if (w.scale_dtype == LLMQAT_FLOAT32) return _mm256_loadu_ps(static_cast<const float*>(w.scale) + i);
    __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(w.scale) + i));
    if (w.scale_dtype == LLMQAT_FLOAT16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

// LANES zero points: (words >> shift | next << (32 - shift)) & mask.
inline Floats load_zeros(const uint32_t* words, const uint32_t* next, int shift, uint32_t mask) {
    Ints zero = _mm256_srl_epi32(load_bytes(words), _mm_cvtsi32_si128(shift));
    if (next) zero = _mm256_or_si256(zero, _mm256_sll_epi32(load_bytes(next), _mm_cvtsi32_si128(32 - shift)));
    return _mm256_cvtepi32_ps(_mm256_and_si256(zero, _mm256_set1_epi32(int(mask))));
}

// Lane i of a spread is entry i / lanes of a few.
struct Spread {
    __m256i index;
    explicit Spread(int64_t lanes) {
        int32_t i[8];
        for (int lane = 0; lane < 8; ++lane) i[lane] = int32_t(lane / lanes);
        index = load_bytes(i);
    }
    inline Floats operator()(const float* p) const { return _mm256_permutevar8x32_ps(_mm256_loadu_ps(p), index); }
};

// ---- weights in float32 ---------------------------------------------------------------------------------------------

template <int STORED>
inline Floats round_to_storage(Floats v) {
    if constexpr (STORED == LLMQAT_FLOAT32) return v;
    if constexpr (STORED == LLMQAT_FLOAT16) return _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    __m256i bits = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    bits = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    return _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(int(0xffff0000))));
}

// The upper COUNT bytes of each of 16 values, byte by byte, so that vpshufb looks them up; the others are zero.
template <int COUNT>
struct Table {
    Bytes byte[COUNT];
};

// The values (code & mask - zero) * scale of the codes 0 to 15, as `stored` rounds them: COUNT is 2 for bfloat16. With
// QUADS, four codes each have a scale and zero point of their own, else all have the first.
template <int COUNT, bool QUADS>
inline Table<COUNT> make_table(const float* scale, const float* zero, int mask, [[maybe_unused]] int32_t stored) {
    const Bytes pick = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    auto quads = [](const float* p, int q) {
        return QUADS ? _mm256_set_m128(_mm_set1_ps(p[q + 2]), _mm_set1_ps(p[q])) : _mm256_set1_ps(*p);
    };
    auto values = [&](int q) {  // of quads q and q + 2
        __m256i code = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11), _mm256_set1_epi32(4 * q));
        Floats v = to_floats(_mm256_and_si256(code, _mm256_set1_epi32(mask)));
        v = multiply(subtract(v, quads(zero, q)), quads(scale, q));
        if constexpr (COUNT == 2) v = round_to_storage<LLMQAT_BFLOAT16>(v);
        else if (stored == LLMQAT_FLOAT16) v = round_to_storage<LLMQAT_FLOAT16>(v);
        return _mm256_shuffle_epi8(_mm256_castps_si256(v), pick);
    };
    const Bytes a = values(0), b = values(1), high = _mm256_unpackhi_epi32(a, b), low = _mm256_unpacklo_epi32(a, b);
    const Bytes third = _mm256_permute4x64_epi64(high, 0x88), fourth = _mm256_permute4x64_epi64(high, 0xdd);
    if constexpr (COUNT == 2) return {{third, fourth}};
    else return {{_mm256_permute4x64_epi64(low, 0x88), _mm256_permute4x64_epi64(low, 0xdd), third, fourth}};
}

// The table of 16 bfloat16 values: `words`, with `delta` added to all but zeros.
inline Table<2> split_words(const uint16_t* words, int delta) {
    const Bytes order = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
    const Bytes base = load_bytes(words), zeros = _mm256_cmpeq_epi16(base, _mm256_setzero_si256());
    Bytes both = _mm256_add_epi16(base, _mm256_andnot_si256(zeros, _mm256_set1_epi16(short(delta))));
    both = _mm256_shuffle_epi8(both, order);
    return {{_mm256_permute4x64_epi64(both, 0x88), _mm256_permute4x64_epi64(both, 0xdd)}};
}

// Added to codes below 4, it makes every four of 16 bytes look up four values of their own.
inline Bytes run_of_four() {
    return _mm256_broadcastsi128_si256(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c));
}

// For the lower and the upper 16 bytes.
template <int COUNT>
inline Table<COUNT> both_halves(const Table<COUNT>& lower, const Table<COUNT>& upper) {
    Table<COUNT> t;
    for (int b = 0; b < COUNT; ++b) t.byte[b] = _mm256_blend_epi32(lower.byte[b], upper.byte[b], 0xf0);
    return t;
}

// Values of two of 16 bytes each: of the even and of the odd ones of the first (UPPER: last) 8 of every 16 codes.
template <bool UPPER, int COUNT>
inline void lookup(const Table<COUNT>& t, Bytes codes, Bytes upper, Floats& even, Floats& odd) {
    auto words = [&](int b) {
        Bytes low = _mm256_shuffle_epi8(t.byte[b], codes), high = _mm256_shuffle_epi8(t.byte[b + 1], codes);
        return UPPER ? _mm256_unpackhi_epi8(low, high) : _mm256_unpacklo_epi8(low, high);
    };
    Bytes high = words(COUNT - 2), e = _mm256_slli_epi32(high, 16);
    if constexpr (COUNT == 4) {
        Bytes low = words(0);
        even = _mm256_castsi256_ps(_mm256_blend_epi16(low, e, 0xaa));
        odd = _mm256_castsi256_ps(_mm256_blend_epi16(_mm256_srli_epi32(low, 16), high, 0xaa));
    } else {
        even = _mm256_castsi256_ps(e);
        odd = _mm256_castsi256_ps(_mm256_and_si256(high, upper));
    }
}

// The codes themselves, in that order.
template <bool UPPER>
inline void widen(Bytes codes, Floats& even, Floats& odd) {
    const Bytes none = _mm256_setzero_si256();
    Bytes words = UPPER ? _mm256_unpackhi_epi8(codes, none) : _mm256_unpacklo_epi8(codes, none);
    even = to_floats(_mm256_and_si256(words, _mm256_set1_epi32(0xffff))), odd = to_floats(_mm256_srli_epi32(words, 16));
}

}  // namespace
}  // namespace llmqat
