// AVX-512 with VNNI and BF16. Four row streams a thread keep the memory busy; codes are read once for up to four tokens.
// bfloat16 weights are multiplied in float32: vdpbf16ps has a third of the throughput of the two FMAs that it replaces.
#include "avx512.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

namespace llmqat {
namespace {

#include "rows.inc"
#include "steps.inc"

// Software prefetch runs this far ahead of the codes and of the scales: the streams are many and short for the hardware's.
constexpr int64_t BYTES_AHEAD = 2048, SCALES_AHEAD = 8;

// R rows at a time, each from a run of memory of its own.
template <int R>
struct Rows {
    const uint8_t* row[R];
    int64_t n[R], safe[R];  // `safe` is the row that is read: the last one in place of those beyond the end

    // Row i of each run of [n0, n1).
    void seek(const Matrix& w, int64_t n0, int64_t n1, int64_t i) {
        int64_t span = (n1 - n0 + R - 1) / R, scale_bytes = w.scale_dtype == LLMQAT_FLOAT32 ? 4 : 2;
        for (int r = 0; r < R; ++r) {
            n[r] = n0 + r * span + i;
            safe[r] = n[r] < n1 ? n[r] : n1 - 1;
            row[r] = w.codes + safe[r] * w.row_bytes;
            __builtin_prefetch(static_cast<const char*>(w.scale) + (safe[r] + SCALES_AHEAD) * w.groups * scale_bytes);
        }
    }
};

// The same with the scales of the rows, interleaved so that one pointer finds them.
template <int R>
struct Streams : Rows<R> {
    RowScales scales[R];

    Streams(const Matrix& w, int64_t unit) {
        thread_local Scratch scale_scratch, zero_scratch;
        size_t entries = size_t(round_up(units_of(w, unit), 16) + 16);
        float* scale = scale_scratch.get<float>(entries * R);
        float* zero = zero_scratch.get<float>(entries * R);
        bool small = unit < 128 && w.groups > 1;  // those kernels load the entries of one row by vectors
        // A vector may reach past the last unit, where the codes of the row end.
        std::fill(scale, scale + entries * R, 0.0f);
        std::fill(zero, zero + entries * R, 0.0f);
        for (int r = 0; r < R; ++r)
            scales[r] = small ? RowScales{unit, 1, scale + size_t(r) * entries, zero + size_t(r) * entries}
                              : RowScales{unit, R, scale + r, zero + r};
    }

    void seek(const Matrix& w, int64_t n0, int64_t n1, int64_t i) {
        Rows<R>::seek(w, n0, n1, i);
        if (R == 4 && scales[0].stride == 4) return interleave(w);
        for (int r = 0; r < R; ++r)
            if (scales[r].stride == 1) expand_scales(w, this->safe[r], scales[r]);
            else fill_row_scales(w, this->safe[r], scales[r]);
    }

