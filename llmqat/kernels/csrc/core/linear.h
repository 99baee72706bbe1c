// Layers on packed weights: choose a path, prepare the activations once, compute rows in parallel.
#pragma once

#include "matrix.h"

namespace llmqat {

struct Job {
    const Matrix* w;
    Output out;
};

// Several layers that read one input (q, k, v; gate, up): activations are prepared once, and one parallel region runs
// all rows; a layer of another scheme gets a region of its own. x is (m, in), contiguous in dtype.
void linear(const Job* jobs, int count, const void* x, int64_t m, int32_t dtype);

}  // namespace llmqat
