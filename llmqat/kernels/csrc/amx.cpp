// Intel AMX: 16-token tiles. Weights of up to 128 rows by 512 columns are decoded once into tiles that stay in cache
// while all tokens pass. Few tokens go to the AVX-512 kernels, which read memory as fast as it comes.
#include <type_traits>

#include "avx512.h"

namespace llmqat {
namespace {

#include "rows.inc"

constexpr int64_t MAX_ROWS = 128, K_BLOCK = 512;

// Palette 1: tiles 0..3 sums, 4 and 5 activations, 6 and 7 weights. The configuration lives in read-only memory: GCC
// before 13 tells its optimizer that LDTILECFG reads 8 bytes, and drops stores to the rest of one built on the stack.
struct alignas(64) TileConfig {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64);

constexpr TileConfig config(uint16_t a_row_bytes) {
    TileConfig c = {};
    c.palette = 1;
    for (int t = 0; t < 8; ++t) c.row_bytes[t] = 64, c.rows[t] = 16;
    c.row_bytes[4] = c.row_bytes[5] = a_row_bytes;
    c.rows[6] = c.rows[7] = uint8_t(a_row_bytes / 4);
    return c;
}
alignas(64) constexpr TileConfig FULL = config(64), HALF = config(32);

// The intrinsics of GCC 12 do not tell the compiler that a tile load reads memory.
template <int TILE>
inline void load_tile(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(TILE) : "memory");
}
template <int TILE>
inline void store_tile(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(TILE) : "memory");
}
inline void zero_tiles() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// A transposed 16 x 16 block of dwords: `store` gets the dwords r of the 16 vectors that `load` gives.
template <class Load, class Store>
inline void transpose(Load&& load, Store&& store) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = load(i);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + 2 + j]);
            a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + 2 + j]);
        }
    for (int i = 0; i < 4; ++i) {  // a[4 q + i]: column i of each lane, rows 4 q .. 4 q + 3
        __m512i low = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88), high = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xdd);
        __m512i low2 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88);
        __m512i high2 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xdd);
        store(i, _mm512_shuffle_i32x4(low, low2, 0x88));
        store(4 + i, _mm512_shuffle_i32x4(high, high2, 0x88));
        store(8 + i, _mm512_shuffle_i32x4(low, low2, 0xdd));
        store(12 + i, _mm512_shuffle_i32x4(high, high2, 0xdd));
    }
}

// The rows [n0, n1) of one call, padded to whole pairs of tiles by repeating the last row.
struct Block {
    const Matrix& w;
    const Input& in;
    int64_t n0, n1, padded, entries;
    RowScales* rows;
    uint8_t* line;   // decoded rows of 16: (16, line_bytes)
    uint8_t* tiles;  // (padded / 16, K_BLOCK * width / 64, 1024): width bytes a weight
    float* sums;     // (m_pad, padded)

    int64_t row(int64_t n) const { return n0 + n < n1 ? n0 + n : n1 - 1; }

    // Ask the second-level cache for the K_BLOCK columns from k on of row n: the hardware does not foresee such short runs.
    // Inlined, since GCC drops calls that do nothing else.
    __attribute__((always_inline)) void prefetch(int64_t n, int64_t k) const {
        const uint8_t* codes = w.codes + row(n) * w.row_bytes + k * w.bits / 8;
        for (int64_t i = 0; i < K_BLOCK * w.bits / 8; i += 64) __builtin_prefetch(codes + i, 0, 2);
    }
};

constexpr int64_t LINE_BYTES = K_BLOCK * 2 + 64;  // not a power of two: 16 rows share no cache set

Block make_block(const Matrix& w, const Input& in, int64_t n0, int64_t n1, int64_t unit) {
    thread_local Scratch rows, scale, zero, line, tiles, sums;
    Block b = {w, in, n0, n1, round_up(n1 - n0, 32), round_up(units_of(w, unit), 16) + 16, nullptr, nullptr, nullptr, nullptr};
    b.rows = rows.get<RowScales>(size_t(b.padded));
    float* s = scale.get<float>(size_t(b.padded * b.entries));
    float* z = zero.get<float>(size_t(b.padded * b.entries));
    for (int64_t n = 0; n < b.padded; ++n) {
        b.prefetch(n, 0);
        b.rows[n] = {unit, 1, s + n * b.entries, z + n * b.entries};
        expand_scales(w, b.row(n), b.rows[n]);
    }
    b.line = line.get<uint8_t>(size_t(16 * LINE_BYTES));
    b.tiles = tiles.get<uint8_t>(size_t(b.padded * K_BLOCK * 2));
    b.sums = sums.get<float>(size_t(in.m_pad * b.padded));
    return b;
}

