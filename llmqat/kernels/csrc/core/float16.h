// Conversions between float32 and the 16-bit storage dtypes, round to nearest even.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "llmqat.h"

namespace llmqat {

constexpr float bits_to_float(uint32_t bits) { return std::bit_cast<float>(bits); }
constexpr uint32_t float_to_bits(float value) { return std::bit_cast<uint32_t>(value); }
// The bits of |value|. Read as integers they rise with the size: from numbers over infinity to NaN.
constexpr uint32_t size_bits(float value) { return float_to_bits(value) & 0x7fffffffu; }
constexpr uint32_t INFINITY_BITS = 0x7f800000u;

constexpr float from_bfloat16(uint16_t half) { return bits_to_float(uint32_t(half) << 16); }

constexpr uint16_t to_bfloat16(float value) {
    uint32_t bits = float_to_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t(bits >> 16 | 0x40);  // NaN stays NaN
    return uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

inline float from_float16(uint16_t half) {
    uint32_t sign = uint32_t(half & 0x8000) << 16, rest = half & 0x7fff;
    if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000u | (rest & 0x3ff) << 13);
    // The exponent is rebiased by a multiplication, which also normalizes subnormals.
    return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * 0x1p112f));
}

inline uint16_t to_float16(float value) {
    uint32_t bits = float_to_bits(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return uint16_t(sign | 0x7e00);
    if (rest >= 0x477ff000u) return uint16_t(sign | 0x7c00);  // 65520 and more round to infinity
    if (rest < 0x38800000u)  // subnormal: let the float adder round at 2^-24
        return uint16_t(sign | (float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000u));
    return uint16_t(sign | (rest + 0xfffu + (rest >> 13 & 1) - 0x38000000u) >> 13);
}

inline float load(const void* data, int64_t i, int32_t dtype) {
    if (dtype == LLMQAT_FLOAT32) return static_cast<const float*>(data)[i];
    uint16_t half = static_cast<const uint16_t*>(data)[i];
    return dtype == LLMQAT_BFLOAT16 ? from_bfloat16(half) : from_float16(half);
}

inline void store(void* data, int64_t i, int32_t dtype, float value) {
    if (dtype == LLMQAT_FLOAT32) static_cast<float*>(data)[i] = value;
    else static_cast<uint16_t*>(data)[i] = dtype == LLMQAT_BFLOAT16 ? to_bfloat16(value) : to_float16(value);
}

inline float round_to(float value, int32_t dtype) {
    if (dtype == LLMQAT_BFLOAT16) return from_bfloat16(to_bfloat16(value));
    if (dtype == LLMQAT_FLOAT16) return from_float16(to_float16(value));
    return value;
}

}  // namespace llmqat
