"""The notebook surface: what `import llmqat` offers; `llmqat.__all__` lists it."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmqat import config as config_module
from llmqat.algorithms.activation_ranges import follow_activations, observe_activations, static_layers
from llmqat.algorithms.smoothquant import Smoothed
from llmqat.config.options import shown
from llmqat.data.corpus import load_corpus
from llmqat.data.tokens import encode, sequences, split_stream
from llmqat.devices import find_device
from llmqat.errors import LlmqatDeprecationWarning, LlmqatError
from llmqat.formats.given_grid import prepare_from
from llmqat.formats.reader import load_packed as load
from llmqat.formats.verify import Verification, verify
from llmqat.formats.writer import save_packed as pack
from llmqat.machine import environment
from llmqat.metrics.memory import peak_memory
from llmqat.metrics.perplexity import Perplexity, Windows, evaluate, windows
from llmqat.metrics.published import scored_windows
from llmqat.metrics.throughput import Throughput, throughput
from llmqat.models.coverage import CoverageReport
from llmqat.models.float_view import FloatCopy, FloatView, holds_float, mark_float_lost
from llmqat.models.loading import load_tokenizer
from llmqat.models.pair import load_float
from llmqat.models.patcher import convert, prepare, quantized_layers, smooth, transformers_model
from llmqat.models.prepare_options import PrepareOptions
from llmqat.models.sensitivity import choose_bits
from llmqat.models.widening import compute_in_float32
from llmqat.nn.training_kernels import training_kernels
from llmqat.pipeline.export import Exported, export
from llmqat.pipeline.import_checkpoint import Imported, import_checkpoint
from llmqat.pipeline.measure_baselines import Baseline, quantized_by
from llmqat.report.page.render import write_page
from llmqat.report.plan import Inspection
from llmqat.report.plan import inspect as inspect_recipe
from llmqat.report.scoreboard import scoreboard
from llmqat.train.checkpoint import Checkpoints
from llmqat.train.loop import TrainingData, TrainResult, fit
from llmqat.train.modes import add_lora, select_trainable


def inspect(model: str | Path = "llama", **sections: Mapping[str, Any]) -> Inspection:
    """The dry run, to print: every Linear, quantized or not and why, predicted size and memory.

    Args:
        model: Hub id, local directory, GGUF file, llama or smollm2.
        sections: of a recipe, such as ``quant={"bits": 3}, train={"mode": "lora"}``.

    Returns:
        the plan: layers, bytes of the file, bytes of memory for training (activations not counted).

    Raises:
        LlmqatError: if a section is wrong, the model cannot be found, or a group size does not divide.
    """
    return inspect_recipe(config_module.from_dict({"model": str(model), **sections}))


def finetune(
    model: nn.Module,
    tokens: Tensor,
    held_out: Tensor,
    *,
    mode: str = "full",
    teacher: FloatCopy | FloatView | PreTrainedModel | str | None = None,
    output: str | Path | None = None,
    **options: Any,
) -> TrainResult:
    """Train a prepared model in place, and leave it in the state with the least held-out loss.

    Under FSDP2 the first of several processes has the trained model; in the others it is on meta.

    Args:
        model: prepared by `llmqat.prepare`; for LoRA, the result of `llmqat.add_lora`.
        tokens: training ids ``(sequences, length)``, or ids and labels of conversations, see `llmqat.sequences`.
        held_out: ids of either kind, that choose the best state.
        mode: full, lora or scales.
        teacher: the float model to distil from; "self" for the float model inside a LoRA or scales model prepared with
            ``keep_float=True``; None trains by cross-entropy.
        output: directory for checkpoints; None keeps none.
        options: fields of the recipe's ``train`` section, such as ``max_steps=100, lr=0.02``; ``seed``, of the order of
            the sequences; and ``device``, to which `model` moves: "auto" leaves it on its accelerator, if it is on one.

    Returns:
        steps, tokens, seconds, losses by step, and the share of codes that training changed.

    Raises:
        LlmqatError: if an option is wrong, `model` cannot train in this mode or by this teacher, a loss is not finite,
            or the run was interrupted.
    """
    options = _options(options)
    values: dict[str, Any] = {"seed": options.pop("seed", 0), "device": options.pop("device", "auto")}
    values["train"] = {**options, "mode": mode, "loss": _loss(options, teacher)}
    if static_layers(model):
        values["quant"] = {"act_bits": 8, "act_static": True}
    # Without integers: what GPTQ changed is an int8 parameter beside each weight.
    parameters = sum(p.numel() for p in model.parameters() if p.is_floating_point())
    recipe = config_module.resolve(config_module.from_dict(values), parameters)
    if not quantized_layers(model):
        raise LlmqatError("no layer of this model is quantized; call llmqat.prepare before finetune")
    if recipe.device != "auto" or next(model.parameters()).device.type == "cpu":
        model.to(find_device(recipe.device))
    view = _teacher(model, teacher, mode)
    if mode != "full":  # of which some weights stay stored in 16 bits, between norms that train in float32
        compute_in_float32(transformers_model(model), quantized_layers(model)[0].layer.storage_dtype)
    select_trainable(model, mode, recipe.train.lr_scale > 0, recipe.train.lr_float > 0)
    if isinstance(view, FloatView) and view.model is model:
        view = FloatView(model)  # made before, it would not know which norms train
    checkpoints = None if output is None else Checkpoints(Path(output))
    if mode == "full":
        mark_float_lost(model)
    data = TrainingData(tokens, held_out)
    return fit(model, data, recipe.train, teacher=view, seed=recipe.seed, checkpoints=checkpoints)


def _options(options: dict[str, Any]) -> dict[str, Any]:
    """The options by name; a mapping of them, as the version before took it, is accepted with a warning."""
    if "options" not in options:
        return options
    warnings.warn(
        "finetune(options={...}) is now finetune(..., max_steps=100, lr=0.02): the options by their names",
        LlmqatDeprecationWarning,
        stacklevel=3,
    )
    return {**(options["options"] or {}), **{name: value for name, value in options.items() if name != "options"}}


def _loss(options: Mapping[str, Any], teacher: Any) -> str:
    """The loss that a teacher, or none, trains by.

    Raises:
        LlmqatError: if another one is asked for, or an option of the recipe that is no option here.
    """
    loss = "ce" if teacher is None else "kd"
    if options.get("loss", loss) != loss:
        raise LlmqatError(
            f"loss={shown(options['loss'])} changes nothing: finetune distils where it is given a teacher, and trains "
            "by cross-entropy where it is not; leave loss out"
        )
    if "lora_r" in options:
        raise LlmqatError("lora_r changes nothing: the rank of adapters is that of add_lora(model, r=...)")
    return loss


def _teacher(model: nn.Module, teacher: Any, mode: str) -> FloatCopy | FloatView | None:
    """The float model to distil from.

    Raises:
        LlmqatError: if it is none of those, or the float model inside `model` is lost or would train.
    """
    if teacher is None or isinstance(teacher, FloatCopy):
        return teacher
    if isinstance(teacher, nn.Module) and teacher is not model:
        return FloatCopy(teacher)
    inside = teacher.model if isinstance(teacher, FloatView) else model
    if not (isinstance(teacher, FloatView) or (isinstance(teacher, str) and teacher == "self")):
        raise LlmqatError(
            f"teacher must be a model, a FloatCopy, a FloatView, 'self' or None; got "
            f"{'the model that trains' if teacher is model else shown(teacher)}"
        )
    if mode == "full" and inside is model:
        raise LlmqatError(
            "mode='full' trains the weights that teacher='self' would teach from; give a copy of the float model, "
            "teacher=llmqat.FloatCopy(copy.deepcopy(model)) made before llmqat.prepare, or train with mode='lora'"
        )
    if not holds_float(inside):
        raise LlmqatError(
            "the float model is no longer inside this one, so that teacher='self' has nothing to teach from; prepare "
            "it with keep_float=True, or give the float model as teacher"
        )
    return teacher if isinstance(teacher, FloatView) else FloatView(model)


def perplexity(model: nn.Module, tokens: Tensor, window: int = 2048) -> float:
    """Perplexity of `model` on a stream of ids, by the GPTQ protocol: windows without overlap, the tail dropped.

    Args:
        model: float, prepared or packed.
        tokens: ids ``(length,)``, with BOS where you want one.
        window: tokens per window.

    Returns:
        the exponential of the mean over windows of the mean cross-entropy in nats.

    Raises:
        LlmqatError: if the stream is shorter than one window, or the loss is not finite.
    """
    with torch.no_grad():
        return evaluate(model, Windows(split_stream(tokens, window, "evaluation"), "none")).perplexity
