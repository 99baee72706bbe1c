"""Let other tools quantize the float model of a run, on its grid and its calibration tokens, and score the result."""

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmqat.config import Recipe
from llmqat.errors import LlmqatError
from llmqat.metrics.float_pass import FloatPasses
from llmqat.metrics.perplexity import Perplexity
from llmqat.models.loading import load_empty, load_float, load_tokenizer
from llmqat.models.planning import Overrides, plan
from llmqat.pipeline import baselines
from llmqat.pipeline.other_python import LOG, Tool, check_installed, run_in
from llmqat.progress import log
from llmqat.report.scoreboard import LABELS
from llmqat.scheme import QuantScheme
from llmqat.team import Team

# Baseline -> modules that its file needs, its own first.
NEEDS = {
    "auto-round": ("auto_round", "transformers", "torch"),
    "llm-compressor": ("llmcompressor", "compressed_tensors", "transformers", "torch"),
}
WEIGHTS, TOLD = "weights.safetensors", "told.json"


def tool_of(name: str, python: str) -> Tool:
    """A baseline in the Python that has it."""
    return Tool(name, NEEDS[name], python, f"--baselines {name}=PYTHON")


def check_baselines(recipe: Recipe) -> None:
    """Look whether the tools are there that the recipe names, and can do what it asks for.

    Raises:
        LlmqatError: naming what they cannot do, or which packages are missing, with the remedy.
    """
    quant, tools = recipe.quant, recipe.eval.other_tools
    if not tools:
        return
    for given, flag in ((quant.act_bits, "--act-bits"), (quant.lm_head_bits, "--lm-head-bits")):
        if given is not None:
            raise LlmqatError(
                f"--baselines compares weights of the blocks alone, so that with {flag} the other tools would have it "
                "easier; leave one of the two out"
            )
    for name, python in tools.items():
        with TemporaryDirectory() as scratch:
            check_installed(tool_of(name, python), Path(scratch))


def check_linear(model: nn.Module, layers: Mapping[str, QuantScheme]) -> None:
    """Refuse layers that other tools do not quantize under their names: fused experts, and GPT-2's.

    Raises:
        LlmqatError: naming the first.
    """
    known = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name in layers:
        if name not in known:
            raise LlmqatError(f"--baselines: other tools have no layer {name} of this model; leave it out")


class Baseline(NamedTuple):
    """A float model as another tool has quantized it.

    Attributes:
        model: with the weights of the grid in its layers, float32.
        versions: of the tool's packages.
        seconds: that it took.
        cpu_seconds: of processor time, all threads together.
    """

    model: PreTrainedModel
    versions: dict[str, str]
    seconds: float
    cpu_seconds: float


def quantized_by(
    tool: str,
    model: str,
    scheme: QuantScheme,
    calibration: Sequence[Tensor],
    *,
    overrides: Overrides | None = None,
    python: str | None = None,
    seed: int = 0,
    **options: int,
) -> Baseline:
    """Let another tool quantize a float model, to compare with; in a process of its own, on the CPU.

    Args:
        tool: auto-round or llm-compressor.
        model: Hub id, directory, GGUF file or alias.
        scheme: the grid of every layer, unless overridden.
        calibration: token ids ``(batch, length)``, all of one shape.
        overrides: as `prepare` takes them.
        python: of the environment that has the tool; None for this one.
        seed: of the tool.
        options: ``steps`` and ``batch`` of AutoRound, where not its defaults.

    Returns:
        the model, to be scored by `evaluate`, and what the tool took.

    Raises:
        LlmqatError: if the tool is not installed there, fails, or does not know a layer.
    """
    empty, _ = load_empty(model)
    layers = plan(empty, scheme, overrides).schemes
    check_linear(empty, layers)
    with TemporaryDirectory() as scratch:
        tools = Baselines(model, layers, calibration, Path(scratch), torch.device("cpu"), seed)
        tools.quantize(tool, python or sys.executable, **options)
        return Baseline(tools.quantized_model(tool), **tools.told()[tool])


class Baselines:
    """The baselines of a run, each quantized by its tool in a process of its own.

    Args:
        model: Hub id, directory, GGUF file or alias of the float model.
        layers: name of each layer on a grid -> its scheme; all others stay float.
        calibration: batches of token ids, all of one length.
        folder: for models on their way, logs, and what is told of the tools that are done.
        device: that computes.
        seed: of the tools.
    """

    def __init__(
        self,
        model: str,
        layers: Mapping[str, QuantScheme],
        calibration: Sequence[Tensor],
        folder: Path,
        device: torch.device,
        seed: int,
    ) -> None:
        self.model, self.layers, self.calibration = model, layers, calibration
        self.folder, self.device, self.seed = folder, device, seed

    def quantize(self, name: str, python: str, **options: int) -> None:
        """Let a tool find the weights of all layers, in a subfolder of its name.

        Args:
            name: of the baseline.
            python: of the environment that has it.
            options: ``steps`` and ``batch`` of AutoRound, where not its defaults.

        Raises:
            LlmqatError: if it fails, with its own last word.
        """
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        float_model = load_float(self.model)
        float_model.save_pretrained(folder / "float")
        load_tokenizer(self.model).save_pretrained(folder / "float")
        del float_model
        save_file({"input_ids": torch.cat([*self.calibration]).contiguous()}, folder / "calibration.safetensors")
        job = {
            "model": str(folder / "float"),
            "calibration": str(folder / "calibration.safetensors"),
            "layers": {layer: scheme.to_dict() for layer, scheme in self.layers.items()},
            "threads": torch.get_num_threads(),
            "device": str(self.device),
            "seed": self.seed,
            "steps": None,
            "batch": None,
            **options,
        }
        log(f"quantizing by {LABELS[name]} for comparison; it writes to {folder / LOG}")
        module = Path(baselines.__file__).parent / f"{name.replace('-', '_')}.py"
        said = run_in(tool_of(name, python), module, job, folder, f"{name} failed (all it said is in {folder / LOG})")
        told = {key: said[key] for key in ("versions", "seconds", "cpu_seconds")}
        (folder / TOLD).write_text(json.dumps(told), "utf-8")
        shutil.rmtree(folder / "float")

    def quantized_model(self, name: str) -> PreTrainedModel:
        """The float model with the weights that a tool has found, in float32."""
        model = load_float(self.model, torch.float32)
        found = load_file(self.folder / name / WEIGHTS)
        with torch.no_grad():
            for layer in self.layers:
                model.get_parameter(f"{layer}.weight").copy_(found[f"{layer}.weight"])
        return model.to(self.device)  # type: ignore[arg-type]

    def score(self, name: str, python: str, float_pass: FloatPasses, team: Team) -> Perplexity:
        """Quantize by a tool, in the first process of a team, and compare with the float model."""
        if team.index == 0:
            self.quantize(name, python)
        team.wait()
        found = float_pass.compare(self.quantized_model(name), f"perplexity, {LABELS[name]}", watch=False)
        if team.index == 0:
            (self.folder / name / WEIGHTS).unlink()
        return found

    def told(self) -> dict[str, dict[str, Any]]:
        """Versions of the packages of each tool that is done, and the seconds that it took: wall and processor."""
        return {path.parent.name: json.loads(path.read_text("utf-8")) for path in sorted(self.folder.glob(f"*/{TOLD}"))}
