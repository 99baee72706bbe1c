"""Peak memory of a stretch of work."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """The peak, once the stretch is over.

    Attributes:
        bytes: of the process, resident.
        device_bytes: that torch had handed out on the accelerator; None without one, and for one that does not count.
    """

    bytes = 0
    device_bytes: int | None = None


def _resident_peak() -> int:
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def peak_memory(device: torch.device | str = "cpu") -> Iterator[Peak]:
    """Measure the peak inside the ``with``; where the system cannot reset its counter, the peak since the start.

    Args:
        device: an accelerator whose memory is measured beside that of the process.

    Returns:
        an object whose ``bytes`` and ``device_bytes`` are set when the ``with`` ends.
    """
    peak, device = Peak(), torch.device(device)
    counts = device.type not in ("cpu", "mps")
    if counts:
        torch.accelerator.reset_peak_memory_stats(device)
    try:
        _CLEAR.write_text("5")
    except OSError:
        pass
    try:
        yield peak
    finally:
        peak.bytes = _resident_peak()
        peak.device_bytes = torch.accelerator.max_memory_allocated(device) if counts else None
