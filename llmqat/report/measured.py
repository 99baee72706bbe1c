"""The scoreboard of a run: `report.json`, the table on the terminal, the model card."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmqat.config import Resolved
from llmqat.formats.compressed_tensors import readers, transformers_route
from llmqat.formats.verify import Verification
from llmqat.machine import environment
from llmqat.metrics.perplexity import Perplexity, Windows, bootstrap_difference
from llmqat.metrics.throughput import Throughput
from llmqat.models.coverage import CoverageReport
from llmqat.report.scoreboard import LABELS, ROWS, score_rows, scoreboard
from llmqat.train.loop import TrainResult
from llmqat.version import __version__

WORTHWHILE_GAP = 0.01


@dataclass
class Measured:
    """Everything a run measured; what it did not stays None.

    Attributes:
        perplexity: result by row of the scoreboard.
        tokens: training, calibration and evaluation tokens used.
        size: bytes of the quantized layers, float (in the storage dtype) and packed, and bits per weight of them.
        kernel: implementation that ran the packed layers.
    """

    recipe: Resolved
    coverage: CoverageReport
    data: Windows
    perplexity: dict[str, Perplexity] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    size: dict[str, float] = field(default_factory=dict)
    throughput: dict[str, Throughput] = field(default_factory=dict)
    kernel: str | None = None
    training: TrainResult | None = None
    peak_memory_bytes: int | None = None
    verification: Verification | None = None

    def ppl(self, row: str) -> float | None:
        """Perplexity of a row, or None."""
        return self.perplexity[row].perplexity if row in self.perplexity else None

    def best_ptq(self) -> str | None:
        """The better of round-to-nearest and GPTQ."""
        rows = [row for row in ("rtn", "gptq") if row in self.perplexity]
        return min(rows, key=lambda row: self.perplexity[row].perplexity) if rows else None

    def gap(self) -> float | None:
        """Perplexity that the best PTQ costs, relative to float."""
        best, base = self.best_ptq(), self.ppl("float")
        return None if best is None or base is None else self.perplexity[best].perplexity / base - 1

    def gap_recovered(self) -> float | None:
        """``(ppl_bestPTQ - ppl_packed) / (ppl_bestPTQ - ppl_float)``; None where PTQ costs nothing or nothing was
        trained."""
        best, base, packed = self.best_ptq(), self.ppl("float"), self.ppl("packed")
        if self.training is None or best is None or base is None or packed is None:
            return None
        cost = self.perplexity[best].perplexity - base
        return (self.perplexity[best].perplexity - packed) / cost if cost > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """The stable schema of `report.json`; every number measured in this run, null where it was not."""
        training, check = self.training, self.verification
        return {
            "format": 1,
            "llmqat": __version__,
            "model": self.recipe.model,
            "recipe": self.recipe.to_dict(),
            "environment": environment(),
            "tokens": {
                "train": self.tokens.get("train"),
                "calibration": self.tokens.get("calibration"),
                "eval": self.data.tokens,
                "eval_sha256": self.data.sha256,
            },
            "perplexity": {row: self.ppl(row) for row in ROWS},
            "gap_recovered": self.gap_recovered(),
            "kl_to_float": {row: self._of(row, "kl_to_float") for row in ROWS[1:]},
            "top1_agreement": {row: self._of(row, "top1_agreement") for row in ROWS[1:]},
            "coverage": {
                "parameters_quantized": self.coverage.parameters_quantized,
                "skipped": [{"layer": layer.name, "reason": layer.reason} for layer in self.coverage.skipped],
                "kept_round_to_nearest": self.coverage.kept,
            },
            "size": {key: self.size.get(key) for key in ("float_bytes", "packed_bytes", "bits_per_weight")},
            "throughput": {"kernel": self.kernel, "float": self._speed("float"), "packed": self._speed("packed", True)},
            "training": {
                "steps": training.steps if training else None,
                "seconds": training.seconds if training else None,
                "peak_memory_bytes": self.peak_memory_bytes,
                "codes_changed": training.codes_changed if training else None,
                "clip_rate": training.clip_rate if training else None,
            },
            "verify": {
                "codes_equal": check.codes_equal if check else None,
                "scales_equal": check.scales_equal if check else None,
                "max_logit_error": check.max_logit_error if check else None,
                "bound": check.bound if check else None,
            },
        }

    def _of(self, row: str, name: str) -> float | None:
        return getattr(self.perplexity[row], name) if row in self.perplexity else None

    def _speed(self, row: str, with_bandwidth: bool = False) -> dict[str, float | None]:
        speed = self.throughput.get(row)
        result = {
            "prefill_tok_s": speed.prefill_tok_s if speed else None,
            "decode_tok_s": speed.decode_tok_s if speed else None,
        }
        if with_bandwidth:
            result["weight_gb_s"] = speed.weight_gb_s if speed else None
        return result


def facts(measured: Measured) -> list[str]:
    """What the scoreboard means, and how it was measured, a line each."""
    lines = [verdict(measured)]
    best = measured.best_ptq()
    if best and "packed" in measured.perplexity and measured.training is not None:
        low, high = bootstrap_difference(measured.perplexity["packed"], measured.perplexity[best])
        lines.append(
            f"perplexity, packed minus {LABELS[best]}: 95 % between {low:+.4f} and {high:+.4f} (paired bootstrap)"
        )
    lines.append(f"measured on {measured_on(measured)}")
    if measured.size:
        ratio = measured.size["packed_bytes"] / measured.size["float_bytes"]
        lines.append(
            f"quantized layers: {measured.size['packed_bytes'] / 1e6:.2f} MB, {ratio:.3f} of float, "
            f"{measured.size['bits_per_weight']:.2f} bits per weight; {measured.coverage.parameters_quantized:.1%} "
            "of all parameters"
        )
    lines += [f"{layer.role}: {layer.scheme}" for layer in measured.coverage.quantized if layer.role]
    if measured.recipe.quant.kv_bits:
        lines.append("key-value cache: int8, a scale per token and head; read by llmqat, other readers use a float one")
    for row, speed in measured.throughput.items():
        kernel = f", {speed.weight_gb_s:.2f} GB/s of weights, kernel {measured.kernel}" if row == "packed" else ""
        lines.append(
            f"{LABELS[row]}: prefill {speed.spread(speed.prefill)} tok/s of {speed.prompt}, decode "
            f"{speed.spread(speed.decode)} tok/s of {speed.new_tokens}{kernel}"
        )
    if measured.training is not None:
        t = measured.training
        memory = "" if measured.peak_memory_bytes is None else f", peak {measured.peak_memory_bytes / 1e9:.2f} GB"
        lines.append(
            f"training: {t.steps} steps, {t.tokens:,} tokens, {t.seconds:.0f} s{memory}; best at step {t.best_step}; "
            f"{t.codes_changed:.1%} of codes changed, {t.clip_rate:.2%} of weights beyond the grid"
        )
    return [*lines, *_verify_lines(measured.verification)]


def measured_on(measured: Measured) -> str:
    """What the scoreboard was measured on, and how."""
    data = measured.data
    return (
        f"{data.tokens:,} test tokens of {measured.recipe.data.dataset}: {data.protocol}, float32 compute, "
        f"ids {data.sha256[:12]}"
    )


def _verify_lines(check: Verification | None) -> list[str]:
    if check is None:
        return []
    logits = ""
    if check.max_logit_error is not None:
        logits = f"; logits within {check.max_logit_error:.1e} of float64 (bound {check.bound:.1e})"
    state = "equal" if check.codes_equal and check.scales_equal else f"DIFFERENT in {', '.join(check.mismatched[:5])}"
    return [f"verify: codes and scales of {check.layers} layers {state} to the trained ones{logits}"]


def verdict(measured: Measured) -> str:
    """Whether training was worth it."""
    gap, recovered = measured.gap(), measured.gap_recovered()
    if gap is None:
        return "no post-training baseline was measured"
    if measured.training is None or "packed" not in measured.perplexity:
        return f"the best post-training quantization costs {gap:.2%} of perplexity"
    if measured.training.best_step == 0:
        return "training found nothing better than its start, which is what was packed; try a lower --lr"
    base, packed = measured.ppl("float"), measured.ppl("packed")
    if base is not None and packed is not None and packed < base:
        text = "the packed model is better than float: training learned the text, not only the grid"
        return (
            text if "float_finetuned" in measured.perplexity else text + "; --control trains float on the same tokens"
        )
    if recovered is None:
        return f"post-training quantization costs nothing here ({gap:+.2%} of perplexity): there is nothing to recover"
    if recovered < 0:
        return (
            f"training made it worse: the best post-training quantization costs {gap:.2%} of perplexity, and the "
            f"packed model {-recovered:.1%} of that more; try a lower --lr or more steps"
        )
    if gap < WORTHWHILE_GAP:
        return (
            f"training recovered {recovered:.1%} of what the best post-training quantization costs, but that is only "
            f"{gap:.2%} of perplexity: it is not worth it here"
        )
    return f"of the {gap:.2%} that the best post-training quantization costs, training recovered {recovered:.1%}"


def show(measured: Measured) -> None:
    """Print scoreboard and facts."""
    from rich.console import Console

    console = Console(soft_wrap=True)
    console.print(scoreboard(measured.perplexity, f"{measured.recipe.model}: {measured.recipe.scheme()}"))
    for line in facts(measured):
        console.print(line, highlight=False)


def write_json(measured: Measured, path: Path) -> None:
    """Write `report.json`."""
    path.write_text(json.dumps(measured.to_dict(), indent=2) + "\n")


def model_card(measured: Measured) -> str:
    """README.md of the packed directory."""
    recipe, env = measured.recipe, environment()
    rows = "\n".join(f"| {' | '.join(row)} |" for row in score_rows(measured.perplexity))
    lines = "\n".join(f"- {line}" for line in facts(measured))
    return f"""---
library_name: transformers
base_model: {recipe.model}
tags: [llmqat, compressed-tensors, int{recipe.quant.bits}]
---
# {Path(recipe.model).name}, {recipe.scheme()}

Quantized by llmqat {__version__} from `{recipe.model}`; codes and scales in this directory are those of training, bit
for bit (`llmqat verify` checks it). The format is compressed-tensors `pack-quantized`: {readers(measured.coverage)}.

| | perplexity | vs float | KL to float | top-1 |
|---|---:|---:|---:|---:|
{rows}

{lines}

Machine: {env["cpu"]}, {env["threads"]} threads; torch {env["torch"]}, transformers {env["transformers"]}. The full
recipe is in `recipe.yaml`, all numbers in `report.json`.

```python
import llmqat
model = llmqat.load("path/to/this/directory")  # runs on the packed weights
{_loading(measured)}```
"""


def _loading(measured: Measured) -> str:
    """How transformers reads the directory, in Python."""
    route = transformers_route(measured.coverage)
    if route is None:
        return ""
    hint = ", quantization_config=CompressedTensorsConfig(dequantize=True)" if route else ""
    return f"""
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
model = AutoModelForCausalLM.from_pretrained("path/to/this/directory"{hint})
"""
