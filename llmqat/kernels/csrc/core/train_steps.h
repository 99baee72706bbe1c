// Steps of training as every instruction set offers them (shared/training.inc), and products of tiles, where it has those.
#pragma once

#include "training.h"

namespace llmqat {

using AdapterSums = llmqat_adapter_sums;
using TrainGrid = llmqat_grid;
using Operand = llmqat_operand;
using Product = llmqat_product;
using TrainNorm = llmqat_rms_norm;
using TrainGate = llmqat_gate;
using Rotation = llmqat_rotation;
using TokenLosses = llmqat_token_losses;
using StateErrors = llmqat_state_errors;

constexpr int64_t SUMS_ROWS = 8;  // whose sums of adapters are made together

struct TrainSteps {
    // Rows [first, last) of the sums.
    void (*sum_adapters)(const AdapterSums&, int64_t first, int64_t last);
    // Row n of w_hat.
    void (*fake_quantize)(const TrainGrid&, int64_t n, void* w_hat, int32_t dtype);
    // Row n of ds, of g, and of w_hat unless that is null.
    void (*grid_gradients)(const TrainGrid&, int64_t n, float* g, float* ds, void* w_hat, int32_t dtype);
    // Rows [first, last) of y and inverse; of dx, while their part of dweight is added to `dweight` unless that is null.
    void (*norm)(const TrainNorm&, int64_t first, int64_t last);
    void (*norm_back)(const TrainNorm&, int64_t first, int64_t last, float* dweight);
    // Row n of y; of dgate and dup.
    void (*gate)(const TrainGate&, int64_t n);
    void (*gate_back)(const TrainGate&, int64_t n);
    // All heads of one place of a sequence.
    void (*rotate)(const Rotation&, int64_t sequence, int64_t place);
    // The loss of one token and its gradient; the error of one state and its gradient.
    void (*token_loss)(const TokenLosses&, int64_t token);
    void (*state_error)(const StateErrors&, int64_t token);
};

// One product; null where an instruction set has no tiles.
using Multiply = void (*)(const Operand& a, const Operand& b, const Product& out);

using TrainAttention = llmqat_attention;
using AttentionGradients = llmqat_attention_gradients;

// Attention in tiles; null without.
struct AttendTraining {
    // Queries [first, last) of the heads that share the keys and values `kv` of a sequence.
    void (*forward)(const TrainAttention&, int64_t sequence, int64_t kv, int64_t first, int64_t last);
    // All of them: the gradients of these keys and values, and of their queries.
    void (*backward)(const TrainAttention&, const AttentionGradients&, int64_t sequence, int64_t kv);
};

}  // namespace llmqat
