"""One run from the float model to the measured, verified packed file: `finetune` and `quantize` of the command line."""

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmqat import config as config_module
from llmqat.algorithms.activation_ranges import observe_activations, static_layers
from llmqat.algorithms.smoothquant import describe
from llmqat.config import Recipe
from llmqat.errors import LlmqatError
from llmqat.formats.reader import load_packed
from llmqat.formats.verify import verify
from llmqat.formats.writer import replacing, save_packed
from llmqat.kernels.native import kernel_name
from llmqat.metrics.memory import peak_memory
from llmqat.metrics.perplexity import Perplexity, Windows, evaluate, windows
from llmqat.metrics.throughput import throughput
from llmqat.models.architectures import architecture_of
from llmqat.models.coverage import check_coverage
from llmqat.models.float_view import FloatCopy, FloatView, disable_quantizers
from llmqat.models.loading import load_float, load_tokenizer
from llmqat.models.patcher import (
    GPTQ_REMEDY,
    prepare,
    quantized_layers,
    round_float_parts,
    run_gptq,
    smooth,
    smoothable,
)
from llmqat.models.planning import check_divisible, plan
from llmqat.nn.packed_linear import PackedLinear
from llmqat.page import details
from llmqat.page.render import write_page
from llmqat.progress import say
from llmqat.report import Measured, model_card, show, write_json
from llmqat.run_data import LEAST_TRAIN_TOKENS, calibration_batches, read, train_tokens, training_stream
from llmqat.train import checkpoint
from llmqat.train.data import blocks, encode, sequences
from llmqat.train.layouts import Document
from llmqat.train.loop import fit
from llmqat.train.modes import add_lora, default_alpha, select_trainable
from llmqat.train.tracking import check_tracker

RECIPE, REPORT, CHECKPOINT, MEASURED, ADAPTER = "recipe.yaml", "report.json", "checkpoint", "measured.json", "adapter"


def check_output(directory: Path, resume: bool, overwrite: bool) -> None:
    """Refuse to damage a finished run or foreign files, and find out early whether the directory can be written.

    Raises:
        LlmqatError: if it holds a run or anything else and neither flag allows to go on, or cannot be written.
    """
    if directory.exists() and not directory.is_dir():
        raise LlmqatError(f"output {directory} is a file; choose a directory")
    if directory.exists() and not (resume or overwrite) and any(directory.iterdir()):
        raise LlmqatError(
            f"output {directory} is not empty; choose another --output, go on with --resume, or add --overwrite"
        )
    with replacing(directory):
        pass


def run(recipe: Recipe, *, train: bool = True, resume: bool = False, overwrite: bool = False) -> Measured:
    """Carry out a recipe: load, measure, quantize, train, pack, load again, measure and verify.

    Args:
        recipe: what to do; open choices are resolved here.
        train: False stops after post-training quantization (`llmqat quantize`).
        resume: continue a run of the same recipe from its checkpoint.
        overwrite: the output directory may hold something.

    Raises:
        LlmqatError: whatever goes wrong and can be mended by the caller.
    """
    check_output(Path(recipe.output), resume, overwrite)
    return Run(recipe, train, resume).execute()


