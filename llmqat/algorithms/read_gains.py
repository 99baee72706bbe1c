"""How much each channel of a block's output counts where it is read: the gains of the norms behind the blocks.

A few channels of the stream between blocks can be a hundred times as large as the others ("massive activations", arXiv
2402.17762): four of Gemma 3 270M's 640 hold 82 to 98 % of the squared outputs of each block but the first. The norms
that read the stream have small gains there, and it is behind them that an error does harm.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

TOKENS = 8  # that the model runs on


@torch.no_grad()
def read_gains(model: nn.Module, blocks: Sequence[nn.Module], ids: Tensor) -> list[Tensor]:
    """The gain of the norm that reads each block's output first, ``(channels,)`` for each block.

    Ones where no norm reads it: where the block ends with one, for example.

    Args:
        model: runs once.
        blocks: its blocks, each of which runs once.
        ids: token ids ``(batch, length)``, of which a few are taken.
    """
    outputs, gains = dict[int, Tensor](), dict[int, Tensor]()
    norms = [module for module in model.modules() if getattr(getattr(module, "weight", None), "ndim", None) == 1]

    def returned(index: int, block: nn.Module, args: Any, output: Any) -> None:
        outputs[index] = output[0] if isinstance(output, tuple | list) else output

    def reads(norm: nn.Module, args: tuple[Any, ...]) -> None:
        for index, output in outputs.items():
            if args and args[0] is output and index not in gains:
                gains[index] = gain_of(norm, output)

    with ExitStack() as stack:
        handles: list[Any] = [
            block.register_forward_hook(partial(returned, index)) for index, block in enumerate(blocks)
        ]
        handles += [norm.register_forward_pre_hook(reads) for norm in norms]
        for handle in handles:
            stack.callback(handle.remove)
        model(input_ids=ids[:1, :TOKENS].to(next(model.parameters()).device), use_cache=False)
    return [gains.get(index, torch.ones_like(output[0, 0]).float()) for index, output in sorted(outputs.items())]


def gain_of(norm: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """By how much a LayerNorm or RMSNorm of any convention multiplies each channel, ``(channels,)`` float32.

    Args:
        norm: that is measured on a token of ones with alternating signs, whose mean is 0 and whose size is 1.
        like: a tensor of the shape, dtype and device that it reads.
    """
    signs = 1 - 2 * (torch.arange(like.shape[-1], device=like.device) % 2)
    token = signs.to(like.dtype)[None, None]
    return (norm(token) - norm(-token)).float().abs().flatten() / 2  # what a bias adds cancels out
