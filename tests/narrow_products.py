"""Products of float32 rounded to bfloat16 wherever torch may do so, also on machines that would not."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
PRODUCTS = {aten.mm, aten.bmm, aten.mv, aten.addmm, aten.addmm_, aten.baddbmm}


class _Narrow(TorchDispatchMode):
    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator.overloadpacket in PRODUCTS and torch.get_float32_matmul_precision() != "highest":
            args = (*args[:-2], *map(_rounded, args[-2:]))
        return operator(*args, **(kwargs or {}))


def _rounded(factor: Tensor) -> Tensor:
    return factor.bfloat16().float() if factor.dtype == torch.float32 else factor


@contextmanager
def narrow_products() -> Iterator[None]:
    """Allow torch to multiply float32 in bfloat16 inside the ``with``, as users do; and let it do so."""
    torch.set_float32_matmul_precision("medium")
    try:
        with _Narrow():
            yield
    finally:
        torch.set_float32_matmul_precision("highest")
        for product in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
            product.fp32_precision = "none"
