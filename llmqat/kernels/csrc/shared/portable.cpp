// Plain C++: runs everywhere, and defines what the other variants compute.
#include <algorithm>
#include <cmath>

#include "core/matrix.h"

namespace llmqat {
namespace {

#include "rows.inc"
#include "steps.inc"

bool no_tiles(const Matrix&, Path, int64_t) { return false; }

void rows(const Matrix& w, const Input& in, const Output& out, const Runs& runs) {
    (in.path == Path::INTEGER ? integer_rows : float_rows)(w, in, out, runs);
}

constexpr Variant VARIANT = {false, no_tiles, quantize_row, pack_row, rows, &STEPS};

}  // namespace

const Variant* portable_variant() { return &VARIANT; }

}  // namespace llmqat
