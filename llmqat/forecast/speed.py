"""How fast a device multiplies matrices, and how much of that a stage of a run gets."""

import time

import torch

SECONDS = 0.1
SIZE = 1024, 1024, 2048  # of one product: large enough for any device to be at its speed, small enough for any memory


def flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of matrix products in `dtype`, the best of some; takes about `SECONDS`."""
    rows, columns, inner = SIZE
    a = torch.ones(rows, inner, dtype=dtype, device=device)
    b = torch.ones(columns, inner, dtype=dtype, device=device)
    best, end = float("inf"), time.perf_counter() + SECONDS
    torch.nn.functional.linear(a, b)  # warm
    while True:
        start = time.perf_counter()
        torch.nn.functional.linear(a, b)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        now = time.perf_counter()
        best = min(best, now - start)
        if now > end:
            return 2 * rows * columns * inner / best
