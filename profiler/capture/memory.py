"""How much memory recording really took beside the bare forward, against what was said before it began."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from profiler.capture.check_rows import CheckRow, measured

_STATUS, _PEAKS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peaks() -> None:
    """Forget the peaks so far, where the system can."""
    with suppress(OSError):  # Linux alone can; elsewhere the peak goes on, and what was larger before hides what comes
        _PEAKS.write_text("5")
    for device in _devices():
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes() -> int:
    """Largest resident set of this process so far, and what was allocated on its GPUs."""
    return _host_peak() + sum(torch.cuda.max_memory_allocated(device) for device in _devices())


def _host_peak() -> int:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return size if sys.platform == "darwin" else size * 1024
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def _devices() -> range:
    return range(torch.cuda.device_count()) if torch.cuda.is_initialized() else range(0)


class MemoryWatch:
    """Compares the peak of a collection with that of a bare forward.

    Attributes:
        stated: bytes that recording was said to take at most; None where nobody said.
    """

    def __init__(self) -> None:
        self.stated: int | None = None
        self._bare: int | None = None

    @contextmanager
    def bare_forward(self) -> Iterator[None]:
        """While entered, the model runs a batch without the profiler: what it takes itself."""
        reset_peaks()
        yield
        self._bare = peak_bytes()

    def rows(self) -> list[CheckRow]:
        """The row of table ``check``; none where no bare forward was seen."""
        if self.stated is None or self._bare is None:
            return []
        grown = max(0, peak_bytes() - self._bare)
        detail = (
            f"recording took {_mebibytes(grown)} beside the bare forward; {_mebibytes(self.stated)} were stated before"
            " it began"
        )
        return [measured("extra memory", grown, self.stated, detail, otherwise="warning")]


def _mebibytes(size: int) -> str:
    return f"{size / (1 << 20):,.0f} MiB"
