"""The end of a run in a forecast: what was trained makes room for the packed model, see `llmqat.pipeline.proof`."""

import torch
from transformers import PreTrainedModel

from llmqat.config import Resolved
from llmqat.forecast.cost import Cost, Stage
from llmqat.formats import decoding
from llmqat.formats.dense import MADE_AT_ONCE
from llmqat.formats.verify import PROBES
from llmqat.metrics.perplexity import BATCH_TOKENS
from llmqat.models.coverage import CoverageReport, total_parameters

# A token that is decoded takes as long as so many in an evaluation: a Llama of 135 M parameters, bfloat16, two threads.
DECODED = 64
FLOAT32, FLOAT64 = 4, 8  # bytes


def packed_bytes(model: PreTrainedModel, coverage: CoverageReport, stored: torch.dtype, float_bytes: int) -> float:
    """Bytes of the packed model, `float_bytes` for each parameter that is not on the grid."""
    floats = total_parameters(model) - sum(layer.parameters for layer in coverage.quantized)
    return coverage.packed_bits(stored.itemsize * 8) / 8 + float_bytes * floats


def of_packed(
    recipe: Resolved, model: PreTrainedModel, coverage: CoverageReport, stored: torch.dtype, batch: Cost
) -> Cost:
    """The cost of a scored batch of the packed model, beside the float model's output head; in a run with low memory,
    beside what was trained."""
    if recipe.low_memory:
        floats = total_parameters(model) - sum(layer.parameters for layer in coverage.quantized)
        held = batch.held + FLOAT32 * floats
    else:
        text = model.config.get_text_config()
        held = packed_bytes(model, coverage, stored, FLOAT32) + stored.itemsize * text.vocab_size * text.hidden_size
    return Cost(batch.flops, held, held + batch.peak - batch.held)


def verification(model: PreTrainedModel, coverage: CoverageReport, packed: Cost) -> Stage:
    """Probes of the packed model and of its dense copies, and what it decodes, beside the rows of one matrix."""
    text, (probes, length) = model.config.get_text_config(), PROBES
    decoded = decoding.PROBES * (decoding.PROMPT + decoding.NEW_TOKENS)
    # Logits behind a cache and without one, of plain torch and, while they are put together twice, in float64.
    logits = (FLOAT32 * decoding.PROBES * decoding.NEW_TOKENS + 2 * (FLOAT32 + FLOAT64) * decoded) * text.vocab_size
    at_head = logits + FLOAT64 * min(MADE_AT_ONCE, text.vocab_size * text.hidden_size)
    layer = max(coverage.quantized, key=lambda layer: layer.parameters)
    weights = min(MADE_AT_ONCE, layer.parameters)
    at_layer = FLOAT64 * (weights + 2 * length * (max(layer.shape) + text.hidden_size))  # in the middle of an MLP
    flops = packed.flops / BATCH_TOKENS * (4 * probes * length + 6 * decoded + 3 * DECODED * decoding.NEW_TOKENS)
    return Stage("verification", flops, torch.float32, packed.held + max(at_head, at_layer))


def throughput(
    recipe: Resolved, model: PreTrainedModel, coverage: CoverageReport, stored: torch.dtype, batch: Cost
) -> Stage:
    """Prompts and greedy decoding of the float model, and then of the packed one, each alone in its stored dtype."""
    config = recipe.eval
    tokens = 2 * (config.repeats + 1) * (config.prompt + DECODED * config.new_tokens)
    held = max(stored.itemsize * total_parameters(model), packed_bytes(model, coverage, stored, stored.itemsize))
    widest = max(max(layer.shape) for layer in coverage.quantized)
    logits = FLOAT32 * model.config.get_text_config().vocab_size  # of the last token
    activations = 4 * (stored.itemsize * config.prompt * widest + logits)  # of an MLP, and while a token is chosen
    return Stage("throughput", batch.flops / BATCH_TOKENS * tokens, torch.float32, held + activations)
