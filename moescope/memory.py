"""How much memory a command may take (``--memory-limit``), and how much it took.

The limit holds for this process: what it allocates asks :func:`limit` or :func:`share` and makes its blocks so large.
Workers on other processes get the limit of their own.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moescope.errors import InputError
from moescope.sizes import size

FLOOR = 512 << 20
"""The least limit that is taken."""

BASE = 384 << 20
"""What is not shared out: Python with numpy, polars, DuckDB and compiled loops, and what these allocate unasked."""

DATABASE = 0.5
"""The part of the rest (see :func:`share`) that DuckDB may take, for pages that it keeps and for what it sorts."""

_THREAD = 256 << 20

BLOCKS = 0.25
"""The part that blocks of a trace may take."""

IMPORT_BLOCK = 0.6
"""The part that a block of a file takes while it is imported: DuckDB comes after it."""

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_MMAP_THRESHOLD, _ARENA_MAX = -3, -8  # as malloc.h numbers them
_limit: int | None = None
_worker_peak = 0


def size_of(text: str) -> int:
    """Bytes of ``4GiB``, ``500MB``, ``12g`` (10^9 each) or a plain number.

    Raises:
        InputError: it is no size of memory, or nothing.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(I?))?B?\s*", text.upper())
    if found is None:
        raise InputError(f"{text!r} is no size of memory: write 3GiB, 500MiB or a number of bytes")
    number, letter, binary = (part or "" for part in found.groups())
    factor = 1024 ** ("KMGT".index(letter) + 1) if letter and binary else _UNITS[letter]
    if (count := int(float(number) * factor)) < 1:
        raise InputError(f"{text!r} must be more than nothing")
    return count


@contextmanager
def limited(limit: int | None, *, floor: int = FLOOR) -> Iterator[None]:
    """Work within so many bytes in this process; None = as before.

    Raises:
        InputError: fewer than ``floor``, or than this process holds already.
    """
    global _limit
    if limit is not None and limit < (least := max(floor, held())):
        raise InputError(
            f"a memory limit of {size(limit)} is below the {size(least)} that this takes with the smallest blocks: "
            f"give --memory-limit {-(-least >> 20)}MiB or more"
        )
    before = _limit
    if limit is not None:
        _limit = limit
        _give_back_at_once()
    try:
        yield
    finally:
        _limit = before


def _give_back_at_once() -> None:
    """Let arrays that are freed leave this process: the C library keeps room for as many as there once were."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    option = getattr(library, "mallopt", None)
    if option is not None:
        option(_MMAP_THRESHOLD, 1 << 18)
        option(_ARENA_MAX, 2)


def limit() -> int | None:
    """Bytes that this process may hold at most; None where nobody said so."""
    return _limit


def share(part: float, most: int) -> int:
    """Bytes for something that gets a part (0..1) of what the limit leaves beside :data:`BASE`; at most ``most``."""
    if _limit is None:
        return most
    return min(most, int(part * max(_limit - BASE, FLOOR - BASE)))


def database() -> tuple[int, int] | None:
    """Bytes and threads for DuckDB, which lets each thread unpack a part of a file of its own; None without a limit."""
    if _limit is None:
        return None
    within = share(DATABASE, _limit)
    return within, max(1, min(os.cpu_count() or 1, within // _THREAD))


def needed(count: int, part: float) -> int:
    """The least limit of which :func:`share` gives ``count`` bytes to something that gets ``part``."""
    return max(FLOOR, BASE + -(-int(count / part) >> 20 << 20))


def peak() -> int:
    """Bytes that this process held at most since it began."""
    found = _status("VmHWM")
    if found is not None:
        return found
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def report_worker(count: int) -> None:
    """Take note of the peak of a worker in another process, for :func:`summary`."""
    global _worker_peak
    _worker_peak = max(_worker_peak, count)


def worker_peak() -> int:
    """The largest peak that workers reported; 0 where there were none."""
    return _worker_peak


def held() -> int:
    """Bytes that this process holds now; where the system does not say, the most that it held."""
    found = _status("VmRSS")
    return peak() if found is None else found


def summary(limit: int | None = None) -> str:
    """The peak beside the limit, by default the one that holds, for the end of a command."""
    limit = _limit if limit is None else limit
    of = "" if limit is None else f" of {size(limit)}"
    workers = f", of a worker {size(_worker_peak)}" if _worker_peak else ""
    return f"peak of memory: {size(peak())}{of}{workers}"


def _status(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
