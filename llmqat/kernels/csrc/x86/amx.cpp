// Intel AMX: 16-token tiles. Weights of up to 128 rows by 512 columns are decoded once into tiles that stay in cache
// while all tokens pass. Few tokens go to the AVX-512 kernels, which read memory as fast as it comes.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "avx512.h"
#include "core/team.h"

namespace llmqat {
namespace {

#include "shared/rows.inc"
#include "amx_tiles.inc"

constexpr int64_t MAX_ROWS = 128, K_DEPTH = 512;

// The rows [n0, n1) of one call, padded to whole pairs of tiles by repeating the last row.
struct TileJob {
    const Matrix& w;
    const Input& in;
    int64_t n0, n1, padded, entries;
    RowScales* rows;
    uint8_t* line;   // decoded rows of 16: (16, line_bytes)
    uint8_t* tiles;  // (padded / 16, K_DEPTH * width / 64, 1024): width bytes a weight
    float* sums;     // (padded / 32, m_pad, 32)

    float* sums_of(int64_t m, int64_t n) const { return sums + (n / 32 * in.m_pad + m) * 32 + n % 32; }

    int64_t row(int64_t n) const { return n0 + n < n1 ? n0 + n : n1 - 1; }

    // Ask the second-level cache for the K_DEPTH columns from k on of row n: the hardware does not foresee such short runs.
    // Inlined, since GCC drops calls that do nothing else.
    __attribute__((always_inline)) void prefetch(int64_t n, int64_t k) const {
        const uint8_t* codes = w.codes + row(n) * w.row_bytes + k * w.bits / 8;
        for (int64_t i = 0; i < K_DEPTH * w.bits / 8; i += 64) __builtin_prefetch(codes + i, 0, 2);
    }
};

constexpr int64_t LINE_BYTES = K_DEPTH * 2 + 64;  // not a power of two: 16 rows share no cache set

TileJob make_tile_job(const Matrix& w, const Input& in, int64_t n0, int64_t n1, int64_t unit) {
    thread_local Scratch rows, scale, zero, line, tiles, sums;
    TileJob b = {w, in, n0, n1, round_up(n1 - n0, 32), round_up(units_of(w, unit), 16) + 16, nullptr, nullptr, nullptr, nullptr};
    b.rows = rows.get<RowScales>(size_t(b.padded));
    float* s = scale.get<float>(size_t(b.padded * b.entries));
    float* z = zero.get<float>(size_t(b.padded * b.entries));
    for (int64_t n = 0; n < b.padded; ++n) {
        b.prefetch(n, 0);
        b.rows[n] = {unit, 1, s + n * b.entries, z + n * b.entries};
        expand_scales(w, b.row(n), b.rows[n]);
    }
    b.line = line.get<uint8_t>(size_t(16 * LINE_BYTES));
    b.tiles = tiles.get<uint8_t>(size_t(b.padded * K_DEPTH * 2));
    b.sums = sums.get<float>(size_t(in.m_pad * b.padded));
    return b;
}

// Tiles of the 16 decoded rows in `b.line`, `deep` of them.
void tile_lines(const TileJob& b, int64_t deep, uint8_t* tiles) {
    for (int64_t t = 0; t < deep; ++t, tiles += 1024)
        transpose([&](int i) { return _mm512_loadu_si512(b.line + i * LINE_BYTES + t * 64); },
                  [&](int r, __m512i row) { _mm512_store_si512(tiles + 64 * r, row); });
}

// What is multiplied at a time: tokens [m0, m1) by rows [n, n + 32), over columns [k0, k1).
struct Part {
    int64_t m0, m1, k0, k1, n;
    const uint8_t* weights;  // the tiles of 16 rows, `deep` of them, then those of the others
    int64_t deep;
    int64_t next_m, next_k;  // the tokens and columns that come next: each pair of row tiles prefetches a quarter of them

