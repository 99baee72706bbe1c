"""One llm-compressor run. `gptq_vs_llmcompressor.py` starts it, in an environment of its own, with a job as JSON.

Writes the compressed-tensors directory ``output``, and in it ``worker.json``: settings, seconds and versions.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

PACKAGES = ("llmcompressor", "compressed-tensors", "transformers", "torch")


def modifier_of(job: dict[str, Any]) -> GPTQModifier | QuantizationModifier:
    """llm-compressor's defaults, except for the scheme, the damping, and the observer if the job names one.

    With ``group_size`` 128 the scheme is the preset W4A16 or W4A16_ASYM.
    """
    weights = QuantizationArgs(
        num_bits=job["bits"],
        type="int",
        strategy="group",
        group_size=job["group_size"],
        symmetric=job["symmetric"],
        observer=job["observer"],
    )
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    if job["method"] == "rtn":
        return QuantizationModifier(config_groups=groups, ignore=["lm_head"])
    return GPTQModifier(config_groups=groups, ignore=["lm_head"], dampening_frac=job["damp"])


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Quantize and save one model.

    Returns:
        seconds of `oneshot`, the settings it resolved to, and versions.
    """
    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=job["dtype"])
    batches = [{"input_ids": ids} for ids in load_file(job["calibration"])["input_ids"]]
    calibration = {"dataset": DataLoader(batches, batch_size=None), "pipeline": "sequential"}
    modifier = modifier_of(job)
    started = time.perf_counter()
    oneshot(model=model, recipe=modifier, **(calibration if job["method"] == "gptq" else {}))
    seconds = time.perf_counter() - started
    model.save_pretrained(job["output"], save_compressed=True)
    weights = modifier.resolved_config.config_groups["group_0"].weights
    settings = {
        "modifier": type(modifier).__name__,
        "observer": weights.observer,
        "dtype": job["dtype"],
    }
    if job["method"] == "gptq":
        settings |= {
            "actorder": getattr(weights.actorder, "value", weights.actorder),
            "damp": modifier.dampening_frac,
            "block_size": modifier.block_size,
        }
    environment = {name: version(name) for name in PACKAGES} | {"threads": torch.get_num_threads()}
    return {"seconds": seconds, "settings": settings, "environment": environment}


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    result = run(job)
    (Path(job["output"]) / "worker.json").write_text(json.dumps(result))
