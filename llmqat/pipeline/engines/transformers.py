"""transformers by its plain `from_pretrained`."""

import json
from pathlib import Path
from typing import Any

from .torch_model import TorchModel


def load(directory: str, job: dict[str, Any]) -> TorchModel:
    """The model as `AutoModelForCausalLM` loads it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"gguf_file": job["gguf"]} if job["format"] == "gguf" else {}
    options: dict[str, Any] = {"dtype": getattr(torch, job["dtype"]), **source}
    if job["format"] == "packed" and needs_dequantize(directory):
        from transformers import CompressedTensorsConfig

        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(directory, **options).eval()
    return TorchModel(model, AutoTokenizer.from_pretrained(directory, **source))


def needs_dequantize(directory: str) -> bool:
    """Whether a packed directory has what transformers runs dequantized only, and its config.json does not ask for it:
    zero points, or a packed embedding, beside int8 activations, which transformers then drops."""
    quantization = json.loads((Path(directory) / "config.json").read_text("utf-8"))["quantization_config"]
    groups = quantization["config_groups"].values()
    embedding = any("Linear" in group["targets"] and len(group["targets"]) > 1 for group in groups)
    return not quantization.get("dequantize") and (embedding or not all(g["weights"]["symmetric"] for g in groups))
