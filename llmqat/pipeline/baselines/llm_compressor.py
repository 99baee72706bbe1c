"""GPTQ (arXiv 2210.17323) by llm-compressor, with its defaults."""

from pathlib import Path
from typing import Any


def run(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Quantize by llm-compressor's GPTQ, on the grid and the calibration rows of the job."""
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from safetensors.torch import load_file, save_file
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto").to(job["device"])
    rows = load_file(job["calibration"])["input_ids"]
    layers_of: dict[tuple[Any, ...], list[str]] = {}
    for name, scheme in job["layers"].items():
        layers_of.setdefault((scheme["bits"], scheme["group_size"], scheme["symmetric"]), []).append(name)
    schemes: dict[str, Any] = {}
    for (bits, size, symmetric), names in layers_of.items():
        rows_of_scales: dict[str, Any] = (
            {"strategy": "channel"} if size == -1 else {"strategy": "group", "group_size": size}
        )
        weights = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, **rows_of_scales)
        schemes[f"group_{len(schemes)}"] = QuantizationScheme(targets=names, weights=weights)
    batches: Any = [{"input_ids": ids} for ids in rows.split(8)]
    oneshot(
        model=model,
        recipe=GPTQModifier(config_groups=schemes),
        dataset=DataLoader(batches, batch_size=None),
        pipeline="sequential",
    )
    found = {}
    for name in job["layers"]:
        layer = model.get_submodule(name)
        zero, g_idx = getattr(layer, "weight_zero_point", None), getattr(layer, "weight_g_idx", None)
        on_grid = fake_quantize(layer.weight, layer.weight_scale, zero, layer.quantization_scheme.weights, g_idx)
        found[f"{name}.weight"] = on_grid.detach().float().cpu().contiguous()
    save_file(found, folder / "weights.safetensors")
    return {}
