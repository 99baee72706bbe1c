"""One run from the float model to the measured, verified packed file: `finetune` and `quantize` of the command line."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmqat import config as config_module
from llmqat.algorithms.activation_ranges import observe_activations, static_layers
from llmqat.algorithms.smoothquant import describe
from llmqat.config import Recipe
from llmqat.data.tokens import blocks, encode, sequences
from llmqat.errors import LlmqatError
from llmqat.files import replacing
from llmqat.formats.reader import load_packed
from llmqat.formats.verify import verify
from llmqat.formats.writer import save_packed
from llmqat.kernels.native import kernel_name
from llmqat.metrics.memory import peak_memory
from llmqat.metrics.perplexity import Perplexity, evaluate, windows
from llmqat.metrics.published import scored_windows
from llmqat.metrics.throughput import throughput
from llmqat.models.architectures import architecture_of
from llmqat.models.coverage import check_coverage
from llmqat.models.float_view import FloatCopy, FloatView, disable_quantizers
from llmqat.models.loading import load_float, load_tokenizer, storage_dtype_of
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
from llmqat.pipeline.inputs import LEAST_TRAIN_TOKENS, calibration_batches, read, train_tokens, training_stream
from llmqat.pipeline.saved import (
    ADAPTER,
    CHECKPOINT,
    RECIPE,
    REPORT,
    check_same_recipe,
    check_same_step,
    claimed,
    read_measurements,
    write_measurements,
)
from llmqat.processes import is_first
from llmqat.progress import say
from llmqat.report import details
from llmqat.report.measured import Measured, model_card, show, write_json
from llmqat.report.page.render import write_page
from llmqat.train import checkpoint
from llmqat.train.checkpoint import SavedBlocks
from llmqat.train.loop import fit
from llmqat.train.modes import add_lora, default_alpha, select_trainable
from llmqat.train.together import check_agreement, leave, meet
from llmqat.train.tracking import check_tracker

GPTQ, CONTROL = "gptq", "control"  # below the checkpoint


def run(recipe: Recipe, *, train: bool = True, resume: bool = False, overwrite: bool = False) -> Measured:
    """Carry out a recipe: load, measure, quantize, train, pack, load again, measure and verify.

    Args:
        recipe: what to do; open choices are resolved here.
        train: False stops after post-training quantization (`llmqat quantize`).
        resume: continue a run of the same recipe from whatever it saved; where that is nothing, start.
        overwrite: the output directory may hold something.

    Raises:
        LlmqatError: whatever goes wrong and can be mended by the caller.
    """
    with claimed(Path(recipe.output), resume, overwrite):
        try:
            return Run(recipe, train, resume).execute()
        finally:
            leave()


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
        self.model = load_float(recipe.model, torch.float32)
        self.stored_dtype = storage_dtype_of(self.model)
        self.tokenizer = load_tokenizer(recipe.model)
        self.recipe = recipe = config_module.resolve(recipe, sum(p.numel() for p in self.model.parameters()))
        context = getattr(self.model.config, "max_position_embeddings", None)
        if context is not None:
            self.recipe = recipe = fit_context(recipe, context)
        limits = recipe.eval.window, recipe.eval.tokens, recipe.eval.bos
        self.test = scored_windows(recipe.data.dataset, self.tokenizer, *limits, self.corpus.test)
        planned = plan(self.model, recipe.scheme(), recipe.quant.overrides, recipe.quant.lm_head_bits)
        check_coverage(planned, recipe.quant.min_coverage)
        check_divisible(planned)
        if recipe.init.method == "gptq":
            architecture_of(self.model, "GPTQ", GPTQ_REMEDY)
        check_tracker(recipe.train.tracker, self.directory)
        if recipe.init.smooth is not None:
            smoothable(self.model)
        # From here on the run can start: only now may it touch what an earlier one left.
        if is_first():
            self.claim(resume)
        meet()
        self.state = checkpoint.load(self.checkpoint)
        result = None if self.state is None else self.state["result"]
        check_agreement(result and result["steps"], self.checkpoint)
        if result is not None and not self.train:
            raise LlmqatError(
                f"{self.directory} holds a training run; go on with llmqat finetune --resume, or choose another "
                "--output"
            )
        if result is not None:
            check_same_step(result, recipe)
            say(f"resuming after step {result['steps']}")
        if is_first():
            with replacing(self.directory) as scratch:
                (scratch / RECIPE).write_text(config_module.to_yaml(recipe))
        self.rows, self.layer_errors = read_measurements(self.checkpoint)

    @property
    def checkpoint(self) -> Path:
        """Where everything lies that only `--resume` needs."""
        return self.directory / CHECKPOINT

    def claim(self, resume: bool) -> None:
        """Make the directory this run's: go on with its recipe, or forget what an earlier run left."""
        path = self.directory / RECIPE
        if resume and path.exists():
            check_same_recipe(path, self.recipe)
        else:
            if resume:
                say("nothing to resume: starting from the beginning")
            path.unlink(missing_ok=True)  # first: what is left is not resumed if this is cut short
            checkpoint.discard(self.checkpoint)
            checkpoint.discard(self.directory / ADAPTER)

    def execute(self) -> Measured:
        """All stages in order."""
        torch.manual_seed(self.recipe.seed)
        self.smooth()
        self.prepare()
        if self.train:
            self.fit()
        if is_first():
            if self.train:
                self.settle()
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
        self.measure("float", partial(evaluate, self.model, self.test, description="perplexity, float"))
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
        batches = self.calibration if static_layers(self.model) and self.state is None else []
        observe_activations(self.model, batches, recipe.quant.observer)
        say(coverage.summary())
        self.lora_alpha = default_alpha(self.model, recipe.train.lora_r)
        self.measured = Measured(recipe, coverage, self.test, self.rows)
        self.reference = copied or FloatView(self.model)
        self.measure("rtn", partial(self.evaluate, "round to nearest"))
        self.measured.tokens["calibration"] = 0
        if recipe.init.method == "gptq" or recipe.init.smooth is not None or static_layers(self.model):
            self.measured.tokens["calibration"] = sum(batch.numel() for batch in self.calibration)
        if recipe.init.method == "gptq":
            if self.state is None:  # else the grid comes with the training state
                saved = SavedBlocks(self.checkpoint / GPTQ)
                self.layer_errors = run_gptq(self.model, self.calibration, recipe.init.damp, not full, saved)
            coverage.errors.update(self.layer_errors)
            say(coverage.error_summary())
        if self.train:
            self.select_trainable()
        self.reference = copied or FloatView(self.model)
        if recipe.init.method == "gptq":
            self.measure("gptq", partial(self.evaluate, "GPTQ"))

    def measure(self, row: str, evaluation: Callable[[], Perplexity]) -> None:
        """Fill in a row of the scoreboard, unless the interrupted run has it."""
        if row not in self.rows:
            self.rows[row] = evaluation()
            if is_first():
                write_measurements(self.checkpoint, self.rows, self.layer_errors)

    def select_trainable(self) -> None:
        """Mark what trains; LoRA wraps the model."""
        config, mode = self.recipe.train, self.recipe.train.mode
        assert mode is not None
        torch.manual_seed(self.recipe.seed)  # whatever was measured or skipped before
        if mode == "lora":
            self.model = add_lora(self.model, config.lora_r, self.lora_alpha)
        select_trainable(self.model, mode, config.lr_scale > 0)

    def fit(self) -> None:
        """Train through the grid, and the float control if it was asked for."""
        recipe, config = self.recipe, self.recipe.train
        tokens, what = recipe.eval.validation_tokens, f"{recipe.data.dataset} evaluation"
        validation = windows(self.tokenizer, self.corpus.validation, config.length, tokens, recipe.eval.bos, what)
        train = partial(
            fit,
            blocks=self.train_rows(),
            held_out=validation.ids,
            config=config,
            mode=config.mode or "full",
            teacher=self.reference if config.loss == "kd" else None,
            seed=recipe.seed,
        )
        if recipe.eval.control:
            self.measure("float_finetuned", partial(self.fit_control, train))
        torch.manual_seed(recipe.seed)
        with peak_memory() as peak:
            self.measured.training = train(self.model, directory=self.checkpoint, resume=self.state)
        self.measured.peak_memory_bytes = peak.bytes
        self.measured.tokens["train"] = self.measured.training.tokens

    def settle(self) -> None:
        """Bring the trained model into the state that is packed, measure it, and keep its adapters."""
        for model in (self.model, self.reference.model):
            model.to("cpu")  # where the packed file is loaded and measured
        round_float_parts(self.model)
        self.measured.perplexity["qat"] = self.evaluate("trained")
        if self.recipe.train.mode == "lora":
            with replacing(self.directory / ADAPTER) as scratch:
                self.model.save_pretrained(str(scratch), save_embedding_layers=False)

    def fit_control(self, train: Callable[..., Any]) -> Perplexity:
        """The same training with quantizers off: what the text alone gives."""
        say("training the float control")
        control, directory = copy.deepcopy(self.model), self.checkpoint / CONTROL
        with disable_quantizers(control, adapters=False):
            train(control, directory=directory, resume=checkpoint.load(directory))
            return evaluate(control, self.test, self.reference, "perplexity, control")

    def pack(self) -> None:
        """Write the packed model, and count its bytes."""
        say(f"packing to {self.directory}")
        save_packed(self.model, self.directory, self.tokenizer)
        self.measured.size = layer_sizes(self.model)
        for finished in (GPTQ, CONTROL):
            checkpoint.discard(self.checkpoint / finished)

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
                self.measured.throughput[row] = throughput(load(), config.prompt, config.new_tokens, config.repeats)

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
        layers = [on_grid.name for on_grid in quantized_layers(self.model)]
        return evaluate(self.model, self.test, self.reference, f"perplexity, {name}", layers)


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
    for on_grid in quantized_layers(model):
        layer, packed = on_grid.layer, on_grid.pack()
        tensors = [packed.weight_packed, packed.weight_scale, packed.weight_zero_point]
        packed_bytes += sum(t.numel() * t.element_size() for t in tensors if t is not None)
        weights += layer.weight.numel()
        float_bytes += layer.weight.numel() * layer.storage_dtype.itemsize
    return {"float_bytes": float_bytes, "packed_bytes": packed_bytes, "bits_per_weight": 8 * packed_bytes / weights}
