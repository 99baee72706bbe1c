// AVX-512 with VNNI and BF16.
#include "avx512.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <type_traits>

namespace llmqat {
namespace {

#include "shared/rows.inc"
#include "shared/steps.inc"
#include "shared/training.inc"
#include "avx512_rows.inc"
#include "avx512_bfloat_fixed.inc"
#include "avx512_bfloat.inc"
#include "avx512_integer.inc"

void pack(const Matrix& w, const Input& in, int64_t m, const float* row) {
    if (in.path == Path::INTEGER) return pack_integer(w, in, m, row);
    if (in.path != Path::BFLOAT) return;
    if (!in.fixed.x) pack_bfloat(w, in, m, row);
    else if (!pack_fixed(w, in, m, row)) *in.fixed.too_coarse = true;
}

void rows(const Matrix& w, const Input& in, const Output& out, const Runs& runs) {
    if (in.path == Path::FLOAT) return float_rows(w, in, out, runs);
    if (in.fixed.x) return (w.bits == 4 ? fixed_rows<4> : fixed_rows<8>)(w, in, out, runs);
    by_bits(w.bits, [&](auto bits) {
        (in.path == Path::INTEGER ? integer_rows_vnni<bits.value> : bfloat_rows<bits.value>)(w, in, out, runs);
    });
}

constexpr Variant VARIANT = {
    .quantize = quantize_lanes, .pack = pack, .rows = rows, .steps = &STEPS, .train = &TRAIN_STEPS, .bfloat = true, .fixed = fixed};

}  // namespace

const Variant* avx512_variant() { return &VARIANT; }

}  // namespace llmqat
