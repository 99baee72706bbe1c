"""One run from the float model to the measured, verified packed file: `finetune` and `quantize` of the command line."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llmqat.algorithms.activation_ranges import observe_activations
from llmqat.algorithms.smoothquant import smoothing_summary
from llmqat.config import Recipe, Resolved, log_cut
from llmqat.devices import find_device, use_share_of_cores
from llmqat.errors import LlmqatError
from llmqat.forecast.words import announce
from llmqat.formats.contents import contents_of, layer_sizes
from llmqat.formats.given_codes import take_codes
from llmqat.formats.serve_with import plan_to_serve, resolve_to_serve
from llmqat.formats.verify import expected_in
from llmqat.formats.writer import write_contents
from llmqat.kernels.native import kernel_name
from llmqat.metrics.float_pass import FloatPasses
from llmqat.metrics.memory import peak_memory
from llmqat.metrics.perplexity import Perplexity
from llmqat.models.architectures import check_init
from llmqat.models.float_view import FloatView, copy_of_float
from llmqat.models.loading import load_as_stored, load_float, load_tokenizer, storage_dtype_of, stored_format
from llmqat.models.patcher import (
    gptq_part_count,
    prepare,
    round_float_parts,
    run_gptq,
    settings_of,
    smooth,
)
from llmqat.models.widening import compute_in_float32
from llmqat.nn.quantizers import disable_quantizers
from llmqat.pipeline.bits import with_chosen_bits
from llmqat.pipeline.inputs import hash_of_files, hash_of_tokenizer, hash_of_weights, read, tokenized
from llmqat.pipeline.low_memory import LowMemory
from llmqat.pipeline.measure_baselines import Baselines
from llmqat.pipeline.output import (
    ADAPTER,
    CHECKPOINT,
    CONTROL,
    GPTQ,
    OTHER_TOOLS,
    REPORT_FILES,
    claimed,
    forget_earlier,
    forget_preparation,
    save_adapter,
    write_reports,
)
from llmqat.pipeline.proof import prove
from llmqat.pipeline.refusals import check_asked, check_device, check_plan
from llmqat.pipeline.saved import (
    Record,
    check_measured,
    check_same_step,
    read_measurements,
    write_measurements,
)
from llmqat.pipeline.speed import speeds
from llmqat.processes import is_first
from llmqat.progress import log
from llmqat.report import details
from llmqat.report.measured import Measured
from llmqat.report.names import public_name
from llmqat.report.scoreboard import LABELS
from llmqat.report.text import print_scoreboard
from llmqat.train.checkpoint import Checkpoints, SavedBlocks
from llmqat.train.loop import TrainingData, fit
from llmqat.train.modes import add_lora, default_alpha, freeze_scales, select_trainable
from llmqat.train.together import check_agreement, close_process_group, connect
from llmqat.train.tracking import check_tracker


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
    with claimed(Path(recipe.output), recipe.model, resume, overwrite):
        try:
            return Run(recipe, train, resume).execute()
        finally:
            close_process_group()


class Run:
    """State of one run; `execute` is its table of contents."""

    model: Any
    recipe: Resolved

    def __init__(self, recipe: Recipe, train: bool, resume: bool) -> None:
        self.asked, self.train, self.resume = recipe, train, resume
        self.directory = Path(recipe.output)

    def execute(self) -> Measured:
        """All stages in order."""
        check_asked(self.asked, self.train)
        torch.manual_seed(self.asked.seed)
        self.open_inputs()
        self.plan_layers()
        self.record_inputs()
        self.claim_directory()
        self.restore_state()
        torch.manual_seed(self.recipe.seed)
        self.place_model().requires_grad_(False)  # until it is marked what trains
        self.smooth_model()
        self.prepare_model()
        self.initialize_codes()
        self.measure_baselines()
        if self.train:
            self.train_model()
        if is_first():
            self.float_pass.score_alone()  # the other processes end
            if self.train:
                self.round_and_measure_trained()
            self.pack_model()
            self.measure_packed()
            self.write_report()
            forget_preparation(self.checkpoint)
        return self.measured

    # -- before anything is written -------------------------------------------------------------------------------

    def open_inputs(self) -> None:
        """Read the dataset, load the model, and choose what the recipe left open."""
        asked = self.asked
        self.device = find_device(asked.device)
        check_device(asked, self.device)
        use_share_of_cores()
        log(f"reading {asked.data.dataset}")
        self.corpus = read(asked.data, asked.data.dataset)
        if is_first():
            announce(asked, self.device, self.train)
        log(f"loading {asked.model}")
        self.low_memory = LowMemory(asked.model, self.directory, self.device) if asked.low_memory else None
        smooths = asked.init.smooth is not None  # by factors that leave weights which may need more bits
        load = partial(load_float, dtype=torch.float32) if smooths else load_as_stored
        self.model = self.low_memory.model if self.low_memory else load(asked.model)
        self.tokenizer = load_tokenizer(asked.model)
        recipe = resolve_to_serve(self.model, asked)
        self.recipe = with_chosen_bits(recipe, self.model, self.tokenizer, self.corpus, self.device)
        log_cut(asked, self.recipe)

    def plan_layers(self) -> None:
        """Plan the grid of every layer, and refuse what this run could not carry out to its end."""
        recipe = self.recipe
        self.coverage = plan_to_serve(self.model, recipe)
        check_plan(self.model, recipe, self.coverage)
        if unusual := check_init(self.model, recipe.init.variant):
            log(unusual)
        if self.train:
            check_tracker(recipe.train.tracker, self.directory)

    def record_inputs(self) -> None:
        """Cut all tokens, and hash what the run depends on."""
        self.inputs = tokenized(self.recipe, self.tokenizer, self.corpus, self.coverage, self.train)
        self.calibration = list(self.inputs.calibration)
        hashes = self.inputs.hashes()
        hashes["float weights"] = hash_of_weights(self.model)
        if self.recipe.init.codes_from is not None:
            hashes["codes given"] = hash_of_files(self.recipe.init.codes_from)
        hashes["rules of the tokenizer"] = hash_of_tokenizer(self.tokenizer)
        self.record = Record(self.recipe, hashes, str(self.device))

    # -- what an earlier run left ---------------------------------------------------------------------------------

    @property
    def checkpoint(self) -> Path:
        """Where everything lies that only `--resume` needs."""
        return self.directory / CHECKPOINT

    def claim_directory(self) -> None:
        """Make the directory this run's: go on with what it has of this run, or forget what an earlier one left."""
        if is_first():
            begun = self.resume and self.record.check(self.checkpoint)
            if begun:  # refused before anything is touched
                self.load_state()
            else:
                if self.resume:
                    log("nothing to resume: starting from the beginning")
                forget_earlier(self.directory)
            self.record.write(self.checkpoint)
        self.team = connect(self.device)

    def restore_state(self) -> None:
        """Restore what the interrupted run had measured and trained; every process must find the same."""
        self.load_state()
        found = self.record.key, self.steps_done, sorted(self.scores), self.saved_blocks.present()
        check_agreement(self.team, found, self.checkpoint)
        if self.steps_done is not None:
            log(f"resuming after step {self.steps_done}")

    def load_state(self) -> None:
        """Read measurements and training state of this run.

        Raises:
            LlmqatError: if they are damaged, or this run cannot go on from them.
        """
        self.checkpoints = Checkpoints(self.checkpoint, self.record.key)
        self.saved_blocks = SavedBlocks(self.checkpoints.subdirectory(GPTQ))
        self.scores = read_measurements(self.checkpoint, self.record.key)
        self.state = self.checkpoints.load()
        if self.state is None:
            return
        if not self.train:
            raise LlmqatError(
                f"{self.directory} holds a training run; go on with llmqat finetune --resume, or choose another "
                "--output"
            )
        check_same_step(self.state["result"], self.recipe)
        variants = list(dict.fromkeys(("float", "rtn", self.recipe.init.variant)))
        variants += ["float_finetuned"] if self.recipe.eval.control else []
        check_measured(self.scores, variants, self.checkpoint)

    @property
    def steps_done(self) -> int | None:
        """Steps that the interrupted run had trained; None if it had not begun to."""
        return None if self.state is None else int(self.state["result"]["steps"])

    # -- stages ---------------------------------------------------------------------------------------------------

    def place_model(self) -> Any:
        """The model, put on the device; with low memory, all of it that is not streamed."""
        return self.low_memory.stream.place(self.model) if self.low_memory else self.model.to(self.device)

    def smooth_model(self) -> None:
        """SmoothQuant on the float model, if asked for."""
        recipe, alpha = self.recipe, self.recipe.init.smooth
        if alpha is not None:
            scheme, overrides, dtype = recipe.scheme(), recipe.quant.overrides, storage_dtype_of(self.model)
            done = smooth(self.model, self.calibration, alpha, scheme=scheme, overrides=overrides, storage_dtype=dtype)
            log(smoothing_summary(done))

    def prepare_model(self) -> None:
        """Put the model on its grid by rounding to nearest; measure the float model inside it, and then the grid."""
        recipe, dtype = self.recipe, storage_dtype_of(self.model)
        prepare(
            self.model,
            recipe.scheme(),
            overrides=recipe.quant.overrides,
            storage_dtype=dtype,
            clip_mask=recipe.quant.clip_mask,
            lm_head_bits=recipe.quant.lm_head_bits,
            kv_bits=recipe.quant.kv_bits,
            min_coverage=recipe.quant.min_coverage,
        )
        compute_in_float32(self.model, dtype)
        self.place_model()
        self.float_copy = copy_of_float(self.model) if self.train and recipe.train.mode == "full" else None
        watched = [layer.name for layer in self.coverage.quantized]
        # Also in a resumed run that has the float row: the others are compared with what the first run had.
        reference, inputs = self.float_copy or FloatView(self.model), self.inputs
        self.float_pass = FloatPasses(reference, inputs.test, inputs.also, watched, self.team)
        self.measure("float", partial(self.float_pass.score, "perplexity, float"))
        observe_activations(self.model, [] if self.calibrated else self.calibration, recipe.quant.observer)
        log(self.coverage.summary())
        self.lora_alpha = default_alpha(self.model, recipe.train.lora_r)
        self.measured = Measured(
            recipe, self.coverage, inputs.test, self.scores, also=inputs.also, device=str(self.device)
        )
        self.measured.stored_format = stored_format(recipe.model)
        self.measured.tokens["calibration"] = sum(batch.numel() for batch in self.calibration)
        self.measure("rtn", partial(self.float_pass.compare, self.model, "perplexity, round to nearest"))

    @property
    def calibrated(self) -> bool:
        """Whether all that calibration finds in the prepared model is saved: ranges trained on, and blocks of GPTQ."""
        if self.recipe.init.by_blocks and not self.saved_blocks.holds(gptq_part_count(self.model)):
            return False
        return self.state is not None

    def initialize_codes(self) -> None:
        """Take the codes that were given, or find them block by block, but for those blocks that are saved; then mark
        what trains."""
        init = self.recipe.init
        settings = settings_of(init.variant, init.damp, self.float_copy is None, init.block_steps)
        settings = self.low_memory.settings(settings) if self.low_memory else settings
        if init.codes_from is not None:
            take_codes(self.model, init.codes_from, settings)
        elif init.by_blocks:
            self.coverage.errors.update(run_gptq(self.model, self.calibration, settings, self.saved_blocks, self.team))
            log(self.coverage.error_summary())
        if self.train:
            self.mark_trainable()
        self.float_pass.reference = self.float_copy or FloatView(self.model)
        name = f"perplexity, {LABELS[init.variant]}"  # measured already where that is rounding to nearest
        self.measure(init.variant, partial(self.float_pass.compare, self.model, name))

    def measure_baselines(self) -> None:
        """Measure what other tools make of the float model."""
        folder, layers = self.checkpoint / OTHER_TOOLS, self.coverage.schemes
        tools = Baselines(self.recipe.model, layers, self.calibration, folder, self.device, self.recipe.seed)
        for name, python in self.recipe.eval.other_tools.items():
            self.measure(name, partial(tools.score, name, python, self.float_pass, self.team))
        self.measured.baselines = tools.told()

    def mark_trainable(self) -> None:
        """Mark what trains; LoRA wraps the model."""
        config = self.recipe.train
        torch.manual_seed(self.recipe.seed)  # whatever was measured or skipped before
        if config.mode == "lora":
            self.model = add_lora(self.model, config.lora_r, self.lora_alpha)
            self.place_model()
        select_trainable(self.model, config.mode, config.lr_scale > 0, config.lr_float > 0)

    def train_model(self) -> None:
        """Train through the grid, and the float control if it was asked for."""
        recipe, inputs = self.recipe, self.inputs
        assert inputs.training is not None
        assert inputs.validation is not None
        train = partial(
            fit,
            data=TrainingData(inputs.training, inputs.validation.ids),
            config=recipe.train,
            teacher=self.float_pass.reference if recipe.train.loss == "kd" else None,
            seed=recipe.seed,
        )
        if recipe.eval.control:
            self.measure("float_finetuned", partial(self.train_control, train))
        torch.manual_seed(recipe.seed)
        with peak_memory(self.device) as peak:
            checkpoints = Checkpoints(self.checkpoint, self.record.key, self.state)
            self.measured.training = train(self.model, checkpoints=checkpoints)
        self.measured.peak_memory_bytes, self.measured.peak_device_memory_bytes = peak.bytes, peak.device_bytes
        self.measured.tokens["train"] = self.measured.training.tokens

    def train_control(self, train: Callable[..., Any]) -> Perplexity:
        """Train the float model on the same text: what training gives without a grid."""
        log("training the float control")
        control, saved = copy.deepcopy(self.model), self.checkpoints.subdirectory(CONTROL)
        freeze_scales(control)
        with disable_quantizers(control, disable_adapters=False):
            # Everywhere: the same teacher is needed once more, and all processes score.
            train(control, checkpoints=Checkpoints(saved.directory, saved.run, saved.load()), everywhere=True)
            return self.float_pass.compare(control, "perplexity, control", watch=False)

    def round_and_measure_trained(self) -> None:
        """Bring the trained model into the state that is packed, measure it, and keep its adapters."""
        round_float_parts(self.model)
        self.measured.perplexity["qat"] = self.float_pass.compare(self.model, "perplexity, trained")
        if self.recipe.train.mode == "lora":
            save_adapter(self.model, self.directory / ADAPTER, public_name(self.recipe.model))

    def pack_model(self) -> None:
        """Write the packed model, count its bytes, and look at its layers; reports of another model go before."""
        log(f"packing to {self.directory}")
        for name in REPORT_FILES:
            (self.directory / name).unlink(missing_ok=True)
        contents = contents_of(self.model, self.low_memory.disk if self.low_memory else None)
        write_contents(contents, self.directory, self.tokenizer)
        self.measured.size = layer_sizes(contents.layers.values())
        self.layers = details.layers(self.measured, contents.layers, self.float_pass.reference.model)
        self.expected = expected_in(self.directory, contents)

    def measure_packed(self) -> None:
        """Perplexity through the kernel op, the proof, and throughput, which has the device for itself."""
        self.measured.kernel = kernel_name(self.device)
        row, verification = prove(self.directory, self.expected, self.float_pass, self.device, self.recipe.low_memory)
        self.measured.perplexity["packed"], self.measured.verification = row, verification
        del self.model, self.expected, self.float_pass, self.float_copy
        if self.recipe.eval.repeats and not self.recipe.low_memory:  # which would measure the disk
            self.measured.throughput = speeds(self.recipe, self.directory, self.device)

    def write_report(self) -> None:
        """Report, model card, and the recipe to publish."""
        page = write_reports(self.measured, details.collect(self.measured, self.layers), self.directory)
        print_scoreboard(self.measured)
        log(f"look at it in a browser: {page}")
        check = self.measured.verification
        if check is not None and not check.ok:
            raise LlmqatError(
                f"{self.directory} does not hold what was trained; this is a bug of llmqat, please report it"
            )

    # -- measurements ---------------------------------------------------------------------------------------------

    def measure(self, variant: str, evaluation: Callable[[], Perplexity]) -> None:
        """Score a variant of the model, unless the interrupted run did."""
        if variant not in self.scores:
            self.scores[variant] = evaluation()
            if is_first():
                write_measurements(self.checkpoint, self.record.key, self.scores)
