// Plain C++: runs everywhere, and defines what the other variants compute.
#include <algorithm>
#include <cmath>
#include <limits>

#include "core/matrix.h"

namespace llmqat {
namespace {

#include "rows.inc"
#include "steps.inc"
#include "training.inc"

void rows(const Matrix& w, const Input& in, const Output& out, const Runs& runs) {
    (in.path == Path::INTEGER ? integer_rows : float_rows)(w, in, out, runs);
}

constexpr Variant VARIANT = {.quantize = quantize_row, .pack = pack_row, .rows = rows, .steps = &STEPS, .train = &TRAIN_STEPS};

}  // namespace

const Variant* portable_variant() { return &VARIANT; }

}  // namespace llmqat
