"""AutoRound (arXiv 2309.05516): rounding and ranges of each block by signed gradients, towards its float output."""

from pathlib import Path
from typing import Any


def run(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Quantize by AutoRound's defaults, on the grid and the calibration rows of the job."""
    import torch
    from auto_round import AutoRound
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    rows = load_file(job["calibration"])["input_ids"]
    grids = {
        name: {"bits": scheme["bits"], "group_size": scheme["group_size"], "sym": scheme["symmetric"]}
        for name, scheme in job["layers"].items()
    }
    first = next(iter(grids.values()))
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    chosen = {"iters": job["steps"], "batch_size": job["batch"]}
    tool = AutoRound(
        model,
        AutoTokenizer.from_pretrained(job["model"]),
        **first,
        layer_config={name: grids.get(name, {"bits": 16}) for name in linear if grids.get(name) != first},
        **{key: value for key, value in chosen.items() if value is not None},
        nsamples=len(rows),
        seqlen=rows.shape[1],
        seed=job["seed"],
        dataset=[{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in rows],
        device_map=job["device"],
        enable_torch_compile=False,
    )
    quantized, _ = tool.quantize()
    found = {f"{name}.weight": quantized.get_submodule(name).weight.detach() for name in grids}
    save_file(
        {name: weight.float().cpu().contiguous() for name, weight in found.items()}, folder / "weights.safetensors"
    )
    return {}
