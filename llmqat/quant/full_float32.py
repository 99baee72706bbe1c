"""Products of float32 in float32: users and trainers may have allowed TF32 or bfloat16 in their place."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

NARROWER = ("tf32", "bf16")


@contextmanager
def full_float32() -> Iterator[None]:
    """Multiply matrices of float32 without rounding their entries inside the ``with``, whatever was allowed; then allow
    it again.

    ``torch.set_float32_matmul_precision("high")`` lets GPUs round the entries to TF32, of 11 bits; "medium" also lets
    CPUs with bfloat16 products round them to 8 bits. Code that finds latents, Hessians or errors means float32: other
    entries give other codes.
    """
    products = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [product.fp32_precision for product in products]
    if not any(precision in NARROWER for precision in before):
        yield
        return
    try:
        chosen = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was not chosen by the function that sets this
        chosen = "highest"
    # Not `fp32_precision`: torch refuses to tell the one where the other says something else.
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(chosen)
        for product, precision in zip(products, before, strict=True):
            product.fp32_precision = "none"  # what torch.backends says for all
            if product.fp32_precision != precision:
                product.fp32_precision = precision
