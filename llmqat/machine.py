"""The machine and the versions a number was measured with."""

import ctypes
import gc
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")
PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors")


def cpu_name() -> str:
    """Model name of the processor."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def available_memory(device: Any = None) -> int:
    """Bytes that a process can still have: of the host, as far as its container allows; or of an accelerator.

    Args:
        device: a `torch.device`; None or one of the CPU for the host.
    """
    if device is not None and device.type != "cpu":
        import torch

        return int(torch.accelerator.get_memory_info(device)[0])
    import psutil

    available = int(psutil.virtual_memory().available)
    limit = CONTAINER_LIMIT.read_text().strip() if CONTAINER_LIMIT.exists() else "max"
    return min(available, int(limit)) if limit.isdigit() else available


def return_freed_memory() -> None:
    """Free what nobody holds, and give memory that is free inside this process back to the system, where the C library
    can (glibc).

    Models that hold each other's methods or hooks live on until Python looks for such circles. The C library keeps the
    holes between small values that live on, and the next stage of a run, whose tensors are of other sizes,
    takes new memory beside them.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def environment() -> dict[str, Any]:
    """The machine and the versions that belong beside every number.

    Returns:
        versions of Python and of packages (None where not installed), name of the CPU, cores, threads of torch, GPU.
    """
    import torch

    found: dict[str, Any] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return {
        **found,
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
