"""Shapes that are measured. Standard library only: every environment reads this file."""

from dataclasses import dataclass

GROUP_SIZE = 128


@dataclass(frozen=True)
class ModelShape:
    """A Llama with random weights, its head tied to the embedding."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    context: int = 2048
    rope_theta: float = 500000.0
    norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        """Features of one attention head."""
        return self.hidden // self.heads


MODELS = {
    "llama-1b": ModelShape(hidden=2048, layers=16, heads=32, kv_heads=8, intermediate=8192, vocab=128256),
    "llama-110m": ModelShape(hidden=768, layers=12, heads=12, kv_heads=12, intermediate=2048, vocab=32000),
    "tiny": ModelShape(hidden=256, layers=2, heads=4, kv_heads=2, intermediate=512, vocab=512),
}
# Set -> layer -> (out, in). The last two of a set are what llmqat.load makes of the layers that share an input.
LAYERS = {
    "1b": {
        "q, o": (2048, 2048),
        "k, v": (512, 2048),
        "gate, up": (8192, 2048),
        "down": (2048, 8192),
        "q+k+v": (3072, 2048),
        "gate+up": (16384, 2048),
    },
    "8b": {
        "q, o": (4096, 4096),
        "k, v": (1024, 4096),
        "gate, up": (14336, 4096),
        "down": (4096, 14336),
        "q+k+v": (6144, 4096),
        "gate+up": (28672, 4096),
    },
    "tiny": {"square": (256, 256), "wide": (512, 256)},
}
