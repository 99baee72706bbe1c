"""Runs in a forked child what may end a process, or never end: native code on arguments that nobody foresaw."""

import json
import os
import select
import signal
import traceback
from collections.abc import Callable
from typing import Any

import torch

from llmqat.kernels.native import own_threads
from tests.fuzz.conftest import SECONDS

THREADS = 2  # of the kernels; torch's own do not survive a fork


def in_child(function: Callable[..., Any], *args: Any, seconds: int = SECONDS) -> Any:
    """What a function returns, as JSON has it, in a forked process that has a limited time.

    Fails with what it raises there, with the signal that ends it, or where it hangs.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _answer(writing, function, args)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        hangs = not select.select([pipe], [], [], seconds)[0]
        if hangs:
            os.kill(child, signal.SIGKILL)
        answer = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert not hangs, f"still running after {seconds} s"
    assert code == 0, f"ended by {signal.Signals(-code).name}" if code < 0 else f"left with the exit code {code}"
    result = json.loads(answer)
    assert "raised" not in result, result["raised"]
    return result["returned"]


def _answer(pipe: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Write what the function returns or raises, and leave without the exit handlers of the parent."""
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        torch.set_num_threads(THREADS)
        try:
            with own_threads():
                answer = {"returned": function(*args)}
        except BaseException:
            answer = {"raised": traceback.format_exc()[-3000:]}
        os.write(pipe, json.dumps(answer).encode())
        code = 0
    finally:
        os._exit(code)
