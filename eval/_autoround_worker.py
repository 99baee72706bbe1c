"""One AutoRound run. `post_training.py` starts it, in an environment of its own, with a job as JSON.

Writes ``weights.safetensors``, what the quantized layers compute with, and ``worker.json``, seconds and versions, to
the folder ``scratch``.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGES = ("auto-round", "transformers", "torch")


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Quantize one model by AutoRound's defaults, but for the steps, the batch and what is calibrated on."""
    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    rows = load_file(Path(job["scratch"]) / "calibration.safetensors")["input_ids"]
    batches = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in rows]
    count = job["blocks"] or model.config.num_hidden_layers
    kept_float = {
        name: {"bits": 16}
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name and int(name.split(".")[2]) >= count
    }
    tuner = AutoRound(
        model,
        AutoTokenizer.from_pretrained(job["model"]),
        bits=job["bits"],
        group_size=job["group_size"],
        sym=not job["asym"],
        iters=job["steps"],
        batch_size=job["batch"],
        nsamples=len(rows),
        seqlen=rows.shape[1],
        seed=job["seed"],
        dataset=batches,
        layer_config=kept_float,
        device_map="cpu",
        enable_torch_compile=False,
    )
    started, cpu = time.perf_counter(), time.process_time()
    quantized, _ = tuner.quantize()
    seconds = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
    weights = {name: value.float().contiguous() for name, value in quantized.state_dict().items() if ".layers." in name}
    save_file(weights, Path(job["scratch"]) / "weights.safetensors")
    return seconds | {"environment": {name: version(name) for name in PACKAGES}}


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    result = run(job)
    (Path(job["scratch"]) / "worker.json").write_text(json.dumps(result))
