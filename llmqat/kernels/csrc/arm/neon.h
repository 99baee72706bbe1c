// Vectors of 16 bytes for lanes.inc: NEON, with the dot products that the file is compiled for.
#pragma once

#include <arm_neon.h>

#include "core/matrix.h"

namespace llmqat {
namespace {

constexpr int BYTES = 16, LANES = 4, TILE_TOKENS = 4;
using Bytes = uint8x16_t;
using Ints = int32x4_t;
using Floats = float32x4_t;

inline Bytes load_bytes(const void* p) { return vld1q_u8(static_cast<const uint8_t*>(p)); }
inline void store_bytes(void* p, Bytes v) { vst1q_u8(static_cast<uint8_t*>(p), v); }
inline Bytes repeat_byte(int value) { return vdupq_n_u8(uint8_t(value)); }
inline Bytes and_bytes(Bytes a, Bytes b) { return vandq_u8(a, b); }
inline Bytes or_bytes(Bytes a, Bytes b) { return vorrq_u8(a, b); }
inline Bytes xor_bytes(Bytes a, Bytes b) { return veorq_u8(a, b); }
inline Bytes shift_bytes(Bytes v, int right) { return vshlq_u8(v, vdupq_n_s8(int8_t(-right))); }

// The same, of which the compiler knows nothing: it keeps a constant where it would make it again and again.
inline Bytes opaque(Bytes v) {
    asm("" : "+w"(v));
    return v;
}
inline Bytes upper_words() { return vreinterpretq_u8_u32(vdupq_n_u32(0xffff0000)); }

inline Floats load_floats(const float* p) { return vld1q_f32(p); }
inline void store_floats(float* p, Floats v) { vst1q_f32(p, v); }
inline Floats repeat(float value) { return vdupq_n_f32(value); }
inline Floats add(Floats a, Floats b) { return vaddq_f32(a, b); }
inline Floats subtract(Floats a, Floats b) { return vsubq_f32(a, b); }
inline Floats multiply(Floats a, Floats b) { return vmulq_f32(a, b); }
inline Floats divide(Floats a, Floats b) { return vdivq_f32(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
inline Floats multiply_subtract_from(Floats a, Floats b, Floats c) { return vfmsq_f32(c, a, b); }  // c - a * b
// Of the sizes as integers: NaN is the largest.
inline Floats larger_magnitude(Floats most, Floats v) {
    return vreinterpretq_f32_s32(vmaxq_s32(vreinterpretq_s32_f32(vabsq_f32(v)), vreinterpretq_s32_f32(most)));
}
inline Floats to_floats(Ints v) { return vcvtq_f32_s32(v); }
inline Ints no_ints() { return vdupq_n_s32(0); }
inline Ints nearest_ints(Floats v) { return vcvtnq_s32_f32(v); }

// to[i] = the sum of the lanes of v[i].
inline void sum_lanes(const Floats (&v)[4], float* to) {
    vst1q_f32(to, vpaddq_f32(vpaddq_f32(v[0], v[1]), vpaddq_f32(v[2], v[3])));
}

// The lanes of four vectors as int8, in their order.
inline Bytes narrow(Ints a, Ints b, Ints c, Ints d) {
    int16x8_t low = vcombine_s16(vqmovn_s32(a), vqmovn_s32(b)), high = vcombine_s16(vqmovn_s32(c), vqmovn_s32(d));
    return vreinterpretq_u8_s8(vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
}

inline void split_even_odd(Bytes a, Bytes b, Bytes& even, Bytes& odd) { even = vuzp1q_u8(a, b), odd = vuzp2q_u8(a, b); }

// ---- codes --------------------------------------------------------------------------------------------------------

constexpr int THREE_BITS_READ = 8;  // bytes that unpack_three reads, of which it uses 6

// 16 codes of 3 bits: a 16-bit lane takes the two bytes that hold its code, which moves to the top and down again.
inline Bytes unpack_three(const uint8_t* p) {
    static const uint8_t FIRST[16] = {0, 1, 0, 1, 0, 1, 1, 2, 1, 2, 1, 2, 2, 3, 2, 3};
    static const int16_t UP[8] = {13, 10, 7, 12, 9, 6, 11, 8};
    const Bytes first = vld1q_u8(FIRST);
    const int16x8_t up = vld1q_s16(UP);
    Bytes raw = vcombine_u8(vld1_u8(p), vdup_n_u8(0));
    uint16x8_t low = vreinterpretq_u16_u8(vqtbl1q_u8(raw, first));
    uint16x8_t high = vreinterpretq_u16_u8(vqtbl1q_u8(raw, vaddq_u8(first, vdupq_n_u8(3))));
    uint16x8_t a = vshrq_n_u16(vshlq_u16(low, up), 13), b = vshrq_n_u16(vshlq_u16(high, up), 13);
    return vcombine_u8(vmovn_u16(a), vmovn_u16(b));
}

// ---- integer dot products: lane i of the sum takes bytes 4 i to 4 i + 3 -----------------------------------------------

constexpr int CENTER = 128;  // what comes off 8-bit codes before they are multiplied: all fit int8

template <int BITS, int PARTS>
inline Ints dot(Ints sum, const Bytes (&codes)[PARTS], const int8_t* x) {
    for (int p = 0; p < PARTS; ++p) {
        const int8x16_t c = vreinterpretq_s8_u8(codes[p]), q = vld1q_s8(x + p * BYTES);
#ifdef __ARM_FEATURE_DOTPROD
        sum = vdotq_s32(sum, c, q);
#else
        int16x8_t low = vmull_s8(vget_low_s8(c), vget_low_s8(q)), high = vmull_high_s8(c, q);
        sum = vpadalq_s16(sum, vpaddq_s16(low, high));  // pairs fit: 128 * 127 * 2 < 2^15
#endif
    }
    return sum;
}

// ---- scales -------------------------------------------------------------------------------------------------------

// LANES scales from element i of the matrix's scales on.
inline Floats load_scales(const Matrix& w, int64_t i) {
    if (w.scale_dtype == LLMQAT_FLOAT32) return vld1q_f32(static_cast<const float*>(w.scale) + i);
    uint16x4_t half = vld1_u16(static_cast<const uint16_t*>(w.scale) + i);
    if (w.scale_dtype == LLMQAT_FLOAT16) return vcvt_f32_f16(vreinterpret_f16_u16(half));
    return vreinterpretq_f32_u32(vshll_n_u16(half, 16));
}

// LANES zero points: (words >> shift | next << (32 - shift)) & mask.
inline Floats load_zeros(const uint32_t* words, const uint32_t* next, int shift, uint32_t mask) {
    uint32x4_t zero = vshlq_u32(vld1q_u32(words), vdupq_n_s32(-shift));
    if (next) zero = vorrq_u32(zero, vshlq_u32(vld1q_u32(next), vdupq_n_s32(32 - shift)));
    return vcvtq_f32_u32(vandq_u32(zero, vdupq_n_u32(mask)));
}

// Lane i of a spread is entry i / lanes of a few.
struct Spread {
    Bytes index;
    explicit Spread(int64_t lanes) {
        uint8_t i[16];
        for (int byte = 0; byte < 16; ++byte) i[byte] = uint8_t(byte / 4 / lanes * 4 + byte % 4);
        index = vld1q_u8(i);
    }
    inline Floats operator()(const float* p) const {
        return vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(vld1q_f32(p)), index));
    }
};

// ---- weights in float32 ---------------------------------------------------------------------------------------------

template <int STORED>
inline Floats round_to_storage(Floats v) {
    if constexpr (STORED == LLMQAT_FLOAT32) return v;
    if constexpr (STORED == LLMQAT_FLOAT16) return vcvt_f32_f16(vcvt_f16_f32(v));
    uint32x4_t bits = vreinterpretq_u32_f32(v), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    bits = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
    return vreinterpretq_f32_u32(vandq_u32(bits, vdupq_n_u32(0xffff0000)));
}

// The upper COUNT bytes of each of 16 values, byte by byte, so that tbl looks them up; the others are zero.
template <int COUNT>
struct Table {
    Bytes byte[COUNT];
};

// The values (code & mask - zero) * scale of the codes 0 to 15, as `stored` rounds them: COUNT is 2 for bfloat16. With
// QUADS, four codes each have a scale and zero point of their own, else all have the first.
template <int COUNT, bool QUADS>
inline Table<COUNT> make_table(const float* scale, const float* zero, int mask, [[maybe_unused]] int32_t stored) {
    static const int32_t FIRST[4] = {0, 1, 2, 3};
    auto values = [&](int q) {
        int32x4_t code = vaddq_s32(vld1q_s32(FIRST), vdupq_n_s32(4 * q));
        Floats v = to_floats(vandq_s32(code, vdupq_n_s32(mask)));
        v = multiply(subtract(v, repeat(zero[QUADS ? q : 0])), repeat(scale[QUADS ? q : 0]));
        if constexpr (COUNT == 2) v = round_to_storage<LLMQAT_BFLOAT16>(v);
        else if (stored == LLMQAT_FLOAT16) v = round_to_storage<LLMQAT_FLOAT16>(v);
        return vreinterpretq_u16_f32(v);
    };
    const uint16x8_t a = values(0), b = values(1), c = values(2), d = values(3);
    const Bytes low_ab = vreinterpretq_u8_u16(vuzp1q_u16(a, b)), low_cd = vreinterpretq_u8_u16(vuzp1q_u16(c, d));
    const Bytes high_ab = vreinterpretq_u8_u16(vuzp2q_u16(a, b)), high_cd = vreinterpretq_u8_u16(vuzp2q_u16(c, d));
    const Bytes third = vuzp1q_u8(high_ab, high_cd), fourth = vuzp2q_u8(high_ab, high_cd);
    if constexpr (COUNT == 2) return {{third, fourth}};
    else return {{vuzp1q_u8(low_ab, low_cd), vuzp2q_u8(low_ab, low_cd), third, fourth}};
}

// The table of 16 bfloat16 values: `words`, with `delta` added to all but zeros.
inline Table<2> split_words(const uint16_t* words, int delta) {
    auto moved = [&](const uint16_t* p) {
        const uint16x8_t base = vld1q_u16(p), nonzero = vtstq_u16(base, base);
        return vreinterpretq_u8_u16(vaddq_u16(base, vandq_u16(nonzero, vdupq_n_u16(uint16_t(delta)))));
    };
    const Bytes first = moved(words), last = moved(words + 8);
    return {{vuzp1q_u8(first, last), vuzp2q_u8(first, last)}};
}

// Added to codes below 4, it makes every four of 16 bytes look up four values of their own.
inline Bytes run_of_four() {
    static const uint32_t RUNS[4] = {0, 0x04040404, 0x08080808, 0x0c0c0c0c};
    return vreinterpretq_u8_u32(vld1q_u32(RUNS));
}

template <int COUNT>
inline Table<COUNT> both_halves(const Table<COUNT>& only, const Table<COUNT>&) {
    return only;
}

// The values of the even and of the odd ones of the first (UPPER: last) 8 of 16 codes.
template <bool UPPER, int COUNT>
inline void lookup(const Table<COUNT>& t, Bytes codes, Bytes upper, Floats& even, Floats& odd) {
    auto words = [&](int b) {
        Bytes low = vqtbl1q_u8(t.byte[b], codes), high = vqtbl1q_u8(t.byte[b + 1], codes);
        return vreinterpretq_u32_u8(UPPER ? vzip2q_u8(low, high) : vzip1q_u8(low, high));
    };
    const uint32x4_t high = words(COUNT - 2);
    if constexpr (COUNT == 4) {
        const uint32x4_t low = words(0);
        even = vreinterpretq_f32_u32(vsliq_n_u32(low, high, 16)), odd = vreinterpretq_f32_u32(vsriq_n_u32(high, low, 16));
    } else {
        even = vreinterpretq_f32_u32(vshlq_n_u32(high, 16));
        odd = vreinterpretq_f32_u32(vandq_u32(high, vreinterpretq_u32_u8(upper)));
    }
}

// The codes themselves, in that order.
template <bool UPPER>
inline void widen(Bytes codes, Floats& even, Floats& odd) {
    const Bytes none = vdupq_n_u8(0);
    const uint32x4_t words = vreinterpretq_u32_u8(UPPER ? vzip2q_u8(codes, none) : vzip1q_u8(codes, none));
    even = vcvtq_f32_u32(vandq_u32(words, vdupq_n_u32(0xffff))), odd = vcvtq_f32_u32(vshrq_n_u32(words, 16));
}

}  // namespace
}  // namespace llmqat
