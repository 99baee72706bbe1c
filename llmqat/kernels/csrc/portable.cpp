// Plain C++: runs everywhere, and defines what the other variants compute.
#include <algorithm>
#include <cmath>

#include "matrix.h"

namespace llmqat {
namespace {

#include "rows.inc"
#include "steps.inc"

bool no_tiles(const Matrix&, Path, int64_t) { return false; }

void rows(const Matrix& w, const Input& in, const Output& out, int64_t n0, int64_t n1) {
    (in.path == Path::INTEGER ? integer_rows : float_rows)(w, in, out, n0, n1);
}

constexpr Variant VARIANT = {false, no_tiles, quantize_row, pack_row, rows, &STEPS};

}  // namespace

const Variant* portable_variant() { return &VARIANT; }

}  // namespace llmqat
