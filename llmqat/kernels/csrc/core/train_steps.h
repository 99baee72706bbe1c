// Steps of training as every instruction set offers them (shared/training.inc), and products of tiles, where it has those.
#pragma once

#include "training.h"

namespace llmqat {

using TrainGrid = llmqat_grid;
using Operand = llmqat_operand;
using Product = llmqat_product;

struct TrainSteps {
    // Row n of w_hat.
    void (*fake_quantize)(const TrainGrid&, int64_t n, void* w_hat, int32_t dtype);
    // Row n of ds, and of w_hat unless that is null.
    void (*scale_gradients)(const TrainGrid&, int64_t n, const float* g, float* ds, void* w_hat, int32_t dtype);
};

// One product; null where an instruction set has no tiles.
using Multiply = void (*)(const Operand& a, const Operand& b, const Product& out);

}  // namespace llmqat