class Run:
    """State of one run; `execute` is its table of contents."""

    def __init__(self, recipe: Recipe, train: bool, resume: bool) -> None:
        self.directory = Path(recipe.output)
        self.train = train
        torch.manual_seed(recipe.seed)
        say(f"reading {recipe.data.dataset}")
        self.corpus = read(recipe.data, recipe.data.dataset)
        say(f"loading {recipe.model}")
        self.model: Any
        self.model, self.stored_dtype = load_float(recipe.model, torch.float32)
        self.tokenizer = load_tokenizer(recipe.model)
        self.recipe = recipe = config_module.resolve(recipe, sum(p.numel() for p in self.model.parameters()))
        self.state = self.load_checkpoint() if resume else None
        context = getattr(self.model.config, "max_position_embeddings", None)
        if context is not None:
            self.recipe = recipe = fit_context(recipe, context)
        self.test = self.windows_of(self.corpus.test, recipe.eval.tokens)
        planned = plan(self.model, recipe.scheme(), recipe.quant.overrides, recipe.quant.lm_head_bits)
        check_coverage(planned, recipe.quant.min_coverage)
        check_divisible(planned)
        if recipe.init.method == "gptq":
            architecture_of(self.model, "GPTQ", GPTQ_REMEDY)
        check_tracker(recipe.train.tracker, self.directory)
        if recipe.init.smooth is not None:
            smoothable(self.model)
        # From here on the run can start: only now may it touch what an earlier one left.
        if self.state is None:
            checkpoint.discard(self.directory / CHECKPOINT)
            checkpoint.discard(self.directory / ADAPTER)
        with replacing(self.directory) as scratch:
            (scratch / RECIPE).write_text(config_module.to_yaml(recipe))

    def execute(self) -> Measured:
        """All stages in order."""
        torch.manual_seed(self.recipe.seed)
        self.smooth()
        self.prepare()
        if self.train:
            self.fit()
        self.pack()
        self.measure_packed()
        self.finish()
        return self.measured

    # -- stages ----------------------------------------------------------------------------------------------------

    def smooth(self) -> None:
        """SmoothQuant on the float model, if asked for."""
        recipe = self.recipe
        if recipe.init.smooth is not None:
            done = smooth(
                self.model,
                self.calibration,
                recipe.init.smooth,
                scheme=recipe.scheme(),
                overrides=recipe.quant.overrides,
                storage_dtype=self.stored_dtype,
            )
            say(describe(done))

    def prepare(self) -> None:
        """Put the model on its grid, measuring float, round-to-nearest and GPTQ on the way."""
        recipe = self.recipe
        full = self.train and recipe.train.mode == "full"
        copied = FloatCopy(copy.deepcopy(self.model)) if full else None
        earlier = self.earlier_measurements()
        if not earlier:
            results = {"float": evaluate(self.model, self.test, description="perplexity, float")}
        coverage = prepare(
            self.model,
            recipe.scheme(),
            overrides=recipe.quant.overrides,
            storage_dtype=self.stored_dtype,
            clip_mask=recipe.quant.clip_mask,
            lm_head_bits=recipe.quant.lm_head_bits,
            kv_bits=recipe.quant.kv_bits,
            min_coverage=recipe.quant.min_coverage,
        )
        batches = self.calibration if static_layers(self.model) and not earlier else []
        observe_activations(self.model, batches, recipe.quant.observer)
        say(coverage.summary())
        self.lora_alpha = default_alpha(self.model, recipe.train.lora_r)
        self.measured = Measured(recipe, coverage, self.test)
        self.measured.tokens["calibration"] = 0
        if recipe.init.method == "gptq" or recipe.init.smooth is not None or static_layers(self.model):
            self.measured.tokens["calibration"] = sum(batch.numel() for batch in self.calibration)
        if earlier:
            self.measured.perplexity.update(earlier)
        else:
            self.reference = copied or FloatView(self.model)
            results["rtn"] = self.evaluate("round to nearest")
            if recipe.init.method == "gptq":
                errors = run_gptq(self.model, self.calibration, recipe.init.damp, keep_float=not full)
                coverage.errors.update(errors)
                say(coverage.error_summary())
        if self.train:
            self.select_trainable()
        self.reference = copied or FloatView(self.model)
        if not earlier:
            if recipe.init.method == "gptq":
                results["gptq"] = self.evaluate("GPTQ")
            self.measured.perplexity.update(results)
            self.write_measurements()

    def select_trainable(self) -> None:
        """Mark what trains; LoRA wraps the model."""
        config, mode = self.recipe.train, self.recipe.train.mode
        assert mode is not None
        if mode == "lora":
            self.model = add_lora(self.model, config.lora_r, self.lora_alpha)
        select_trainable(self.model, mode, config.lr_scale > 0)

    def fit(self) -> None:
        """Train through the grid, and the float control if it was asked for."""
        recipe, config = self.recipe, self.recipe.train
        held_out = self.windows_of(self.corpus.validation, recipe.eval.validation_tokens, config.length).ids
        train = partial(
            fit,
            blocks=self.train_rows(),
            held_out=held_out,
            config=config,
            mode=config.mode or "full",
            teacher=self.reference if config.loss == "kd" else None,
            seed=recipe.seed,
        )
        if recipe.eval.control and "float_finetuned" not in self.measured.perplexity:
            self.fit_control(train)
        with peak_memory() as peak:
            self.measured.training = train(self.model, directory=self.directory / CHECKPOINT, resume=self.state)
        self.measured.peak_memory_bytes = peak.bytes
        self.measured.tokens["train"] = self.measured.training.tokens
        round_float_parts(self.model)
        self.measured.perplexity["qat"] = self.evaluate("trained")
        if config.mode == "lora":
            self.model.save_pretrained(str(self.directory / ADAPTER), save_embedding_layers=False)

    def fit_control(self, train: Callable[..., Any]) -> None:
        """The same training with quantizers off: what the text alone gives."""
        say("training the float control")
        control = copy.deepcopy(self.model)
        with disable_quantizers(control, adapters=False):
            train(control)
            self.measured.perplexity["float_finetuned"] = evaluate(
                control, self.test, self.reference, "perplexity, control"
            )
        self.write_measurements()

    def pack(self) -> None:
        """Write the packed model, and count its bytes."""
        say(f"packing to {self.directory}")
        save_packed(self.model, self.directory, self.tokenizer)
        self.measured.size = layer_sizes(self.model)

    def measure_packed(self) -> None:
        """Perplexity through the kernel op, throughput, and the proof."""
        self.measured.kernel = kernel_name()
        packed = load_packed(self.directory, torch.float32)
        self.measured.perplexity["packed"] = evaluate(packed, self.test, self.reference, "perplexity, packed")
        del packed
        self.measured.verification = verify(self.directory, against=self.model)
        config = self.recipe.eval
        if config.repeats:
            for row, load in (
                ("float", partial(load_float, self.recipe.model)),
                ("packed", partial(load_packed, self.directory)),
            ):
                loaded = load()
                model = loaded[0] if isinstance(loaded, tuple) else loaded
                self.measured.throughput[row] = throughput(model, config.prompt, config.new_tokens, config.repeats)

    def finish(self) -> None:
        """Report and model card."""
        with replacing(self.directory) as scratch:
            write_json(self.measured, scratch / REPORT)
            details.write(details.collect(self.measured, self.model, self.reference.model), scratch / details.NAME)
            (scratch / "README.md").write_text(model_card(self.measured))
        page = write_page(self.directory)
        show(self.measured)
        say(f"look at it in a browser: {page}")
        check = self.measured.verification
        if check is not None and not check.ok:
            raise LlmqatError(
                f"{self.directory} does not hold what was trained; this is a bug of llmqat, please report it"
            )

    # -- data and measurements --------------------------------------------------------------------------------------

    def windows_of(self, documents: list[Document], tokens: int, length: int | None = None) -> Windows:
        """Evaluation windows of some documents."""
        config, what = self.recipe.eval, f"{self.recipe.data.dataset} evaluation"
        return windows(self.tokenizer, documents, length or config.window, tokens, config.bos, what)

    def train_rows(self) -> Tensor:
        """What the loop trains on: blocks of the stream, or conversations."""
        length, what = self.recipe.train.length, f"{self.recipe.data.dataset} training"
        if self.corpus.is_chat:
            return sequences(self.tokenizer, self.corpus.train, length, train_tokens(self.recipe), what)
        return blocks(self.train_stream, length, what)

    @cached_property
    def train_stream(self) -> Tensor:
        """Training text as one stream of ids."""
        return training_stream(self.tokenizer, self.corpus.train, self.recipe)

    @cached_property
    def calibration(self) -> list[Tensor]:
        """Calibration batches ``(batch, length)``, from the training text or a dataset of their own."""
        recipe, source = self.recipe, self.recipe.data.calibration
        stream = self.train_stream
        if source is not None:
            stream = encode(self.tokenizer, read(recipe.data, source).train, LEAST_TRAIN_TOKENS)
        return calibration_batches(stream, recipe)

    def evaluate(self, name: str) -> Perplexity:
        """Perplexity of the current state, compared with the float model."""
        layers = [layer for layer, _, _ in quantized_layers(self.model)]
        return evaluate(self.model, self.test, self.reference, f"perplexity, {name}", layers)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The checkpoint to resume from; the recipe must be the one it was made with."""
        path = self.directory / RECIPE
        state = checkpoint.load(self.directory / CHECKPOINT)
        if state is None or not path.exists():
            say("nothing to resume: starting from the beginning")
            return None
        saved = flat(config_module.from_yaml(path).to_dict())
        context = getattr(self.model.config, "max_position_embeddings", None)
        asked = flat(fit_context(self.recipe, context).to_dict())
        different = [key for key in asked if asked[key] != saved.get(key) and key != "output"]
        if different:
            raise LlmqatError(
                f"--resume continues the recipe in {path}, but {different[0]} is {asked[different[0]]!r} now and was "
                f"{saved.get(different[0])!r}; give the same options, or start again with --overwrite"
            )
        return state

    def earlier_measurements(self) -> dict[str, Perplexity]:
        """What a resumed run had measured before training."""
        path = self.directory / CHECKPOINT / MEASURED
        if self.state is None or not path.exists():
            return {}
        rows: dict[str, Any] = json.loads(path.read_text())
        return {row: Perplexity(np.array(v.pop("losses")), **v) for row, v in rows.items()}

    def write_measurements(self) -> None:
        """Remember them for a resume."""
        with replacing(self.directory / CHECKPOINT) as scratch:
            rows = {row: {**asdict(p), "losses": p.losses.tolist()} for row, p in self.measured.perplexity.items()}
            (scratch / MEASURED).write_text(json.dumps(rows))


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested recipe values by dotted key."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and key != "overrides":
            result.update(flat(value, f"{prefix}{key}."))
        else:
            result[prefix + key] = value
    return result


def fit_context(recipe: Recipe, context: int | None) -> Recipe:
    """Sequences and windows no longer than the model's context; says so where it shortens one."""
    if context is None:
        return recipe
    if recipe.train.length > context or recipe.eval.window > context:
        say(f"the model's context is {context} tokens: sequences and windows are cut to it")
    prompt = min(recipe.eval.prompt, max(1, context - recipe.eval.new_tokens))
    new_tokens = min(recipe.eval.new_tokens, context - prompt)
    return replace(
        recipe,
        train=replace(recipe.train, length=min(recipe.train.length, context)),
        eval=replace(recipe.eval, window=min(recipe.eval.window, context), prompt=prompt, new_tokens=new_tokens),
    )


def layer_sizes(model: PreTrainedModel) -> dict[str, float]:
    """Bytes of the quantized layers' weights, float and packed, and stored bits per weight."""
    weights = packed_bytes = float_bytes = 0
    for _, layer, lora in quantized_layers(model):
        packed = PackedLinear.from_fake_quant(layer, **lora)
        tensors = [packed.weight_packed, packed.weight_scale, packed.weight_zero_point]
        packed_bytes += sum(t.numel() * t.element_size() for t in tensors if t is not None)
        weights += layer.weight.numel()
        float_bytes += layer.weight.numel() * layer.scale_dtype.itemsize
    return {"float_bytes": float_bytes, "packed_bytes": packed_bytes, "bits_per_weight": 8 * packed_bytes / weights}
