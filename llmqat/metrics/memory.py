"""Peak memory of a stretch of work."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """`bytes` holds the peak once the stretch is over: of the process (resident), or of the GPU if there is one."""

    bytes = 0


def _resident_peak() -> int:
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Measure the peak inside the ``with``; where the system cannot reset its counter, the peak since the start.

    Returns:
        an object whose ``bytes`` is set when the ``with`` ends.
    """
    peak = Peak()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        try:
            _CLEAR.write_text("5")
        except OSError:
            pass
    try:
        yield peak
    finally:
        peak.bytes = torch.cuda.max_memory_allocated() if cuda else _resident_peak()