    void interleave(const Matrix& w) {
        for (int64_t g = 0; g < w.groups; g += 16) {
            __mmask16 mask = low_lanes(w.groups - g);
            __m512 scale[4], zero[4];
            for (int r = 0; r < 4; ++r) {
                scale[r] = load_scales(w, this->safe[r] * w.groups + g, mask);
                zero[r] = load_zeros(w, this->safe[r], g, mask);
            }
            store_interleaved(scale, scales[0].scale + 4 * g);
            store_interleaved(zero, scales[0].zero + 4 * g);
        }
    }
};

// The totals of R rows for one token: y[n] = sum * factor + bias.
template <int R>
void store_rows(const Matrix& w, const Output& out, const Rows<R>& streams, int64_t n1, int64_t m, const __m512* sum,
                float factor) {
    alignas(16) float total[4];
    _mm_store_ps(total, sum_lanes(sum[0], sum[1], sum[R > 2 ? 2 : 0], sum[R > 2 ? 3 : 0]));
    for (int r = 0; r < R && streams.n[r] < n1; ++r)
        store(out.y, m * out.stride + streams.n[r], out.dtype, total[r] * factor + bias_at(w, streams.n[r]));
}

// Four bits in groups of a multiple of 128: 64 bytes are 128 codes, and a shift by 4 j brings code 8 i + j to the low bits
// of lane i, where vpermps looks it up. `pack` put the activations in that order.
bool wide(const Matrix& w) { return w.bits == 4 && (w.groups == 1 || group_size(w) % 128 == 0); }

// (code - zero) * scale for the 16 codes, rounded to bfloat16.
inline __m512 rounded_table(float scale, float zero) {
    const __m512 code = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m512 values = _mm512_mul_ps(_mm512_sub_ps(code, _mm512_set1_ps(zero)), _mm512_set1_ps(scale));
    __m256i half = (__m256i)_mm512_cvtneps_pbh(values);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// The same by a look at what was rounded before. Rounding does not see the exponent: the table of a symmetric scale is
// that of its 7 mantissa bits, in [1, 2), times a power of two.
struct Mantissas {
    alignas(64) float values[128][16];
    Mantissas() {
        for (int m = 0; m < 128; ++m) _mm512_store_ps(values[m], rounded_table(1.0f + float(m) / 128.0f, 8.0f));
    }
    inline __m512 table(float scale) const {
        uint32_t bits = float_to_bits(scale);
        float power = bits_to_float(bits & 0xff800000u);
        if ((bits & 0x7f800000u) == 0) return rounded_table(scale, 8.0f);  // zero or subnormal
        return _mm512_mul_ps(_mm512_load_ps(values[bits >> 16 & 127]), _mm512_set1_ps(power));
    }
};

template <int R, int M>
void wide_block(const Matrix& w, const Input& in, const Output& out, const Streams<R>& streams, int64_t n1, int64_t m0) {
    const float* x = in.x + m0 * in.k_pad;
    static const Mantissas mantissas;
    const float *scale = streams.scales[0].scale, *zero = streams.scales[0].zero;
    const int64_t blocks = w.groups == 1 ? in.k_pad / 128 : streams.scales[0].unit / 128, row_bytes = (w.in + 1) / 2;
    constexpr int CHAINS = M == 1 ? 2 : 1;  // one token has too few sums to hide the latency of an FMA
    __m512 sum[M * CHAINS][R], table[R];
    for (auto& line : sum)
        for (auto& s : line) s = _mm512_setzero_ps();
    int64_t offset = 0;
    auto block = [&](auto tail) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const uint8_t* p = streams.row[r] + offset;
            __m512i codes = tail.value ? _mm512_maskz_loadu_epi8(low_bytes(row_bytes - offset), p) : _mm512_loadu_si512(p);
            if (!tail.value) __builtin_prefetch(p + BYTES_AHEAD);
#pragma GCC unroll 8
            for (int j = 0; j < 8; ++j) {
                __m512 weights = _mm512_permutexvar_ps(j ? _mm512_srli_epi32(codes, unsigned(4 * j)) : codes, table[r]);
#pragma GCC unroll 4
                for (int m = 0; m < M; ++m) {
                    __m512& to = sum[M == 1 ? j % CHAINS : m][r];
                    to = _mm512_fmadd_ps(weights, _mm512_load_ps(x + m * in.k_pad + 16 * j), to);
                }
            }
        }
        offset += 64, x += 128;
    };
    for (int64_t g = 0; g < w.groups; ++g, scale += R, zero += R) {
        for (int r = 0; r < R; ++r) table[r] = w.zero_point ? rounded_table(scale[r], zero[r]) : mantissas.table(scale[r]);
        for (int64_t b = 0; b < blocks - 1; ++b) block(std::false_type());
        if (offset + 64 <= row_bytes) block(std::false_type());
        else block(std::true_type());
    }
    for (int r = 0; r < R && CHAINS == 2; ++r) sum[0][r] = _mm512_add_ps(sum[0][r], sum[CHAINS - 1][r]);
    for (int m = 0; m < M; ++m) store_rows<R>(w, out, streams, n1, m0 + m, sum[m], 1.0f);
}

// M tokens from token m0 on, any bits and groups. Of two bfloat16 in a dword the upper one is a float32 after a mask, the
// lower one after a shift.
template <int BITS, int R, int M>
void bfloat_block(const Matrix& w, const Input& in, const Output& out, const Streams<R>& streams, int64_t n1, int64_t m0) {
    if (BITS == 4 && wide(w)) return wide_block<R, M>(w, in, out, streams, n1, m0);
    const float* x = in.x + m0 * in.k_pad;
    __m512 sum[M][R];
    for (auto& line : sum)
        for (auto& s : line) s = _mm512_setzero_ps();
    each_bfloat<BITS, R>(w, streams.row, streams.scales, 0, w.in, [&](int r, int64_t k, __m512i weights) {
        __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(weights, 16));
        __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(weights, _mm512_set1_epi32(int(0xffff0000))));
        for (int m = 0; m < M; ++m) {
            const float* at = x + m * in.k_pad + k;
            sum[m][r] = _mm512_fmadd_ps(even, _mm512_load_ps(at), sum[m][r]);
            sum[m][r] = _mm512_fmadd_ps(odd, _mm512_load_ps(at + 16), sum[m][r]);
        }
    });
    for (int m = 0; m < M; ++m) store_rows<R>(w, out, streams, n1, m0 + m, sum[m], 1.0f);
}

