"""Failures of known kinds are told with a remedy; only what nobody foresaw is called unexpected."""

import errno
import json

import pytest
import torch

from llmqat.cli.failures import line_of
from llmqat.errors import LlmqatError


class HfHubHTTPError(OSError):
    """As huggingface_hub raises where the network fails."""


CASES = [
    (LlmqatError("lower\n--bits"), "lower --bits"),
    (MemoryError(), r"out of memory \(the system has no more\); lower --batch-size or --length"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"), "out of memory .* use --train lora"),
    (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
    (OSError(errno.ENOSPC, "No space left on device", "a"), "cannot write a: No space left on device; free some space"),
    (PermissionError(13, "Permission denied", "b"), "cannot use b: Permission denied; check its name and its permiss"),
    (HfHubHTTPError("503 Service Unavailable"), r"the network failed \(503 .*\); try again, or give local"),
    (ConnectionError("reset"), r"; try again, or give local directories"),
    (json.JSONDecodeError("Expecting value", "", 0), "damaged JSON .*; copy or write the directory again"),
    (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "a text is not UTF-8 .*; convert it"),
    (RecursionError("maximum recursion depth exceeded"), "nested too deeply to be read; check"),
    (ImportError("no module named x"), "a package is missing or broken .*; install llmqat again"),
    (KeyError("x"), "unexpected KeyError: 'x'; --debug shows where"),
]


@pytest.mark.parametrize(("error", "line"), CASES, ids=lambda value: type(value).__name__)
def test_line(error, line):
    import re

    assert re.search(line, line_of(error))
    assert "\n" not in line_of(error)
