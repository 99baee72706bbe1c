"""Whether the Triton kernels run on a device, and in words why they do not."""

import os
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import Parameter

from llmqat.kernels import native, training
from llmqat.quant.grid import lacks_values

OLDEST_CAPABILITY = (8, 0)  # bfloat16 in tensor cores, and what `make test` compiles for


def off_because(device: torch.device) -> str | None:
    """Why torch computes on this device instead of the Triton kernels; None if they run."""
    if device.type != "cpu" and not _leaves_to_torch() and training.is_off():
        return f"{training.SWITCH} leaves it to torch"
    return _inference_off_because(device)


def runs_on(device: torch.device) -> bool:
    """Whether the Triton kernels run on this device."""
    return device.type != "cpu" and off_because(device) is None


def runs_inference_on(device: torch.device) -> bool:
    """Whether the Triton kernels multiply by packed weights on this device: where training is torch's, too."""
    return device.type != "cpu" and _inference_off_because(device) is None


def _inference_off_because(device: torch.device) -> str | None:
    if device.type == "cpu":
        return "it is a CPU"
    if _leaves_to_torch():
        return f"LLMQAT_KERNELS={native.REFERENCE} leaves it to torch"
    return _missing_on(device)


def _leaves_to_torch() -> bool:
    return os.environ.get("LLMQAT_KERNELS") == native.REFERENCE


def reads(*tensors: Tensor) -> bool:
    """Whether the Triton kernels run on the device of these tensors and read them: plain ones with values, not empty,
    of floats that they know. What `torch.compile` traces it keeps to itself."""
    if torch.compiler.is_compiling() or lacks_values() or not runs_on(device := tensors[0].device):
        return False
    return all(_is_plain(tensor) and tensor.device == device for tensor in tensors)


def _is_plain(tensor: Tensor) -> bool:
    known = type(tensor) in (Tensor, Parameter) and tensor.dtype in native.DTYPES
    return known and tensor.layout == torch.strided and tensor.numel() > 0


@cache
def _missing_on(device: torch.device) -> str | None:
    if device.type not in ("cuda", "xpu"):
        return f"Triton does not know {device.type} devices"
    if find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST_CAPABILITY:
            return "its compute capability is {}.{}, and the kernels need 8.0".format(*capability)
    return None


def explain(device: torch.device) -> str:
    """One line: what computes on an accelerator, and why it is not the Triton kernels."""
    reason = off_because(device)
    return f"triton {version('triton')}" if reason is None else f"torch, since {reason}"
