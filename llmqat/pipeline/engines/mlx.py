"""MLX by mlx-lm, in float32: scales and float parts of 16 bits become wider, and none of them changes."""

from typing import Any

import numpy as np

from .run_passages import log_softmax


class Mlx:
    """A directory in mlx-lm."""

    def __init__(self, directory: str, dtype: str) -> None:
        import mlx.core as mx
        from mlx_lm import load as load_model

        self.mx = mx
        self.model, self.tokenizer = load_model(directory)
        self.model.set_dtype(getattr(mx, dtype))

    def tokens(self, text: str) -> list[int]:
        """Ids of a text."""
        ids: list[int] = self.tokenizer.encode(text)
        return ids

    def greedy(self, ids: list[int], new: int) -> list[int]:
        """Tokens that continue `ids`."""
        from mlx_lm.generate import generate_step

        return [int(token) for token, _ in generate_step(self.mx.array(ids), self.model, max_tokens=new)]

    def log_probabilities(self, ids: list[int]) -> np.ndarray:
        """Log-probabilities of next tokens, from one forward without a cache."""
        return log_softmax(np.array(self.model(self.mx.array([ids]))[0, :-1]))


def load(directory: str, job: dict[str, Any]) -> Mlx:
    """The model as `mlx_lm.load` loads it."""
    return Mlx(directory, job["dtype"])