// Tiles of the 16 decoded rows in `b.line`, `deep` of them.
void tile_lines(const Block& b, int64_t deep, uint8_t* tiles) {
    for (int64_t t = 0; t < deep; ++t, tiles += 1024)
        transpose([&](int i) { return _mm512_loadu_si512(b.line + i * LINE_BYTES + t * 64); },
                  [&](int r, __m512i row) { _mm512_store_si512(tiles + 64 * r, row); });
}

// Both paths walk the same way: decode K_BLOCK columns, then every pair of token tiles meets every pair of row tiles.
template <class Decode, class Multiply>
void walk(const Block& b, int width, Decode&& decode, Multiply&& multiply) {
    for (int64_t k0 = 0; k0 < b.in.k_pad; k0 += K_BLOCK) {
        int64_t k1 = k0 + K_BLOCK < b.in.k_pad ? k0 + K_BLOCK : b.in.k_pad;
        int64_t deep = (k1 - k0) * width / 64;
        for (int64_t n = 0; n < b.padded; n += 16) {
            for (int64_t r = n; r < n + 16 && k1 < b.w.in; ++r) b.prefetch(r, k1);
            decode(n, k0, k1, b.tiles + n / 16 * deep * 1024);
        }
        for (int64_t m = 0; m < b.in.m_pad; m += 32)
            for (int64_t n = 0; n < b.padded; n += 32)
                multiply(k0, k1, m, n, b.tiles + n / 16 * deep * 1024, deep, b.in.m_pad - m >= 32);
    }
}

void finish(const Block& b, const Output& out, const float* scale) {
    float bias[MAX_ROWS] = {};
    if (b.w.bias)
        for (int64_t n = 0; n < b.n1 - b.n0; ++n) bias[n] = bias_at(b.w, b.n0 + n);
    for (int64_t m = 0; m < b.in.m; ++m)
        for (int64_t n = 0; n < b.n1 - b.n0; n += 16) {
            __m512 sum = _mm512_loadu_ps(b.sums + m * b.padded + n), shift = _mm512_loadu_ps(bias + n);
            sum = scale ? _mm512_fmadd_ps(sum, _mm512_set1_ps(scale[m]), shift) : _mm512_add_ps(sum, shift);
            store_lanes(out, m * out.stride + b.n0 + n, low_lanes(b.n1 - b.n0 - n), sum);
        }
}

