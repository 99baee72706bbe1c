"""Triton compiles for GPUs that are not there: what a launch would run, as PTX and in numbers of registers."""

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Compiled(NamedTuple):
    """A kernel as one kind of GPU runs it.

    Attributes:
        name: of the kernel.
        ptx: its assembly.
        registers: of a thread.
        stack: bytes of a thread for what did not fit into registers.
        shared: bytes of shared memory of a program.
    """

    name: str
    ptx: str
    registers: int
    stack: int
    shared: int


class AbsentGpu:
    """Triton's driver of an NVIDIA GPU of a compute capability, 80 for 8.0, that can be compiled for only."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # compiled kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiled_for(capability: int) -> Iterator[list[Compiled]]:
    """Compile what is launched inside the ``with``, in place of running it; the tensors may lie on the CPU."""
    compiled: list[Compiled] = []
    run = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        made = run(kernel, *args, grid=grid, warmup=True, **options)
        numbers = usage(made.asm["cubin"])
        shared = made.metadata.shared
        compiled.append(Compiled(kernel.__name__, made.asm["ptx"], numbers["REG"], numbers["STACK"], shared))
        return made

    driver.set_active(AbsentGpu(capability))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", compile_only)
        yield compiled


def usage(cubin: bytes) -> dict[str, int]:
    """Registers, stack and the rest by name, as the tool says that comes with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    line = next(line for line in said.stdout.splitlines() if "REG:" in line)
    pairs = (part.split(":") for part in line.split())
    return {name: int(number) for name, number in pairs}
