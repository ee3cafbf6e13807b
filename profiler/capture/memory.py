"""How much memory recording really took beside the bare forward, against what was said before it began."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import nn

from profiler.capture.check_rows import CheckRow, measured

_HALVES = (torch.bfloat16, torch.float16)
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

    Args:
        model_grows: the model itself takes more with every new shape, see :func:`grows_by_itself`.

    Attributes:
        stated: bytes that recording was said to take at most; None where nobody said.
    """

    def __init__(self, *, model_grows: bool = False) -> None:
        self.stated: int | None = None
        self._bare: int | None = None
        self._model_grows = model_grows

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
        if grown > self.stated and self._model_grows:
            detail = (
                f"the process grew by {_mebibytes(grown)} beyond a bare forward of one batch; recording was to take"
                f" {_mebibytes(self.stated)}. In 16 bits on a CPU the model alone grows with every new shape, whose"
                " kernels are kept, so nothing follows"
            )
            return [CheckRow("extra memory", "skipped", grown, self.stated, detail)]
        return [measured("extra memory", grown, self.stated, detail, otherwise="warning")]


def grows_by_itself(model: nn.Module) -> bool:
    """Whether the model's forwards alone take more memory with every new shape.

    Matrix products in 16 bits on a CPU do: a kernel is compiled and kept per shape, such as per number of tokens.
    """
    return any(one.device.type == "cpu" and one.dtype in _HALVES for one in model.parameters())


def _mebibytes(size: int) -> str:
    return f"{size / (1 << 20):,.0f} MiB"
