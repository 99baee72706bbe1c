"""Keep a module's own dtypes when its model is cast."""

from collections.abc import Callable

from torch import Tensor


def keep_dtype(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The device move of `fn` without its cast: for `Module._apply`, so that ``model.to(torch.bfloat16)`` neither turns
    float32 masters into bfloat16 (small updates would be lost) nor changes the dtype in which scales are stored."""

    def apply(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

    return apply
