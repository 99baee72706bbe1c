"""The instruction sets that the kernel tests run on: those of this machine, or of an emulated one."""

import os
import shlex
from functools import cache

import pytest

from llmqat.kernels import native
from tests.kernels.remote import RemoteKernels


@cache
def kernels():
    """The library under test: `LLMQAT_KERNEL_SERVER` is the command of one for another processor (server.cpp)."""
    command = os.environ.get("LLMQAT_KERNEL_SERVER")
    return RemoteKernels(shlex.split(command)) if command else native.library()


def available():
    return [name for number, name in enumerate(native.ISAS) if kernels() and kernels().llmqat_has_isa(number)]


@pytest.fixture(params=available())
def isa(request, monkeypatch):
    """One instruction set of the processor, in use."""
    monkeypatch.setattr(native, "library", kernels)
    kernels().llmqat_use_isa(native.ISAS.index(request.param))
    yield request.param
    kernels().llmqat_use_isa(kernels().llmqat_best_isa())
