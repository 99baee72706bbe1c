"""OpenVINO, which reads the graphs of ONNX as they are, on the CPU in float32."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from .run_passages import log_softmax

Cache = dict[str, np.ndarray]
# What it would round by itself: products to bfloat16, activations of int4 layers to int8, the cache to int8.
FLOAT32 = {
    "INFERENCE_PRECISION_HINT": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    "KV_CACHE_PRECISION": "f32",
}


class OpenVino:
    """The graph of a directory in OpenVINO; its tokenizer, which is none of OpenVINO's own, by transformers."""

    def __init__(self, directory: str) -> None:
        import openvino
        from transformers import AutoTokenizer

        self.model = openvino.compile_model(Path(directory) / "model.onnx", "CPU", FLOAT32)
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        decoder = json.loads((Path(directory) / "genai_config.json").read_text("utf-8"))["model"]["decoder"]
        self.empty = np.zeros((1, decoder["num_key_value_heads"], 0, decoder["head_size"]), np.float32)

    def tokens(self, text: str) -> list[int]:
        """Ids of a text."""
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids

    def greedy(self, ids: list[int], new: int) -> list[int]:
        """Tokens that continue `ids`, to the end whatever token says that it has come."""
        cache: Cache = {}
        fed, found = ids, list[int]()
        for step in range(new):
            logits, cache = self._fed(fed, len(ids) + step, cache)
            found.append(int(logits[-1].argmax()))
            fed = found[-1:]
        return found

    def log_probabilities(self, ids: list[int]) -> np.ndarray:
        """Log-probabilities of next tokens, from one forward of all of `ids`."""
        return log_softmax(self._fed(ids, len(ids), {})[0][:-1])

    def _fed(
        self, ids: list[int], length: int, cache: dict[str, np.ndarray]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Logits behind each of `ids`, the last of a text of `length` tokens, and the cache of all of it."""
        names = [entry.get_any_name() for entry in self.model.inputs]
        given = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, length), np.int64),
            "position_ids": np.arange(length - len(ids), length, dtype=np.int64)[None],
        }
        said = self.model({name: given.get(name, cache.get(name, self.empty)) for name in names})
        outputs = {entry.get_any_name(): said[entry] for entry in self.model.outputs}
        logits: np.ndarray = outputs.pop("logits")[0]
        return logits, {name.replace("present", "past_key_values"): kept for name, kept in outputs.items()}


def load(directory: str, job: dict[str, Any]) -> OpenVino:
    """The model as OpenVINO loads it."""
    return OpenVino(directory)
