// Intel AMX: 16-token tiles. Weights of up to 128 rows by 512 columns are decoded once into tiles that stay in cache
// while all tokens pass. Few tokens go to the AVX-512 kernels, which read memory as fast as it comes.
#include <algorithm>
#include <type_traits>

#include "avx512.h"

namespace llmqat {
namespace {

#include "rows.inc"

constexpr int64_t MAX_ROWS = 128, K_BLOCK = 512;

// Palette 1: tiles 0..3 sums, 4 and 5 activations, 6 and 7 weights; with HALF 0 and 1, 2 and 3, 4..7. The configuration lives in read-only memory: GCC
// before 13 tells its optimizer that LDTILECFG reads 8 bytes, and drops stores to the rest of one built on the stack.
struct alignas(64) TileConfig {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64);

constexpr TileConfig config(uint16_t columns) {
    TileConfig c = {};
    c.palette = 1;
    for (int t = 0; t < 8; ++t) c.row_bytes[t] = 64, c.rows[t] = 16;
    if (columns == 64) return c;
    c.row_bytes[2] = c.row_bytes[3] = columns;
    for (int t = 4; t < 8; ++t) c.rows[t] = uint8_t(columns / 4);
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
__attribute__((always_inline)) inline void prefetch_tile_quarter(const void* at) {
    for (int i = 0; i < 256; i += 64) __builtin_prefetch(static_cast<const char*>(at) + i, 0, 2);
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
    float* sums;     // (padded / 32, m_pad, 32)

    float* sums_of(int64_t m, int64_t n) const { return sums + (n / 32 * in.m_pad + m) * 32 + n % 32; }

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

// What meets at a time: tokens [m0, m1), columns [k0, k1), rows [n, n + 32), whose decoded tiles are at `weights` and 1024 *
// `deep` bytes behind. Which tokens and columns come after it the second-level cache is asked for, each rows for a quarter.
struct Part {
    int64_t m0, m1, k0, k1, n, deep, next_m, next_k;
    const uint8_t* weights;

    int64_t quarter(int64_t size) const { return n / 32 % 4 * size / 4; }
};

// Both paths walk the same way: decode K_BLOCK columns, then every `tokens` tokens meet every pair of row tiles.
template <class Decode, class Multiply>
void walk(const Block& b, int width, int64_t tokens, Decode&& decode, Multiply&& multiply) {
    const int64_t m_pad = b.in.m_pad, k_pad = b.in.k_pad;
    for (int64_t k0 = 0; k0 < k_pad; k0 += K_BLOCK) {
        int64_t k1 = std::min(k0 + K_BLOCK, k_pad);
        int64_t deep = (k1 - k0) * width / 64;
        for (int64_t n = 0; n < b.padded; n += 16) {
            for (int64_t r = n; r < n + 16 && k1 < b.w.in; ++r) b.prefetch(r, k1);
            decode(n, k0, k1, b.tiles + n / 16 * deep * 1024);
        }
        for (int64_t m0 = 0, m1; m0 < m_pad; m0 = m1) {
            m1 = std::min(m0 + tokens, m_pad);
            const int64_t next_k = m1 < m_pad ? k0 : k1 % k_pad;
            for (int64_t n = 0; n < b.padded; n += 32)
                multiply(Part{m0, m1, k0, k1, n, deep, m1 % m_pad, next_k, b.tiles + n / 16 * deep * 1024});
        }
    }
}

void finish(const Block& b, const Output& out, const float* scale) {
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

template <int BITS>
void bfloat_tiles(const Matrix& w, const Input& in, const Output& out, int64_t n0, int64_t n1) {
    _tile_loadconfig(&FULL);
    Block b = make_block(w, in, n0, n1, bfloat_unit(w));
    const int64_t k_tiles = in.k_pad / 32;
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
    auto multiply = [&](const Part& part) {
        float* sums = b.sums_of(part.m0, part.n);
        const int64_t stride = 128;
        const bool pair = part.m1 - part.m0 > 16;
        if (part.k0 == 0) {
            zero_tiles();
        } else {
            load_tile<0>(sums, stride);
            load_tile<1>(sums + 16, stride);
            if (pair) {
                load_tile<2>(sums + 16 * 32, stride);
                load_tile<3>(sums + 16 * 32 + 16, stride);
            }
        }
        auto tokens = [&](int plane, int64_t m, int64_t k) {
            return in.parts + ((plane * in.m_pad + m) / 16 * k_tiles + k / 32) * 512;
        };
        for (int p = 0; p < in.planes; ++p) {
            const uint16_t *x = tokens(p, part.m0, part.k0), *next = tokens(p, part.next_m, part.next_k) + part.quarter(512);
            for (int64_t t = 0; t < part.deep; ++t) {
                prefetch_tile_quarter(next + t * 512);
                prefetch_tile_quarter(next + (k_tiles + t) * 512);
                load_tile<4>(x + t * 512, 64);
                load_tile<6>(part.weights + t * 1024, 64);
                load_tile<7>(part.weights + (part.deep + t) * 1024, 64);
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
            store_tile<2>(sums + 16 * 32, stride);
            store_tile<3>(sums + 16 * 32 + 16, stride);
        }
    };
    walk(b, 2, 32, decode, multiply);
    finish(b, out, nullptr);
    _tile_release();
}

// What tiles 0 and 1 have stored, 16 tokens by 16 rows each, and where it belongs.
struct Stored {
    int32_t *exact, *spare;  // (2, 16, 16), and as much for the next
    float* sums;             // (16, 32)
    const float* scales;
};

// sums += exact * scale, of one of the two tiles.
template <int TILE>
inline void add_scaled(const Stored& s) {
    const __m512 scale = _mm512_loadu_ps(s.scales + 16 * TILE);
    for (int r = 0; r < 16; ++r) {
        const __m512 value = _mm512_cvtepi32_ps(_mm512_load_si512(s.exact + 256 * TILE + 16 * r));
        float* at = s.sums + 32 * r + 16 * TILE;
        _mm512_store_ps(at, _mm512_fmadd_ps(value, scale, _mm512_load_ps(at)));
    }
}

// Columns of one scale.
struct Columns {
    const int8_t *x, *next;       // their tiles in the first 16 tokens, and in the tokens that come next
    int64_t x_stride;             // from two tiles to the next two
    const uint8_t *left, *right;  // their tiles in both halves of the rows
    int64_t tile_bytes, pairs;
};

// How many they are: those of one or two tiles stay in tiles 4..7 while all tokens pass.
enum class Span { TILE, PAIR, PAIRS };

// `tokens` times `c`, for `sums` and `scales`. While the tiles multiply, the vector units scale the sums before theirs;
// `waiting` are the last ones.
template <Span SPAN>
void multiply_columns(const Columns& c, int64_t tokens, float* sums, const float* scales, Stored& waiting) {
    Stored last = waiting;
    auto load_weights = [&](int64_t pair) {
        load_tile<4>(c.left + pair * 2048, 64);
        load_tile<6>(c.right + pair * 2048, 64);
        if (SPAN == Span::TILE) return;
        load_tile<5>(c.left + pair * 2048 + c.tile_bytes, 64);
        load_tile<7>(c.right + pair * 2048 + c.tile_bytes, 64);
    };
    auto multiply = [&](const int8_t* x, const int8_t* next) {
        prefetch_tile_quarter(next);
        load_tile<2>(x, 64);
        _tile_dpbssd(0, 2, 4);
        _tile_dpbssd(1, 2, 6);
        if (SPAN == Span::TILE) return;
        prefetch_tile_quarter(next + 1024);
        load_tile<3>(x + 1024, 64);
        _tile_dpbssd(0, 3, 5);
        _tile_dpbssd(1, 3, 7);
    };
    if (SPAN != Span::PAIRS) load_weights(0);
    for (int64_t m = 0; m < tokens; m += 16) {
        _tile_zero(0);
        _tile_zero(1);
        if (SPAN != Span::PAIRS) multiply(c.x + m * 128, c.next + m * 128);
        else
            for (int64_t i = 0; i < c.pairs; ++i) {
                load_weights(i);
                multiply(c.x + m * 128 + i * c.x_stride, c.next + m * 128 + i * c.x_stride);
            }
        const Stored now = {last.spare, last.exact, sums + m * 32, scales};
        add_scaled<0>(last);
        store_tile<0>(now.exact, 64);
        add_scaled<1>(last);
        store_tile<1>(now.exact + 256, 64);
        last = now;
    }
    waiting = last;
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
    const int64_t units = units_of(w, unit);
    float* scales = scale_scratch.get<float>(size_t(units * b.padded));  // transposed: (units, padded)
    for (int64_t n = 0; n < b.padded; ++n)
        for (int64_t u = 0; u < units; ++u) scales[u * b.padded + n] = b.rows[n].scale[u];
    auto decode = [&](int64_t n, int64_t k0, int64_t k1, uint8_t* tiles) {
        if (BITS == 4 && step == 64) decode_nibbles(b, n, k0, k1, tiles);
        else decode_integers<BITS>(b, n, k0, k1, step, tiles);
    };
    alignas(64) int32_t exact[2][512] = {};
    alignas(64) float nowhere[512] = {};
    Stored waiting = {exact[0], exact[1], nowhere, nowhere};
    auto multiply = [&](const Part& part) {
        const int64_t tokens = part.m1 - part.m0, k1 = std::min(part.k1, w.in);  // beyond `in` there are no scales
        float* sums = b.sums_of(part.m0, part.n);
        if (part.k0 == 0) std::fill(sums, sums + tokens * 32, 0.0f);
        for (int64_t k = part.k0, end; k < k1; k = end) {
            const int64_t u = w.groups == 1 ? 0 : k / unit, left = (w.groups == 1 ? k1 : std::min((u + 1) * unit, k1)) - k;
            const int64_t pairs = k % 128 || left <= step ? 0 : std::max<int64_t>(left / 128, 1);
            end = k + std::min(left, pairs ? pairs * 128 : step);
            const int64_t slice = in.m_pad * 128, in_slice = k % 128 / 64 * 1024 + k % 64;
            const uint8_t* tiles = part.weights + (k - part.k0) / 64 * 1024 + k % 64 * 16;
            const Columns columns = {in.q + k / 128 * slice + part.m0 * 128 + in_slice,
                                     in.q + (k - part.k0 + part.next_k) / 128 * slice + part.next_m * 128 + part.quarter(1024),
                                     slice, tiles, tiles + part.deep * 1024, 16 * step, pairs};
            auto multiply_them = pairs == 0   ? multiply_columns<Span::TILE>
                                 : pairs == 1 ? multiply_columns<Span::PAIR>
                                              : multiply_columns<Span::PAIRS>;
            multiply_them(columns, tokens, sums, scales + u * b.padded + part.n, waiting);
        }
    };
    walk(b, 1, 128, decode, multiply);
    add_scaled<0>(waiting);
    add_scaled<1>(waiting);
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
        std::memcpy(in.q + (((k / 128 * in.m_pad / 16 + m / 16) * 2 + k / 64 % 2) * 16 + m % 16) * 64, codes + k, 64);
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
