"""Speed of a model as it is used: prefill and decode at batch 1, with the spread."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from llmqat.config import EvalConfig
from llmqat.errors import LlmqatError
from llmqat.nn.expert_layout import is_fused
from llmqat.nn.experts import SplitExperts
from llmqat.nn.packed_linear import PackedLinear
from llmqat.serve.paths import PathCounts, path_counts

# What configs call the number of experts that a token goes to.
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k")


@dataclass(frozen=True)
class Throughput:
    """Tokens per second at batch 1, a value per repetition.

    Attributes:
        prefill: prompt tokens per second.
        decode: generated tokens per second, the prompt's time left out.
        prompt: tokens of the prompt.
        new_tokens: tokens generated.
        decode_bytes: bytes of weights that one decoded token reads.
        paths: which path the timed calls of a packed model took; None where it was not counted.
    """

    prefill: tuple[float, ...]
    decode: tuple[float, ...]
    prompt: int
    new_tokens: int
    decode_bytes: int
    paths: PathCounts | None = None

    @property
    def prefill_tok_s(self) -> float:
        """Median of `prefill`."""
        return statistics.median(self.prefill)

    @property
    def decode_tok_s(self) -> float:
        """Median of `decode`."""
        return statistics.median(self.decode)

    @property
    def weight_gb_s(self) -> float:
        """Weight bytes read per second of decoding, GB/s."""
        return self.decode_bytes * self.decode_tok_s / 1e9

    def spread(self, values: tuple[float, ...]) -> str:
        """``median [least, greatest]``."""
        return f"{statistics.median(values):,.0f} [{min(values):,.0f}, {max(values):,.0f}]"


def weight_bytes(model: nn.Module) -> int:
    """Bytes of weights that one token reads: all but the input embedding's table, of which it reads one row, and the
    experts it is not routed to.

    A head tied to that table reads all of it.
    """
    embedding = getattr(model.get_input_embeddings(), "weight", None)  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    tied = head is not None and getattr(head, "weight", None) is embedding
    total = _stored_bytes(model)
    config: Any = model.config
    text = config.get_text_config()
    for module in model.modules():
        if isinstance(module, SplitExperts) or is_fused(module):
            experts = len(module) if isinstance(module, SplitExperts) else len(module.down_proj)  # type: ignore[arg-type]
            named = (getattr(text, name, None) for name in CHOSEN)
            chosen = next((number for number in named if isinstance(number, int)), experts)
            total -= _stored_bytes(module) * (experts - chosen) // experts
    return total if tied or embedding is None else total - embedding.numel() * embedding.element_size()


def _stored_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and packed weights."""
    layers = (module for module in model.modules() if isinstance(module, PackedLinear))
    packed = (b for m in layers for b in m.buffers(recurse=False) if b is not m.weight_shape)
    return sum(t.numel() * t.element_size() for t in chain(model.parameters(), packed))


class _Clock:
    """A streamer of `generate` that notes when each token came."""

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self.synchronize = synchronize
        self.times: list[float] = []

    def put(self, _: Tensor) -> None:
        """Note the time; `generate` puts the prompt first, then token by token."""
        self.synchronize()
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to do after the last token."""


@torch.inference_mode()
def _once(model: Any, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds of a prefill, and of `new_tokens` greedy steps of `generate` after its first token."""
    synchronize = (
        (lambda: None) if prompt.device.type == "cpu" else partial(torch.accelerator.synchronize, prompt.device)
    )
    synchronize()
    started = time.perf_counter()
    model(input_ids=prompt, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1)
    synchronize()
    prefill = time.perf_counter() - started
    clock = _Clock(synchronize)
    endless = {"eos_token_id": -1, "pad_token_id": 0}
    model.generate(prompt, do_sample=False, use_cache=True, max_new_tokens=new_tokens + 1, streamer=clock, **endless)
    return prefill, clock.times[-1] - clock.times[1]


def throughput(
    model: Any,
    prompt: int = EvalConfig.prompt,
    new_tokens: int = EvalConfig.new_tokens,
    repeats: int = EvalConfig.repeats,
) -> Throughput:
    """Time `repeats` prefills of `prompt` random tokens, and as often `new_tokens` greedy steps after them.

    Prefill is a call of the model, decoding is `generate`; both are warmed up first.

    Args:
        model: float or packed, on the device and with the threads to be timed.
        prompt: tokens.
        new_tokens: tokens.
        repeats: measurements.

    Returns:
        tokens per second at batch 1, one value per repetition, and their medians.

    Raises:
        LlmqatError: if prompt and new tokens do not fit the model's context, or if a packed model that can run natively
            did not: such numbers say nothing about it.
    """
    text = model.config.get_text_config()
    context = getattr(text, "max_position_embeddings", None)
    if context is not None and prompt + new_tokens > context:
        raise LlmqatError(
            f"{prompt} prompt and {new_tokens} new tokens exceed the model's context of {context}; lower "
            "--prompt-tokens or "
            "--new-tokens"
        )
    model.eval()
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(text.vocab_size, (1, prompt), generator=generator).to(device)
    _once(model, ids, min(new_tokens, 8))
    before = path_counts(model)
    seconds = [_once(model, ids, new_tokens) for _ in range(repeats)]
    paths = path_counts(model) - before
    if device.type == "cpu" and paths.native and paths.reference_calls:
        raise LlmqatError(
            f"throughput was measured on the wrong path ({paths.summary()}); take away what keeps the model from its "
            "native path, or load it with native=False to time the code of transformers"
        )
    prefill, decode = tuple(prompt / p for p, _ in seconds), tuple(new_tokens / d for _, d in seconds)
    packed = any(isinstance(module, PackedLinear) for module in model.modules())
    return Throughput(prefill, decode, prompt, new_tokens, weight_bytes(model), paths if packed else None)
