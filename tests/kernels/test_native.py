"""The library of compiled kernels: how it is found and forced, its threads, and what it says of itself."""

import os
import subprocess
import sys

import pytest
import torch

from llmqat.errors import LlmqatError
from llmqat.kernels import native


def test_compiled_kernels_are_there():
    assert native.library_path() is not None, "the tests need a C++ compiler: install one and llmqat again"
    assert "portable" in native.available()


FORK = """
import os, torch
from llmqat.kernels import native
torch.set_num_threads(2)
data = torch.ones(1 << 22)
native.read_bandwidth(data)
child = os.fork()
if child == 0:
    native.read_bandwidth(data)
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
print("done")
"""


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


def test_a_forked_process_gets_its_own_threads():
    assert run(FORK).stdout.strip() == "done"


NAME = "from llmqat.kernels import native; print(native.kernel_name())"


@pytest.mark.parametrize("wanted", ["reference", "portable"])
def test_environment_forces_a_kernel(wanted):
    assert run(NAME, LLMQAT_KERNELS=wanted).stdout.strip() == wanted


def test_unknown_kernel_name(monkeypatch):
    monkeypatch.setenv("LLMQAT_KERNELS", "avx1024")
    native.library.cache_clear()
    with pytest.raises(LlmqatError, match="avx1024 is none of reference, portable"):
        native.library()
    native.library.cache_clear()


def test_kernel_that_cannot_run_here(monkeypatch):
    missing = next(name for name in native.ISAS if name not in native.available())
    monkeypatch.setenv("LLMQAT_KERNELS", missing)
    native.library.cache_clear()
    with pytest.raises(LlmqatError, match=f"{missing} cannot run on this machine; it has portable"):
        native.library()
    native.library.cache_clear()


def test_library_of_another_interface(monkeypatch, tmp_path):
    for header in ("llmqat.h", "decoder.h", "training.h"):
        (tmp_path / header).write_bytes((native.SOURCES / header).read_bytes())
    monkeypatch.setattr(native, "SOURCES", tmp_path)
    native.library.cache_clear()
    try:
        assert native.library() is not None
        native.library.cache_clear()
        (tmp_path / "decoder.h").write_text("struct llmqat_block {};")
        with pytest.raises(LlmqatError, match="built from other sources than these: install llmqat again"):
            native.library()
    finally:
        native.library.cache_clear()


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr(native, "library_path", lambda: None)
    native.library.cache_clear()
    try:
        assert native.kernel_name() == "reference"
        assert native.explain().startswith("reference: llmqat was installed without a C++ compiler")
        with pytest.raises(LlmqatError, match="no compiled kernels"):
            native.read_bandwidth(torch.ones(8))
        monkeypatch.setenv("LLMQAT_KERNELS", "portable")
        native.library.cache_clear()
        with pytest.raises(LlmqatError, match="without a C\\+\\+ compiler; install it again"):
            native.library()
    finally:
        native.library.cache_clear()


def test_explain_names_what_runs():
    assert native.explain().startswith(native.kernel_name())
    assert native.read_bandwidth(torch.ones(1 << 22)) > 0