    int64_t quarter(int64_t size) const { return n / 32 % 4 * size / 4; }
};

// The loops of both paths: decode K_DEPTH columns, then multiply every `tokens` tokens by every pair of row tiles.
template <class Decode, class Multiply>
void walk(const TileJob& b, int width, int64_t tokens, Decode&& decode, Multiply&& multiply) {
    const int64_t m_pad = b.in.m_pad, k_pad = b.in.k_pad;
    for (int64_t k0 = 0; k0 < k_pad; k0 += K_DEPTH) {
        int64_t k1 = std::min(k0 + K_DEPTH, k_pad);
        int64_t deep = (k1 - k0) * width / 64;
        for (int64_t n = 0; n < b.padded; n += 16) {
            for (int64_t r = n; r < n + 16 && k1 < b.w.in; ++r) b.prefetch(r, k1);
            decode(n, k0, k1, b.tiles + n / 16 * deep * 1024);
        }
        for (int64_t m0 = 0, m1; m0 < m_pad; m0 = m1) {
            m1 = std::min(m0 + tokens, m_pad);
            const int64_t next_k = m1 < m_pad ? k0 : k1 % k_pad;
            for (int64_t n = 0; n < b.padded; n += 32)
                multiply(Part{m0, m1, k0, k1, n, b.tiles + n / 16 * deep * 1024, deep, m1 % m_pad, next_k});
        }
    }
}

void finish(const TileJob& b, const Output& out, const float* scale) {
    float bias[MAX_ROWS] = {};
    if (b.w.bias)
        for (int64_t n = 0; n < b.n1 - b.n0; ++n) bias[n] = bias_at(b.w, b.n0 + n);
    for (int64_t m = 0; m < b.in.m; ++m)
        for (int64_t n = 0; n < b.n1 - b.n0; n += 16) {
            __m512 sum = _mm512_load_ps(b.sums_of(m, n)), shift = _mm512_loadu_ps(bias + n);
            sum = scale ? _mm512_fmadd_ps(sum, _mm512_set1_ps(scale[m]), shift) : _mm512_add_ps(sum, shift);
            store_lanes(out, m * out.stride + b.n0 + n, low_lanes(b.n1 - b.n0 - n), sum);
        }
}

#include "amx_bfloat.inc"
#include "amx_integer.inc"
#include "amx_products.inc"
#include "amx_operands.inc"
#include "amx_attend.inc"
#include "amx_train_attend.inc"
#include "amx_train_attend_back.inc"

void pack(const Matrix& w, const Input& in, int64_t m, const float* row) {
    if (!in.tiled) return avx512_variant()->pack(w, in, m, row);
    (in.path == Path::BFLOAT ? pack_bfloat : pack_integer)(in, m, row);
}

bool tiles(const Matrix& w, Path path, int64_t m) {
    if (path == Path::BFLOAT) return m > 8;
    // Centered codes must fit int8, and a tile holds at least 32 columns of one scale.
    int64_t unit = tile_unit(w);
    return path == Path::INTEGER && m > 8 && !(w.bits == 8 && w.zero_point) && (unit != 16 || w.groups == 1);
}

template <int BITS>
void tiled_rows(const Matrix& w, const Input& in, const Output& out, int64_t n0, int64_t n1) {
    (in.path == Path::INTEGER ? integer_tiles<BITS> : bfloat_tiles<BITS>)(w, in, out, n0, n1);
}

void rows(const Matrix& w, const Input& in, const Output& out, const Runs& runs) {
    if (!in.tiled) return avx512_variant()->rows(w, in, out, runs);
    for (int64_t n0 = runs.begin; n0 < runs.end; n0 += MAX_ROWS) {
        int64_t end = n0 + MAX_ROWS < runs.end ? n0 + MAX_ROWS : runs.end;
        by_bits(w.bits, [&](auto bits) { tiled_rows<bits.value>(w, in, out, n0, end); });
    }
}

}  // namespace

const Variant* amx_variant() {
    static const Steps STEPS = [] {
        Steps steps = *avx512_variant()->steps;
        steps.attend_prefill = attend_tiles;
        return steps;
    }();
    static const Variant VARIANT = {.quantize = quantize_lanes, .pack = pack, .rows = rows, .steps = &STEPS,
                                    .train = avx512_variant()->train, .bfloat = true, .tiles = tiles, .fixed = avx512_variant()->fixed,
                                    .multiply = multiply_tiles, .attend = &ATTEND_TRAINING};
    return &VARIANT;
}

}  // namespace llmqat
