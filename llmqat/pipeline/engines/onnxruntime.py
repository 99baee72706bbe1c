"""ONNX Runtime by onnxruntime-genai, in float32."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from .run_passages import log_softmax


class OnnxRuntime:
    """A directory in onnxruntime-genai."""

    def __init__(self, directory: str) -> None:
        import onnxruntime_genai

        self.genai = onnxruntime_genai
        self.model = onnxruntime_genai.Model(directory)
        self.tokenizer = onnxruntime_genai.Tokenizer(self.model)
        said = json.loads((Path(directory) / "tokenizer_config.json").read_text("utf-8"))
        around = said.get("add_bos_token") or said.get("add_eos_token")
        self.tokenizer.update_options(add_special_tokens=str(bool(around)).lower())

    def tokens(self, text: str) -> list[int]:
        """Ids of a text."""
        return [int(token) for token in self.tokenizer.encode(text)]

    def greedy(self, ids: list[int], new: int) -> list[int]:
        """Tokens that continue `ids`, to the end whatever token says that it has come."""
        generator, found = self._fed(ids, len(ids) + new), []
        for _ in range(new):  # its own `generate_next_token` ends at the end of a text
            found.append(int(generator.get_output("logits")[0, -1].argmax()))
            generator.append_tokens(np.array([found[-1:]], np.int32))
        return found

    def log_probabilities(self, ids: list[int]) -> np.ndarray:
        """Log-probabilities of next tokens, from one forward of all of `ids`."""
        return log_softmax(self._fed(ids, len(ids) + 1).get_output("logits")[0, :-1])

    def _fed(self, ids: list[int], length: int) -> Any:
        """A generator that has `ids` in its cache."""
        params = self.genai.GeneratorParams(self.model)
        params.set_search_options(max_length=length, do_sample=False)
        generator = self.genai.Generator(self.model, params)
        generator.append_tokens(np.array([ids], np.int32))
        return generator


def load(directory: str, job: dict[str, Any]) -> OnnxRuntime:
    """The model as onnxruntime-genai loads it."""
    return OnnxRuntime(directory)