template <int BITS>
void bfloat_rows(const Matrix& w, const Input& in, const Output& out, int64_t n0, int64_t n1) {
    Streams<4> streams(w, bfloat_unit(w));
    for (int64_t i = 0; i < (n1 - n0 + 3) / 4; ++i) {
        streams.seek(w, n0, n1, i);
        by_tokens(0, in.m, [&](auto count, int64_t m) { bfloat_block<BITS, 4, count.value>(w, in, out, streams, n1, m); });
    }
}

// One step of the integer kernels: a block of codes of one row against M tokens. Four bits step over 128 codes, whose
// even ones are the low nibbles and whose odd ones the high nibbles of 64 bytes; `pack` put the activations in that
// order. Other bits step over 64 codes.
template <int BITS>
struct IntegerStep {
    static constexpr int CODES = BITS == 4 ? 128 : 64, BYTES = CODES * BITS / 8;
    Lanes64<BITS> lanes;

    template <int M, bool TAIL>
    inline void dot(const uint8_t* p, int64_t left, const int8_t* x, int64_t k_pad, __m512i (&total)[M]) const {
        if constexpr (BITS == 4) {
            const __m512i low = _mm512_set1_epi8(15);
            __m512i bytes = TAIL ? _mm512_maskz_loadu_epi8(low_bytes(left), p) : _mm512_loadu_si512(p);
            __m512i even = _mm512_and_si512(bytes, low), odd = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low);
            for (int m = 0; m < M; ++m) {
                total[m] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), even, _mm512_load_si512(x + m * k_pad));
                total[m] = _mm512_dpbusd_epi32(total[m], odd, _mm512_load_si512(x + m * k_pad + 64));
            }
        } else {
            __m512i codes = lanes.codes(p, TAIL ? left : BYTES);
            for (int m = 0; m < M; ++m)
                total[m] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, _mm512_load_si512(x + m * k_pad));
        }
    }
};

// M tokens from token m0 on. Codes are unsigned: a dot product holds zero * sum(x) too much, which comes off in float32,
// exactly, since both are integers below 2^24. Beyond `in` the activations are zero.
template <int BITS, int R, int M, bool SMALL>
void integer_block(const Matrix& w, const Input& in, const Output& out, const Streams<R>& streams, int64_t n1, int64_t m0) {
    using Step = IntegerStep<BITS>;
    const Step step;
    const int64_t unit = streams.scales[0].unit, stride = streams.scales[0].stride, row_bytes = (w.in * BITS + 7) / 8;
    const SmallUnits<Step::CODES / 16> spread(unit);
    const int8_t* x = in.q + m0 * in.k_pad;
    const float* x_sum = in.lane_sum + m0 * (in.k_pad / 4);
    const int64_t sum_stride = in.k_pad / 4;
    __m512 sum[M][R];
    for (auto& line : sum)
        for (auto& s : line) s = _mm512_setzero_ps();
    int64_t offset = 0, entry = 0;
    auto block = [&](auto tail) {
        if (!tail.value)
            for (int r = 0; r < R; ++r) __builtin_prefetch(streams.row[r] + offset + BYTES_AHEAD);
        for (int r = 0; r < R; ++r) {
            __m512i total[M];
            step.template dot<M, tail.value>(streams.row[r] + offset, row_bytes - offset, x, in.k_pad, total);
            const float *s = streams.scales[r].scale + entry, *z = streams.scales[r].zero + entry;
            __m512 scale = SMALL ? spread(s) : _mm512_set1_ps(*s), zero = SMALL ? spread(z) : _mm512_set1_ps(*z);
            for (int m = 0; m < M; ++m) {
                __m512 excess = _mm512_load_ps(x_sum + m * sum_stride);
                sum[m][r] = _mm512_fmadd_ps(_mm512_fnmadd_ps(zero, excess, _mm512_cvtepi32_ps(total[m])), scale, sum[m][r]);
            }
        }
        x += Step::CODES, x_sum += 16, offset += Step::BYTES;
    };
    const int64_t groups = SMALL ? (w.in + Step::CODES - 1) / Step::CODES : w.groups;
    const int64_t blocks = SMALL ? 1 : w.groups == 1 ? (w.in + Step::CODES - 1) / Step::CODES : unit / Step::CODES;
    for (int64_t g = 0; g < groups; ++g, entry += SMALL ? Step::CODES / unit : stride) {
        for (int64_t b = 0; b < blocks - 1; ++b) block(std::false_type());
        if (offset + Step::BYTES <= row_bytes) block(std::false_type());
        else block(std::true_type());
    }
    for (int m = 0; m < M; ++m) store_rows<R>(w, out, streams, n1, m0 + m, sum[m], in.q_scale[m0 + m]);
}

