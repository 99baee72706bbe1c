"""Files quantized and scored by llama.cpp. `kept_by_llama_cpp.py` starts it in an environment of its own, with a job as
JSON, and reads the JSON that it writes.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

KINDS = {"Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M}


def quantize(source: Path, kind: str, output: Path) -> None:
    """Quantize a GGUF file as ``llama-quantize`` does; embedding and head stay in float16.

    Raises:
        SystemExit: if llama.cpp reports an error.
    """
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = KINDS[kind]
    options.token_embedding_type = options.output_tensor_type = llama_cpp.GGML_TYPE_F16
    failed = llama_cpp.llama_model_quantize(bytes(source), bytes(output), options)
    if failed:
        raise SystemExit(f"llama.cpp did not quantize {source.name} to {kind}: {failed}")


def losses(file: Path, windows: np.ndarray, threads: int) -> list[float]:
    """Mean cross-entropy of each window ``(windows, length)`` of ids, in nats."""
    length = windows.shape[1]
    options = {"n_ctx": length, "n_batch": length, "n_threads": threads, "n_threads_batch": threads}
    llama = llama_cpp.Llama(str(file), logits_all=True, verbose=False, **options)
    found = []
    for ids in windows:
        llama.reset()
        llama.eval(ids.tolist())
        scores = llama.scores[: length - 1].astype(np.float64)
        top = scores.max(-1, keepdims=True)
        normalizers = np.log(np.exp(scores - top).sum(-1)) + top[:, 0]
        found.append(float((normalizers - scores[np.arange(length - 1), ids[1:]]).mean()))
    return found


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Quantize the files of the job, then score all of them on its texts."""
    files = {name: Path(path) for name, path in job["files"].items()}
    for name, (source, kind) in job["quantize"].items():
        files[name] = files[source].with_name(f"{name}.gguf".replace(" ", "-"))
        quantize(files[source], kind, files[name])
    texts = {name: np.load(path) for name, path in job["texts"].items()}
    rows = {
        name: {
            "bytes": file.stat().st_size,
            **{text: losses(file, ids, job["threads"]) for text, ids in texts.items()},
        }
        for name, file in files.items()
    }
    return {"version": version("llama-cpp-python"), "rows": rows}


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text())
    Path(asked["output"]).write_text(json.dumps(run(asked)))
