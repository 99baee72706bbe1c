"""`llmqat quantize --low-memory`: a model larger than memory, quantized block by block from its safetensors.

The model is built on the meta device. What lies outside the blocks (embeddings, norms, output head) is read once; each
block is read, put on its grid, written as a shard of its own, and freed. The functions and the calibration data are
those of `pipeline.run`, so the packed bytes are identical.
"""

from pathlib import Path

from torch import Tensor, nn

from llmqat.algorithms.blocks import BlockInputs
from llmqat.algorithms.gptq_model import GptqSettings, gptq_block
from llmqat.config import Recipe, log_cut, to_yaml
from llmqat.devices import find_device
from llmqat.errors import LlmqatError
from llmqat.files import replacing
from llmqat.formats import fingerprint
from llmqat.formats.contents import contents_of
from llmqat.formats.directory import SEAL
from llmqat.formats.partial import PartialModel
from llmqat.formats.writer import finish_model, save_shard, write_index
from llmqat.models.architectures import ARCHITECTURES, architecture_of, blocks_of, blocks_path
from llmqat.models.coverage import CoverageReport
from llmqat.models.experts import can_split_experts
from llmqat.models.loading import load_tokenizer
from llmqat.models.patcher import put_on_grid
from llmqat.models.planning import checked_plan, resolve_for
from llmqat.pipeline.inputs import calibrates, calibration
from llmqat.pipeline.output import RECIPE, REPORT_FILES, claimed, forget_earlier
from llmqat.processes import process_count
from llmqat.progress import log, track
from llmqat.report.names import public_recipe

# Of a block's activations kept between passes over the calibration data; beyond, they are computed again.
KEPT_BYTES = 1 << 30


def quantize_by_block(recipe: Recipe, overwrite: bool = False) -> CoverageReport:
    """Quantize and pack a model with one block of it in memory at a time, without training.

    In memory are, in float32: one block and its Hessians, the calibration activations (those between blocks, and up to
    `KEPT_BYTES` inside the block), embeddings and output head.

    Args:
        recipe: what to do; ``train`` and ``eval`` mean nothing here.
        overwrite: the output directory may hold something.

    Raises:
        LlmqatError: if SmoothQuant, or more than the blocks, is asked for, the family has no row, or what
            `llmqat.pipeline.run.run` raises.
    """
    if recipe.init.smooth is not None:
        raise LlmqatError("SmoothQuant compares logits of the whole float model: leave out --smooth, or --low-memory")
    if recipe.quant.lm_head_bits is not None or recipe.quant.kv_bits is not None:
        raise LlmqatError("--low-memory quantizes the blocks alone: leave it out, or --lm-head-bits and --kv-bits")
    if recipe.quant.act_static:
        raise LlmqatError(
            "static activation ranges are observed in the whole model: leave out --act-static, or --low-memory"
        )
    if process_count() > 1:
        raise LlmqatError(
            f"--low-memory runs in one process, and there are {process_count()}; start it without launcher"
        )
    with claimed(Path(recipe.output), recipe.model, resume=False, overwrite=overwrite):
        return _quantize(recipe, Path(recipe.output))


def _quantize(asked: Recipe, directory: Path) -> CoverageReport:
    source = PartialModel(asked.model, find_device(asked.device))
    recipe = resolve_for(source.model, asked)
    log_cut(asked, recipe)
    architecture_of(source.model, "--low-memory", "leave it out, or add a row to models/architectures.py")
    if can_split_experts(source.model):
        raise LlmqatError("--low-memory does not know how to split fused experts yet: leave it out")
    report = checked_plan(source.model, recipe.scheme(), recipe.quant.overrides, min_coverage=recipe.quant.min_coverage)
    tokenizer = load_tokenizer(recipe.model)
    batches = calibration(recipe, tokenizer) if calibrates(recipe, report) else []
    stale = list(REPORT_FILES)
    with replacing(directory, seal=SEAL, owned=stale, first=fingerprint.NAME) as scratch:
        settings = GptqSettings(recipe.init.damp, kept_bytes=KEPT_BYTES)
        hashes = Streaming(source, report, settings, scratch).run(batches)
        stale += finish_model(source.model, scratch, directory, tokenizer, hashes)
        (scratch / RECIPE).write_text(to_yaml(public_recipe(recipe)))
        forget_earlier(directory)
    log(report.summary())
    if report.errors:
        log(report.error_summary())
    return report


class Streaming:
    """State of one pass over the blocks; `run` writes a shard for each, and one for what lies outside."""

    def __init__(self, source: PartialModel, report: CoverageReport, settings: GptqSettings, scratch: Path) -> None:
        self.source, self.report, self.settings, self.scratch = source, report, settings, scratch
        architecture = ARCHITECTURES[source.model.config.model_type]
        self.blocks = blocks_of(source.model, architecture)
        self.path = blocks_path(source.model, architecture)
        self.weight_map: dict[str, str] = {}
        self.total_size = 0
        self.layers: fingerprint.Layers = {}
        self.tensors: dict[str, str] = {}

    def run(self, batches: list[Tensor]) -> tuple[fingerprint.Layers, dict[str, str]]:
        """Quantize and write all blocks, with GPTQ if there are calibration `batches`; returns their fingerprint."""
        count = len(self.blocks)
        self.source.read(f"{self.path}.", outside=True)
        inputs = BlockInputs.capture(self.source.model, list(self.blocks), batches) if batches else None
        for index, block in track(enumerate(self.blocks), "blocks", count):
            prefix = f"{self.path}.{index}."
            self.source.read(prefix)
            self.quantize(block, prefix, inputs)
            self.write(prefix, index + 1, count + 1)
            block.to("meta")
        self.write("", count + 1, count + 1)
        write_index(self.scratch, {"total_size": self.total_size}, self.weight_map)
        return self.layers, self.tensors

    def quantize(self, block: nn.Module, prefix: str, inputs: BlockInputs | None) -> None:
        """Put one block on its grid."""
        layers = [layer for layer in self.report.quantized if layer.name.startswith(prefix)]
        put_on_grid(self.source.model, layers, self.source.dtype)
        if inputs is not None:
            for error in gptq_block(block, inputs, self.settings, prefix.removesuffix(".")):
                self.report.errors[error.layer] = (error.rtn, error.gptq)

    def write(self, prefix: str, number: int, count: int) -> None:
        """Write the tensors whose names start with `prefix` and that are in memory."""
        contents = contents_of(self.source.model, prefix)
        filename = f"model-{number:05}-of-{count:05}.safetensors"
        save_shard(contents.state, self.scratch / filename)
        self.weight_map |= dict.fromkeys(contents.state, filename)
        self.layers |= contents.hashes
        self.tensors |= contents.tensor_hashes
        self.total_size += sum(tensor.nbytes for tensor in contents.state.values())