template <int BITS, bool SMALL>
void integer_streams(const Matrix& w, const Input& in, const Output& out, int64_t n0, int64_t n1) {
    Streams<4> streams(w, integer_unit<BITS>(w));
    for (int64_t i = 0; i < (n1 - n0 + 3) / 4; ++i) {
        streams.seek(w, n0, n1, i);
        by_tokens(0, in.m, [&](auto count, int64_t m) { integer_block<BITS, 4, count.value, SMALL>(w, in, out, streams, n1, m); });
    }
}

// Four bits in groups of a multiple of 128. Scales of sixteen groups of a row stay in a register; a permutation spreads one.
template <int R, int M, bool ZEROS>
void integer_wide_block(const Matrix& w, const Input& in, const Output& out, const Rows<R>& rows, int64_t n1, int64_t m0) {
    const int64_t row_bytes = (w.in + 1) / 2, whole = w.groups == 1 ? row_bytes / 64 : group_size(w) / 128;
    const int64_t sum_stride = in.k_pad / 4;
    const int8_t* x = in.q + m0 * in.k_pad;
    const float* x_sum = in.lane_sum + m0 * sum_stride;
    const __m512i low = _mm512_set1_epi8(15);
    __m512 sum[M][R], zero[R];
    for (auto& line : sum)
        for (auto& s : line) s = _mm512_setzero_ps();
    for (auto& z : zero) z = _mm512_set1_ps(float(code_offset(w)));
    const uint8_t* row[R];
    std::copy(rows.row, rows.row + R, row);
    int64_t offset = 0;
    __m512 scale[R];
    auto block = [&](auto tail) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const uint8_t* p = row[r] + offset;
            __m512i bytes = tail.value ? _mm512_maskz_loadu_epi8(low_bytes(row_bytes - offset), p) : _mm512_loadu_si512(p);
            if (!tail.value) __builtin_prefetch(p + BYTES_AHEAD);
            __m512i even = _mm512_and_si512(bytes, low), odd = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low);
#pragma GCC unroll 4
            for (int m = 0; m < M; ++m) {
                __m512i total = _mm512_dpbusd_epi32(_mm512_setzero_si512(), even, _mm512_load_si512(x + m * in.k_pad));
                total = _mm512_dpbusd_epi32(total, odd, _mm512_load_si512(x + m * in.k_pad + 64));
                __m512 excess = _mm512_load_ps(x_sum + m * sum_stride);
                __m512 exact = _mm512_fnmadd_ps(zero[r], excess, _mm512_cvtepi32_ps(total));
                sum[m][r] = _mm512_fmadd_ps(exact, scale[r], sum[m][r]);
            }
        }
        offset += 64, x += 128, x_sum += 16;
    };
    for (int64_t g0 = 0; g0 < w.groups; g0 += 16) {
        __m512 scales[R], zeros[R];
        const __mmask16 mask = low_lanes(w.groups - g0);
        for (int r = 0; r < R; ++r) scales[r] = load_scales(w, rows.safe[r] * w.groups + g0, mask);
        if (ZEROS)
            for (int r = 0; r < R; ++r) zeros[r] = load_zeros(w, rows.safe[r], g0, mask);
        const int64_t groups = w.groups - g0 < 16 ? w.groups - g0 : 16;
        for (int64_t i = 0, g = 0, left = 0; i < groups * whole; ++i, --left) {
            if (left == 0) {
                const __m512i lane = _mm512_set1_epi32(int(g++));
                for (int r = 0; r < R; ++r) scale[r] = _mm512_permutexvar_ps(lane, scales[r]);
                if (ZEROS)
                    for (int r = 0; r < R; ++r) zero[r] = _mm512_permutexvar_ps(lane, zeros[r]);
                left = whole;
            }
            block(std::false_type());
        }
    }
    if (offset < row_bytes) block(std::true_type());
    for (int m = 0; m < M; ++m) store_rows<R>(w, out, rows, n1, m0 + m, sum[m], in.q_scale[m0 + m]);
}