template <int BITS>
void bfloat_tiles(const Matrix& w, const Input& in, const Output& out, int64_t n0, int64_t n1) {
    _tile_loadconfig(&FULL);
    Block b = make_block(w, in, n0, n1, bfloat_unit(w));
    const int64_t k_tiles = in.k_pad / 32, plane = in.m_pad / 16 * k_tiles;
    auto decode = [&](int64_t n, int64_t k0, int64_t k1, uint8_t* tiles) {
        for (int r = 0; r < 16; r += 4) {
            const uint8_t* row[4];
            for (int i = 0; i < 4; ++i) row[i] = w.codes + b.row(n + r + i) * w.row_bytes;
            uint8_t* line = b.line + r * LINE_BYTES;
            if (k1 > w.in)
                for (int i = 0; i < 4; ++i) std::memset(line + i * LINE_BYTES, 0, size_t(k1 - k0) * 2);
            each_bfloat<BITS, 4>(w, row, b.rows + n + r, k0, k1 < w.in ? k1 : w.in, [&](int i, int64_t k, __m512i weights) {
                _mm512_storeu_si512(line + i * LINE_BYTES + (k - k0) * 2, weights);
            });
        }
        tile_lines(b, (k1 - k0) / 32, tiles);
    };
    auto multiply = [&](int64_t k0, int64_t, int64_t m, int64_t n, const uint8_t* weights, int64_t deep, bool pair) {
        float* sums = b.sums + m * b.padded + n;
        const int64_t stride = b.padded * 4;
        if (k0 == 0) {
            zero_tiles();
        } else {
            load_tile<0>(sums, stride);
            load_tile<1>(sums + 16, stride);
            if (pair) {
                load_tile<2>(sums + 16 * b.padded, stride);
                load_tile<3>(sums + 16 * b.padded + 16, stride);
            }
        }
        for (int p = 0; p < in.planes; ++p) {
            const uint16_t* x = in.parts + (p * plane + m / 16 * k_tiles + k0 / 32) * 512;
            for (int64_t t = 0; t < deep; ++t) {
                load_tile<4>(x + t * 512, 64);
                load_tile<6>(weights + t * 1024, 64);
                load_tile<7>(weights + (deep + t) * 1024, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                if (pair) {
                    load_tile<5>(x + (k_tiles + t) * 512, 64);
                    _tile_dpbf16ps(2, 5, 6);
                    _tile_dpbf16ps(3, 5, 7);
                }
            }
        }
        store_tile<0>(sums, stride);
        store_tile<1>(sums + 16, stride);
        if (pair) {
            store_tile<2>(sums + 16 * b.padded, stride);
            store_tile<3>(sums + 16 * b.padded + 16, stride);
        }
    };
    walk(b, 2, decode, multiply);
    finish(b, out, nullptr);
    _tile_release();
}

// sums (16 tokens, padded) += exact * scale of its row, for one tile of int32.
inline void add_scaled(const int32_t* exact, __m512 scale, float* sums, int64_t stride, bool first) {
    for (int r = 0; r < 16; ++r) {
        __m512 value = _mm512_cvtepi32_ps(_mm512_load_si512(exact + 16 * r));
        float* at = sums + r * stride;
        _mm512_storeu_ps(at, first ? _mm512_mul_ps(value, scale) : _mm512_fmadd_ps(value, scale, _mm512_loadu_ps(at)));
    }
}

// Units of the tiles: whole groups if 64 divides them, or 32 weights; 16 are too few.
int64_t tile_unit(const Matrix& w) {
    int64_t group = group_size(w);
    return w.groups == 1 || group % 64 == 0 || group == 32 ? group : 16;
}

// Centered codes of rows [n, n + 16) in tiles, columns [k0, k1). Each row's codes become bytes, then dwords of four change
// places.
template <int BITS>
void decode_integers(const Block& b, int64_t n, int64_t k0, int64_t k1, int64_t step, uint8_t* tiles) {
    const Matrix& w = b.w;
    const int64_t unit = b.rows[n].unit;
    const Lanes64<BITS> lanes;
    const SmallUnits<4> spread(unit);
    for (int r = 0; r < 16; ++r) {
        const uint8_t* row = w.codes + b.row(n + r) * w.row_bytes;
        const RowScales& scale = b.rows[n + r];
        for (int64_t k = k0; k < k1; k += 64) {
            int64_t offset = k * BITS / 8, left = (w.in * BITS + 7) / 8 - offset;
            const float* z = scale.zero + (w.groups == 1 ? 0 : k / unit);
            __m512i zero = repeat_bytes(step == 32 ? spread(z) : _mm512_set1_ps(*z));
            __m512i codes = _mm512_sub_epi8(lanes.codes(row + offset, left), zero);
            _mm512_storeu_si512(b.line + r * LINE_BYTES + (k - k0), codes);
        }
    }
    tile_lines(b, (k1 - k0) / 64, tiles);
}

// The same for 4 bits and units of whole tiles: dwords of eight codes change places, half as many, then become bytes.
void decode_nibbles(const Block& b, int64_t n, int64_t k0, int64_t k1, uint8_t* tiles) {
    const Matrix& w = b.w;
    const int64_t row_bytes = (w.in + 1) / 2;
    // Bit 4 i of both dwords of a qword, i = 0 ... 3 and 4 ... 7.
    const __m512i first = _mm512_set1_epi64(0x2c2824200c080400), second = _mm512_set1_epi64(0x3c3834301c181410);
    const __m512i low = _mm512_set1_epi8(15);
    for (int64_t k = k0; k < k1; k += 128, tiles += 2048) {
        alignas(64) float z[2][16];
        for (int t = 0; t < 2; ++t) {
            const int64_t entry = w.groups == 1 ? 0 : (k + 64 * t) / b.rows[n].unit;
            for (int r = 0; r < 16; ++r) z[t][r] = b.rows[n + r].zero[entry];
        }
        const __m512i zero[2] = {repeat_bytes(_mm512_load_ps(z[0])), repeat_bytes(_mm512_load_ps(z[1]))};
        const int64_t left = row_bytes - k / 2;
        transpose(
            [&](int i) {
                const uint8_t* codes = w.codes + b.row(n + i) * w.row_bytes + k / 2;
                return left >= 64 ? line_of<false>(codes, left) : line_of<true>(codes, left);
            },
            [&](int d, __m512i codes) {
                auto centered = [&](__m512i bits) {
                    return _mm512_sub_epi8(_mm512_and_si512(_mm512_multishift_epi64_epi8(bits, codes), low), zero[d / 8]);
                };
                _mm512_store_si512(tiles + 128 * d, centered(first));
                _mm512_store_si512(tiles + 128 * d + 64, centered(second));
            });
    }
}

template <int BITS>
void integer_tiles(const Matrix& w, const Input& in, const Output& out, int64_t n0, int64_t n1) {
    const int64_t unit = tile_unit(w), step = unit == 32 && w.groups > 1 ? 32 : 64;
    _tile_loadconfig(step == 32 ? &HALF : &FULL);
    Block b = make_block(w, in, n0, n1, unit);
    thread_local Scratch scale_scratch;
    const int64_t units = units_of(w, unit), k_tiles = in.k_pad / 64;
    float* scales = scale_scratch.get<float>(size_t(units * b.padded));  // transposed: (units, padded)
    for (int64_t n = 0; n < b.padded; ++n)
        for (int64_t u = 0; u < units; ++u) scales[u * b.padded + n] = b.rows[n].scale[u];
    auto decode = [&](int64_t n, int64_t k0, int64_t k1, uint8_t* tiles) {
        if (BITS == 4 && step == 64) decode_nibbles(b, n, k0, k1, tiles);
        else decode_integers<BITS>(b, n, k0, k1, step, tiles);
    };
    alignas(64) int32_t exact[4][256];
    auto multiply = [&](int64_t k0, int64_t k1, int64_t m, int64_t n, const uint8_t* weights, int64_t deep, bool pair) {
        const int8_t* x = in.q + (m / 16 * k_tiles + k0 / 64) * 1024;
        float* sums = b.sums + m * b.padded + n;
        for (int64_t k = k0; k < k1 && k < w.in;) {  // beyond `in` there are no scales
            int64_t u = w.groups == 1 ? 0 : k / unit, end = w.groups == 1 ? k1 : (u + 1) * unit;
            if (end > k1) end = k1;
            bool first = k == 0;
            zero_tiles();
            for (; k < end; k += step) {
                int64_t t = (k - k0) / 64, half = (k - k0) % 64;
                const uint8_t* tile = weights + t * 1024 + half * 16;
                load_tile<4>(x + t * 1024 + half, 64);
                load_tile<6>(tile, 64);
                load_tile<7>(tile + deep * 1024, 64);
                _tile_dpbssd(0, 4, 6);
                _tile_dpbssd(1, 4, 7);
                if (pair) {
                    load_tile<5>(x + (k_tiles + t) * 1024 + half, 64);
                    _tile_dpbssd(2, 5, 6);
                    _tile_dpbssd(3, 5, 7);
                }
            }
            store_tile<0>(exact[0], 64);
            store_tile<1>(exact[1], 64);
            if (pair) {
                store_tile<2>(exact[2], 64);
                store_tile<3>(exact[3], 64);
            }
            __m512 left = _mm512_loadu_ps(scales + u * b.padded + n), right = _mm512_loadu_ps(scales + u * b.padded + n + 16);
            for (int i = 0; i < (pair ? 2 : 1); ++i) {
                float* at = sums + i * 16 * b.padded;
                add_scaled(exact[2 * i], left, at, b.padded, first);
                add_scaled(exact[2 * i + 1], right, at + 16, b.padded, first);
            }
        }
    };
    walk(b, 1, decode, multiply);
    finish(b, out, in.q_scale);
    _tile_release();
}

void pack_bfloat(const Input& in, int64_t m, const float* row) {
    const int64_t plane = in.m_pad * in.k_pad;
    for (int64_t k = 0; k < in.k_pad; k += 16) {
        uint16_t* to = in.parts + ((m / 16 * (in.k_pad / 32) + k / 32) * 16 + m % 16) * 32 + k % 32;
        split(_mm512_load_ps(row + k), in.planes, to, plane);
    }
}

void pack(const Matrix& w, const Input& in, int64_t m, const float* row) {
    if (!in.tiled) return avx512_variant()->pack(w, in, m, row);
    if (in.path == Path::BFLOAT) return pack_bfloat(in, m, row);
    thread_local Scratch scratch;
    int8_t* codes = scratch.get<int8_t>(size_t(in.k_pad));
    in.q_scale[m] = quantize_lanes(row, in.k_pad, codes);
    for (int64_t k = 0; k < in.k_pad; k += 64)
        std::memcpy(in.q + ((m / 16 * (in.k_pad / 64) + k / 64) * 16 + m % 16) * 64, codes + k, 64);
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
        switch (w.bits) {
            case 2: tiled_rows<2>(w, in, out, n0, end); break;
            case 3: tiled_rows<3>(w, in, out, n0, end); break;
            case 4: tiled_rows<4>(w, in, out, n0, end); break;
            default: tiled_rows<8>(w, in, out, n0, end);
        }
    }
}


}  // namespace

const Variant* amx_variant() {
    static const Variant VARIANT = {true, tiles, quantize_lanes, pack, rows, avx512_variant()->steps, avx512_variant()->fixed};
    return &VARIANT;
}

}  // namespace llmqat
