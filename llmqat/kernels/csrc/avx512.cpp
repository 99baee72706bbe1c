// AVX-512 with VNNI and BF16. Four row streams a thread keep the memory busy; every row's codes are read once for up to
// four tokens (or parts of tokens).
#include "avx512.h"

#include <type_traits>

namespace llmqat {
namespace {

#include "rows.inc"

// R rows at a time, each from a run of memory of its own, and their scales.
template <int R>
struct Streams {
    const uint8_t* row[R];
    int64_t n[R];
    RowScales scales[R];

    Streams(const Matrix& w, int64_t unit) {
        thread_local Scratch scale_scratch, zero_scratch;
        int64_t entries = round_up(units_of(w, unit), 16) + 16;
        float* scale = scale_scratch.get<float>(size_t(entries * R));
        int32_t* zero = zero_scratch.get<int32_t>(size_t(entries * R));
        for (int r = 0; r < R; ++r) scales[r] = {unit, scale + r * entries, zero + r * entries};
    }

    // Row i of each stream; a row beyond n1 is read as the last one, and not stored.
    void seek(const Matrix& w, int64_t n0, int64_t n1, int64_t i) {
        int64_t span = (n1 - n0 + R - 1) / R;
        for (int r = 0; r < R; ++r) {
            n[r] = n0 + r * span + i;
            int64_t safe = n[r] < n1 ? n[r] : n1 - 1;
            row[r] = w.codes + safe * w.row_bytes;
            expand_scales(w, safe, scales[r]);
        }
    }
};

// V activation vectors from vector v on: whole tokens, each of in.planes parts whose sums are added.
template <int BITS, int R, int V>
void bfloat_block(const Matrix& w, const Input& in, const Output& out, const Streams<R>& streams, int64_t n1, int64_t v) {
    const uint16_t* x = in.parts + v * in.k_pad;
    __m512 sum[R][V];
    for (auto& line : sum)
        for (auto& s : line) s = _mm512_setzero_ps();
    each_bfloat<BITS, R>(w, streams.row, streams.scales, 0, w.in, [&](int r, int64_t k, __m512i weights) {
        for (int j = 0; j < V; ++j)
            sum[r][j] = _mm512_dpbf16_ps(sum[r][j], (__m512bh)weights, (__m512bh)_mm512_load_si512(x + j * in.k_pad + k));
    });
    for (int r = 0; r < R && streams.n[r] < n1; ++r) {
        float bias = bias_at(w, streams.n[r]);
        for (int j = 0; j < V; j += in.planes) {
            __m512 total = sum[r][j];
            for (int p = 1; p < in.planes; ++p) total = _mm512_add_ps(total, sum[r][j + p]);
            store(out.y, (v + j) / in.planes * out.stride + streams.n[r], out.dtype, _mm512_reduce_add_ps(total) + bias);
        }
    }
}

template <int BITS, int R>
void bfloat_streams(const Matrix& w, const Input& in, const Output& out, int64_t n0, int64_t n1, int64_t v0, int64_t v1) {
    Streams<R> streams(w, bfloat_unit(w));
    for (int64_t i = 0; i < (n1 - n0 + R - 1) / R; ++i) {
        streams.seek(w, n0, n1, i);
        for (int64_t v = v0; v < v1;) {
            int64_t left = v1 - v;
            auto block = [&](auto width) {
                bfloat_block<BITS, R, width.value>(w, in, out, streams, n1, v);
                v += width.value;
            };
            if (R == 2 && in.planes == 3) block(std::integral_constant<int, 6>());
            else if (R == 2) block(std::integral_constant<int, 8>());
            else if (in.planes == 3) block(std::integral_constant<int, 3>());
            else if (left >= 4) block(std::integral_constant<int, 4>());
            else if (left >= 2) block(std::integral_constant<int, 2>());
            else block(std::integral_constant<int, 1>());
        }
    }
}

template <int BITS>
void bfloat_rows(const Matrix& w, const Input& in, const Output& out, int64_t n0, int64_t n1) {
    int64_t vectors = in.m * in.planes, wide = in.planes == 3 ? 6 : 8, split = vectors / wide * wide;
    if (split) bfloat_streams<BITS, 2>(w, in, out, n0, n1, 0, split);
    if (split < vectors) bfloat_streams<BITS, 4>(w, in, out, n0, n1, split, vectors);
}

// M tokens from token m0 on. Codes are unsigned, so a dot product carries zero * sum(x); the second sum takes it off,
// in integers. Beyond `in` the activations are zero and the codes arbitrary.
template <int BITS, int R, int M>
void integer_block(const Matrix& w, const Input& in, const Output& out, const Streams<R>& streams, int64_t n1, int64_t m0) {
    const Lanes64<BITS> lanes;
    int64_t unit = streams.scales[0].unit;
    bool small = unit < 64 && w.groups > 1;
    const SmallUnits spread(unit);
    __m512 sum[R][M];
    for (auto& line : sum)
        for (auto& s : line) s = _mm512_setzero_ps();
    for (int64_t k = 0, u = 0; k < w.in; u += small ? 64 / unit : 1) {
        int64_t end = w.groups == 1 ? w.in : k + (small ? 64 : unit);
        __m512i total[R][M], excess[R][M], zero[R];
        for (int r = 0; r < R; ++r) {
            const int32_t* z = streams.scales[r].zero + u;
            zero[r] = repeat_bytes(small ? spread.zeros(z) : _mm512_set1_epi32(*z));
            for (int m = 0; m < M; ++m) total[r][m] = excess[r][m] = _mm512_setzero_si512();
        }
        for (; k < end; k += 64) {
            int64_t offset = k * BITS / 8, left = (w.in * BITS + 7) / 8 - offset;
            for (int r = 0; r < R; ++r) {
                const uint8_t* p = streams.row[r] + offset;
                if (BITS == 8 || (k & 127) == 0) _mm_prefetch(reinterpret_cast<const char*>(p + 2048), _MM_HINT_T0);
                __m512i codes = lanes.codes(p, left);
                for (int m = 0; m < M; ++m) {
                    __m512i x = _mm512_load_si512(in.q + (m0 + m) * in.k_pad + k);
                    total[r][m] = _mm512_dpbusd_epi32(total[r][m], codes, x);
                    excess[r][m] = _mm512_dpbusd_epi32(excess[r][m], zero[r], x);
                }
            }
        }
        k = end;
        for (int r = 0; r < R; ++r) {
            const float* s = streams.scales[r].scale + u;
            __m512 scale = small ? spread.scales(s) : _mm512_set1_ps(*s);
            for (int m = 0; m < M; ++m) {
                __m512 exact = _mm512_cvtepi32_ps(_mm512_sub_epi32(total[r][m], excess[r][m]));
                sum[r][m] = _mm512_fmadd_ps(exact, scale, sum[r][m]);
            }
        }
    }
    for (int r = 0; r < R && streams.n[r] < n1; ++r) {
        float bias = bias_at(w, streams.n[r]);
        for (int m = 0; m < M; ++m)
            store(out.y, (m0 + m) * out.stride + streams.n[r], out.dtype,
                  _mm512_reduce_add_ps(sum[r][m]) * in.q_scale[m0 + m] + bias);
    }
}

template <int BITS>
void integer_rows_vnni(const Matrix& w, const Input& in, const Output& out, int64_t n0, int64_t n1) {
    Streams<4> streams(w, integer_unit(w));
    for (int64_t i = 0; i < (n1 - n0 + 3) / 4; ++i) {
        streams.seek(w, n0, n1, i);
        int64_t m = 0;
        for (; m + 2 <= in.m; m += 2) integer_block<BITS, 4, 2>(w, in, out, streams, n1, m);
        if (m < in.m) integer_block<BITS, 4, 1>(w, in, out, streams, n1, m);
    }
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

constexpr Variant VARIANT = {"avx512", true, no_tiles, rows, quantize_lanes};

}  // namespace

const Variant* avx512_variant() { return &VARIANT; }

}  // namespace llmqat