template <bool ZEROS>
void integer_wide(const Matrix& w, const Input& in, const Output& out, int64_t n0, int64_t n1) {
    Rows<4> rows;
    for (int64_t i = 0; i < (n1 - n0 + 3) / 4; ++i) {
        rows.seek(w, n0, n1, i);
        by_tokens(0, in.m, [&](auto count, int64_t m) { integer_wide_block<4, count.value, ZEROS>(w, in, out, rows, n1, m); });
    }
}

template <int BITS>
void integer_rows_vnni(const Matrix& w, const Input& in, const Output& out, int64_t n0, int64_t n1) {
    if constexpr (BITS == 4) {  // whole groups of a multiple of 128 are wide
        if (wide(w)) return (w.zero_point ? integer_wide<true> : integer_wide<false>)(w, in, out, n0, n1);
        integer_streams<BITS, true>(w, in, out, n0, n1);
    } else {
        bool small = w.groups > 1 && integer_unit<BITS>(w) < IntegerStep<BITS>::CODES;
        (small ? integer_streams<BITS, true> : integer_streams<BITS, false>)(w, in, out, n0, n1);
    }
}

void pack_integer(const Matrix& w, const Input& in, int64_t m, const float* row) {
    int8_t* q = in.q + m * in.k_pad;
    float* sums = in.lane_sum + m * (in.k_pad / 4);
    in.q_scale[m] = quantize_lanes(row, in.k_pad, q);
    const __m512i ones = _mm512_set1_epi8(1);
    auto lane_sum = [&](__m512i codes) { return _mm512_dpbusd_epi32(_mm512_setzero_si512(), ones, codes); };
    alignas(64) uint8_t even_bytes[64];
    for (int i = 0; i < 64; ++i) even_bytes[i] = uint8_t(2 * i);
    const __m512i even = _mm512_load_si512(even_bytes), odd = _mm512_add_epi8(even, ones);
    for (int64_t k = 0; k < in.k_pad; k += 128) {
        __m512i a = _mm512_load_si512(q + k), b = _mm512_load_si512(q + k + 64);
        if (w.bits == 4) {
            __m512i low = _mm512_permutex2var_epi8(a, even, b), high = _mm512_permutex2var_epi8(a, odd, b);
            _mm512_store_si512(q + k, low);
            _mm512_store_si512(q + k + 64, high);
            _mm512_store_ps(sums + k / 8, _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(lane_sum(low), ones, high)));
        } else {
            _mm512_store_ps(sums + k / 4, _mm512_cvtepi32_ps(lane_sum(a)));
            _mm512_store_ps(sums + k / 4 + 16, _mm512_cvtepi32_ps(lane_sum(b)));
        }
    }
}

void pack_bfloat(const Matrix& w, const Input& in, int64_t m, const float* row) {
    float* to = in.x + m * in.k_pad;
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const int64_t block = wide(w) ? 128 : 32, ways = block / 16;  // element ways * i + j goes to 16 j + i
    const __m512i index = _mm512_mullo_epi32(lane, _mm512_set1_epi32(int(ways)));
    for (int64_t k = 0; k < in.k_pad; k += block)
        for (int64_t j = 0; j < ways; ++j) _mm512_store_ps(to + k + 16 * j, _mm512_i32gather_ps(index, row + k + j, 4));
}

void pack(const Matrix& w, const Input& in, int64_t m, const float* row) {
    if (in.path == Path::INTEGER) pack_integer(w, in, m, row);
    else if (in.path == Path::BFLOAT) pack_bfloat(w, in, m, row);
}

template <class F>
void by_bits(int bits, F&& f) {
    switch (bits) {
        case 2: return f(std::integral_constant<int, 2>());
        case 3: return f(std::integral_constant<int, 3>());
        case 4: return f(std::integral_constant<int, 4>());
        default: return f(std::integral_constant<int, 8>());
    }
}

bool no_tiles(const Matrix&, Path, int64_t) { return false; }

void rows(const Matrix& w, const Input& in, const Output& out, int64_t n0, int64_t n1) {
    if (in.path == Path::FLOAT) return float_rows(w, in, out, n0, n1);
    by_bits(w.bits, [&](auto bits) {
        (in.path == Path::INTEGER ? integer_rows_vnni<bits.value> : bfloat_rows<bits.value>)(w, in, out, n0, n1);
    });
}

constexpr Variant VARIANT = {true, no_tiles, quantize_lanes, pack, rows, &STEPS};

}  // namespace

const Variant* avx512_variant() { return &VARIANT; }

}  // namespace llmqat
