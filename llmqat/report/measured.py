"""The numbers that a run measured: those of `report.json`."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llmqat.config import Resolved
from llmqat.formats.verify import Verification
from llmqat.machine import environment
from llmqat.metrics.perplexity import Perplexity, Windows
from llmqat.metrics.throughput import Throughput
from llmqat.models.coverage import CoverageReport
from llmqat.report.names import public_name, public_recipe
from llmqat.report.schema import FORMAT
from llmqat.report.scoreboard import POST_TRAINING, VARIANTS
from llmqat.train.loop import TrainResult
from llmqat.version import __version__


@dataclass
class Measured:
    """Everything a run measured; what it did not stays None.

    Attributes:
        perplexity: result by variant of the model, see `llmqat.report.scoreboard`.
        baselines: versions and seconds of each other tool that the run is compared with.
        also: windows of other texts that each variant was scored on, by dataset.
        tokens: training, calibration and evaluation tokens used.
        size: bytes of the quantized layers, float (in the storage dtype) and packed, and bits per weight of them.
        kernel: implementation that ran the packed layers.
        device: where the codes were derived, and everything was measured.
        stored_format: of the model's weights, where they were dequantized to begin with; see `llmqat.models.loading`.
        peak_memory_bytes: of the process while it trained.
        peak_device_memory_bytes: likewise of the device, where that is not the CPU.
    """

    recipe: Resolved
    coverage: CoverageReport
    data: Windows
    perplexity: dict[str, Perplexity] = field(default_factory=dict)
    baselines: Mapping[str, Any] = field(default_factory=dict)
    also: Mapping[str, Windows] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    size: dict[str, float] = field(default_factory=dict)
    throughput: dict[str, Throughput] = field(default_factory=dict)
    kernel: str | None = None
    training: TrainResult | None = None
    peak_memory_bytes: int | None = None
    peak_device_memory_bytes: int | None = None
    device: str = "cpu"
    stored_format: str = ""
    verification: Verification | None = None

    def on_other_texts(self) -> "Iterator[tuple[str, Measured]]":
        """The run as each of the other texts shows it: name of the dataset, and a `Measured` of that text alone."""
        for name, windows in self.also.items():
            found = {variant: result.also[name] for variant, result in self.perplexity.items() if result.also}
            yield name, replace(self, data=windows, perplexity=found, also={})

    def ppl(self, variant: str) -> float | None:
        """Perplexity of a variant of the model; None if it was not measured."""
        return self.perplexity[variant].perplexity if variant in self.perplexity else None

    def best_ptq(self) -> str | None:
        """The best post-training quantization, by llmqat or another tool; None if none was measured."""
        variants = [variant for variant in POST_TRAINING if variant in self.perplexity]
        return min(variants, key=lambda variant: self.perplexity[variant].perplexity) if variants else None

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
        """The values of `report.json`, with stable keys: numbers measured in this run, null where they were not."""
        training, check = self.training, self.verification
        return {
            "format": FORMAT,
            "llmqat": __version__,
            "model": public_name(self.recipe.model),
            "stored_format": self.stored_format or None,
            "recipe": public_recipe(self.recipe).to_dict(),
            "environment": environment(),
            "device": self.device,
            "tokens": {
                "train": self.tokens.get("train"),
                "calibration": self.tokens.get("calibration"),
                "eval": self.data.tokens,
                "eval_sha256": self.data.sha256,
            },
            **self._scores(),
            "baselines": dict(self.baselines),
            "also": {
                public_name(name): {"tokens": other.data.tokens, "sha256": other.data.sha256, **other._scores()}
                for name, other in self.on_other_texts()
            },
            "coverage": {
                "parameters_quantized": self.coverage.parameters_quantized,
                "skipped": [{"layer": layer.name, "reason": layer.reason} for layer in self.coverage.skipped],
                "kept_round_to_nearest": self.coverage.kept,
            },
            "size": {key: self.size.get(key) for key in ("float_bytes", "packed_bytes", "bits_per_weight")},
            "throughput": {"kernel": self.kernel, "float": self._speed("float"), "packed": self._packed_speed()},
            "training": {
                "steps": training.steps if training else None,
                "seconds": training.seconds if training else None,
                "peak_memory_bytes": self.peak_memory_bytes,
                "peak_device_memory_bytes": self.peak_device_memory_bytes,
                "codes_changed": training.codes_changed if training else None,
                "clip_rate": training.clip_rate if training else None,
            },
            "verify": {
                "codes_equal": check.codes_equal if check else None,
                "scales_equal": check.scales_equal if check else None,
                "max_logit_error": check.max_logit_error if check else None,
                "bound": check.bound if check else None,
                "changed": list(check.changed) if check else None,
                "decode_error": check.decode_error if check else None,
                "decode_bound": check.decode_bound if check else None,
                "greedy_equal": check.greedy_equal if check else None,
            },
        }

    def _scores(self) -> dict[str, Any]:
        return {
            "perplexity": {variant: self.ppl(variant) for variant in VARIANTS},
            "gap_recovered": self.gap_recovered(),
            "kl_to_float": {variant: self._of(variant, "kl_to_float") for variant in VARIANTS[1:]},
            "top1_agreement": {variant: self._of(variant, "top1_agreement") for variant in VARIANTS[1:]},
        }

    def _of(self, variant: str, name: str) -> float | None:
        return getattr(self.perplexity[variant], name) if variant in self.perplexity else None

    def _speed(self, variant: str) -> dict[str, float | None]:
        speed = self.throughput.get(variant)
        return {
            "prefill_tok_s": speed.prefill_tok_s if speed else None,
            "decode_tok_s": speed.decode_tok_s if speed else None,
        }

    def _packed_speed(self) -> dict[str, float | str | None]:
        speed = self.throughput.get("packed")
        return {
            **self._speed("packed"),
            "weight_gb_s": speed.weight_gb_s if speed else None,
            "path": speed.paths.summary() if speed and speed.paths else None,
        }


def write_json(measured: Measured, path: Path) -> None:
    """Write `report.json`."""
    path.write_text(json.dumps(measured.to_dict(), indent=2) + "\n")
