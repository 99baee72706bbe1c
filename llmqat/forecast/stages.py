"""The stages of a run with their time and their peak of memory, and what they add up to."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedModel

from llmqat.algorithms.blocks import HESSIAN_BYTES
from llmqat.algorithms.blockwise import CHECKS, HELD_OUT_EVERY, Blockwise
from llmqat.algorithms.gptq_model import GptqSettings
from llmqat.config import Resolved
from llmqat.forecast.cost import Cost, Stage, cost_of, scored_batch, training_step
from llmqat.forecast.ending import of_packed, throughput, verification
from llmqat.forecast.shapes import block_count, expert_count, has_like_blocks
from llmqat.metrics.layer_error import STRIDE
from llmqat.metrics.perplexity import BATCH_TOKENS
from llmqat.models.architectures import ARCHITECTURES, blocks_of, whole_runs
from llmqat.models.coverage import CoverageReport, LayerCoverage, total_parameters
from llmqat.models.experts import EXPERT, fused_experts
from llmqat.models.output_head import CHUNK_LOGITS
from llmqat.models.sensitivity import MEASURED_TOKENS, TOGETHER, candidates

# Resident memory of a process that has imported everything and read its text, without a model.
PROCESS_BYTES = 500_000_000
# Share of a stage's time that its matrix products would take alone, of CPU time on an AMD EPYC, one thread and torch
# 2.13: evaluation 0.35 to 0.49 for the bundled Llama, 0.59 to 0.62 for SmolLM2-135M; training 0.27 to 0.38.
EFFICIENCY = {torch.float32: 0.5, torch.bfloat16: 0.33}
MASTER = 4  # bytes of a float32 weight
AUTO_ROUND_STEPS, AUTO_ROUND_SEQUENCES = 200, 8  # its defaults
SCORING_CHUNKS = 2  # as large as a chunk of logits, alive at once while tokens are scored


@dataclass(frozen=True)
class Forecast:
    """Time and memory of a run.

    Attributes:
        stages: in order.
    """

    stages: tuple[Stage, ...]

    @property
    def worst(self) -> Stage:
        """The stage of the highest peak."""
        return max(self.stages, key=lambda stage: stage.bytes)

    def seconds(self, speed: Callable[[torch.dtype], float]) -> list[float]:
        """Seconds of each stage on a device of `speed` operations a second."""
        return [stage.flops / (EFFICIENCY[stage.dtype] * speed(stage.dtype)) for stage in self.stages]


def is_predictable(model: PreTrainedModel) -> bool:
    """Whether tensors without values can run through `model`, and soon: which expert a token goes to depends on its
    values, but where all blocks have experts alike, and few stand for all, even shares will do."""
    experts = fused_experts(model)
    return not experts or (has_like_blocks(model) and len(experts) == block_count(model) and bool(expert_count(model)))


def reached(model: PreTrainedModel) -> Callable[[LayerCoverage], float]:
    """Gives the share of all tokens that reach a layer: of experts, the same for each."""
    experts = expert_count(model)
    share = model.config.get_text_config().num_experts_per_tok / experts if experts else 1.0
    return lambda layer: share if EXPERT.search(layer.name) else 1.0


def forecast(
    recipe: Resolved, model: PreTrainedModel, coverage: CoverageReport, stored: torch.dtype, train: bool = True
) -> Forecast:
    """Predict the stages of `finetune`, or of `quantize` where `train` is False, of a model that `is_predictable`.

    Args:
        recipe: of the run.
        model: on the meta device.
        coverage: its plan.
        stored: dtype of its files.
        train: whether it trains.
    """
    batch = cost_of(scored_batch, model, recipe, coverage, stored)
    score = partial(evaluation, recipe, model, batch)
    stages = [] if recipe.low_memory else [loading(recipe, model, stored, batch)]
    if recipe.quant.average_bits is not None:
        stages.append(sensitivity(recipe, model, coverage, batch, stored))
    stages += [score("float model"), score("round to nearest")]
    if recipe.init.by_blocks:
        stages += [gptq(recipe, model, coverage, batch), *reconstruction(recipe, model, coverage, batch)]
    if recipe.init.variant != "rtn":
        stages.append(score("first codes"))
    for name in recipe.eval.other_tools:
        stages += [other_tool(name, recipe, model, coverage, batch), score(name)]
    if train:
        stages += [training(recipe, cost_of(training_step, model, recipe, coverage, stored), batch), score("trained")]
    stages += ending(recipe, model, coverage, batch, stored)
    always = PROCESS_BYTES + kept_of_float(recipe, model, coverage) - left_in_files(recipe, model, coverage, stored)
    return Forecast(tuple(stage._replace(bytes=stage.bytes + always) for stage in stages))


def loading(recipe: Resolved, model: PreTrainedModel, stored: torch.dtype, batch: Cost) -> Stage:
    """The model before it is on its grid, see `load_as_stored`; where it is smoothed, with activations of a batch."""
    parameters = total_parameters(model)
    if recipe.init.smooth is not None:
        tokens = recipe.init.samples * recipe.data.length
        peak = MASTER * parameters + batch.peak - batch.held
        return Stage("SmoothQuant", batch.flops * tokens / BATCH_TOKENS, torch.float32, peak)
    as_stored = model.config.model_type in ARCHITECTURES
    return Stage("loading", 0, torch.float32, (min(MASTER, stored.itemsize) if as_stored else MASTER) * parameters)


def sensitivity(
    recipe: Resolved, model: PreTrainedModel, coverage: CoverageReport, batch: Cost, stored: torch.dtype
) -> Stage:
    """Forward, and backward without gradients of weights, of the tokens that layers are measured on; and a product of
    every layer for each number of bits."""
    assert recipe.quant.average_bits is not None
    passes = 2 + len(candidates(recipe.quant.average_bits))
    flops = batch.flops * MEASURED_TOKENS / BATCH_TOKENS * passes
    # Five bytes for each input and output of a layer: some have 16 bits, and norms and attention keep theirs, too.
    activations = 5 * TOGETHER * sum(sum(layer.shape) for layer in coverage.quantized)
    peak = stored.itemsize * total_parameters(model) + activations
    return Stage("bits of each layer", flops, torch.bfloat16, peak)


def left_in_files(recipe: Resolved, model: PreTrainedModel, coverage: CoverageReport, stored: torch.dtype) -> float:
    """Bytes of the blocks' weights, and of what GPTQ adds to them, that a run with low memory has not in memory: those
    of all blocks but one."""
    blocks = block_count(model)
    if not recipe.low_memory or blocks is None:
        return 0
    weights = sum(layer.parameters for layer in coverage.quantized if not layer.role)
    of_weight = stored.itemsize + (recipe.init.variant != "rtn")
    return of_weight * weights * (blocks - 1) / blocks


def kept_of_float(recipe: Resolved, model: PreTrainedModel, coverage: CoverageReport) -> int:
    """Bytes that a run keeps of its float model, see `FloatPass`: hidden states, and samples of the layers' outputs."""
    outputs = sum(layer.shape[0] for layer in coverage.quantized if not EXPERT.search(layer.name))
    hidden = scored_tokens(recipe) * model.config.get_text_config().hidden_size
    return MASTER * (hidden + recipe.eval.tokens * outputs // STRIDE)


def scored_tokens(recipe: Resolved) -> int:
    """Tokens that each row of the scoreboard is scored on, at most: of all texts."""
    return recipe.eval.tokens * (1 + len(recipe.eval.other_texts))


def evaluation(recipe: Resolved, model: PreTrainedModel, batch: Cost, name: str) -> Stage:
    """Scoring of all test tokens."""
    text = model.config.get_text_config()
    scoring = 4 * SCORING_CHUNKS * min(CHUNK_LOGITS, recipe.eval.window * text.vocab_size)
    flops = batch.flops * scored_tokens(recipe) / BATCH_TOKENS
    return Stage(f"evaluation, {name}", flops, torch.float32, batch.peak + scoring)


def gptq(recipe: Resolved, model: PreTrainedModel, coverage: CoverageReport, batch: Cost) -> Stage:
    """One forward of all calibration tokens through every block, or for every block where they do not run one after the
    other, and two more of experts, for their two Hessians; Hessians, and the columns of every layer."""
    tokens, share = recipe.init.samples * recipe.data.length, reached(model)
    inputs = {(layer.name.rpartition(".")[0], layer.shape[1]): layer for layer in coverage.quantized}
    hessians = sum(2 * tokens * share(layer) * width**2 for (_, width), layer in inputs.items())
    experts = [layer for layer in coverage.quantized if EXPERT.search(layer.name)]
    again = sum(2 * 2 * tokens * share(layer) * layer.parameters for layer in experts)
    columns = sum(layer.shape[0] * layer.shape[1] ** 2 + 2 * layer.shape[1] ** 3 for layer in coverage.quantized)
    widest, hidden = max(width for _, width in inputs), model.config.get_text_config().hidden_size
    together = 4 * (expert_count(model) or 0) * hidden**2  # Hessians of a block's experts, see `passes_of`
    kept = min(GptqSettings().kept_bytes, 4 * tokens * (widest + hidden))
    peak = batch.held + 2 * 4 * tokens * hidden + kept + 5 * 4 * widest**2 + min(together, HESSIAN_BYTES)
    runs = len(blocks_of(model)) if whole_runs(model) else 1
    flops = runs * batch.flops * tokens / BATCH_TOKENS + again + hessians + columns
    return Stage("GPTQ", flops, torch.float32, peak)


def reconstruction(recipe: Resolved, model: PreTrainedModel, coverage: CoverageReport, batch: Cost) -> list[Stage]:
    """Training of the blocks one after the other, if that is asked for, with the float chain beside it."""
    layers, blocks = [layer for layer in coverage.quantized if not layer.role], block_count(model)
    if recipe.init.variant != "blockwise" or blocks is None:
        return []
    settings, length = Blockwise(recipe.init.block_steps), recipe.data.length
    weights, share = sum(layer.parameters for layer in layers), reached(model)
    used = sum(layer.parameters * share(layer) for layer in layers)
    tokens, in_step = recipe.init.samples * length, settings.sequences * length
    # Forward and backward of each step; forward of the float chain, of the quantized one, and of those held out.
    passes = 3 * settings.steps * in_step + 2 * tokens + (CHECKS + 1) * tokens // HELD_OUT_EVERY
    chains = 2 * MASTER * tokens * model.config.get_text_config().hidden_size
    activations = MASTER * in_step * sum(sum(layer.shape) * share(layer) for layer in layers) // blocks
    # Of a block: latents, their gradients, both moments of the optimizer, and the best state.
    peak = batch.held + chains + activations + 5 * MASTER * weights // blocks
    return [Stage("block-wise reconstruction", 2 * used * passes, settings.dtype, peak)]


def other_tool(name: str, recipe: Resolved, model: PreTrainedModel, coverage: CoverageReport, batch: Cost) -> Stage:
    """Another tool beside this process, with a float model of its own: GPTQ, or AutoRound's steps of each block,
    forward and backward."""
    tokens, own = recipe.init.samples * recipe.data.length, MASTER * total_parameters(model)
    if name == "llm-compressor":
        stage = gptq(recipe, model, coverage, batch)
        return stage._replace(name=name, bytes=stage.bytes + own)
    share = reached(model)
    weights = sum(layer.parameters * share(layer) for layer in coverage.quantized)
    in_step = AUTO_ROUND_SEQUENCES * recipe.data.length
    chains = 2 * MASTER * tokens * model.config.get_text_config().hidden_size
    # Every step works in all weights of a block, and makes activations of all its layers.
    widths = sum(sum(layer.shape) * share(layer) for layer in coverage.quantized)
    activations = MASTER * in_step * widths // (block_count(model) or 1)
    flops = 2 * weights * (3 * AUTO_ROUND_STEPS * in_step + 2 * tokens)
    return Stage(name, flops, torch.bfloat16, batch.held + own + chains + activations)


def ending(
    recipe: Resolved, model: PreTrainedModel, coverage: CoverageReport, batch: Cost, stored: torch.dtype
) -> list[Stage]:
    """All that is done with the packed model, which low memory does not time."""
    packed = of_packed(recipe, model, coverage, stored, batch)
    stages = [evaluation(recipe, model, packed, "packed"), verification(model, coverage, packed)]
    if recipe.eval.repeats and not recipe.low_memory:
        stages.append(throughput(recipe, model, coverage, stored, batch))
    return stages


def training(recipe: Resolved, step: Cost, batch: Cost) -> Stage:
    """All optimizer steps, and the held-out losses between them."""
    config = recipe.train
    held_out = (config.max_steps // config.eval_every + 1) * recipe.eval.validation_tokens
    models = 2 if config.loss == "kd" else 1
    flops = config.max_steps * config.accumulation * step.flops + models * batch.flops * held_out / BATCH_TOKENS
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    return Stage("training", flops, dtype, step.peak)
