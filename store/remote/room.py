"""How much of the disk fetched copies may take: the least recently used leave first."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

from moescope.errors import InputError
from moescope.memory import size_of
from moescope.sizes import size
from store.remote.location import cache_root

COPIES = ".objects"
"""In a mirror: the fetched copies. Everything outside is a link to one of them, or was made on this machine."""

DEFAULT_LIMIT = "100GiB"
_IN_USE = 60.0
"""Seconds for which a copy that was just asked for does not leave."""

_RESERVE = 64 << 20
"""Bytes of the disk that are left to others."""


def make_room(needed: int, what: str) -> None:
    """Let copies go until ``needed`` bytes fit, into ``MOESCOPE_CACHE_LIMIT`` and onto the disk.

    Raises:
        InputError: they cannot; the message has the numbers.
    """
    limit = size_of(os.environ.get("MOESCOPE_CACHE_LIMIT") or DEFAULT_LIMIT)
    if needed > limit:
        raise InputError(
            f"{what} takes {size(needed)}, more than the {size(limit)} that fetched runs may take here: set"
            " MOESCOPE_CACHE_LIMIT higher"
        )
    root = cache_root()
    copies = sorted(_copies(root))
    total, free = sum(taken for _, taken, _ in copies), shutil.disk_usage(root).free - _RESERVE
    for used, taken, path in copies:
        if total + needed <= limit and needed <= free:
            return
        if time.time() - used > _IN_USE:
            with suppress(OSError):
                path.unlink()
                total, free = total - taken, free + taken
    if needed > free:
        raise InputError(
            f"{what} takes {size(needed)}, and the disk of {root} has {size(max(free, 0))} left: make room, or set"
            " MOESCOPE_CACHE to a folder on a larger one"
        )


def used_now(copy: Path) -> None:
    """Remember that a copy was asked for; its time of change stays."""
    with suppress(OSError):
        os.utime(copy, ns=(time.time_ns(), copy.stat().st_mtime_ns))


def _copies(root: Path) -> list[tuple[float, int, Path]]:
    """Time of last use, bytes and path of every fetched copy of all mirrors."""
    found = []
    for path in root.glob(f"*/{COPIES}/[!.]*"):
        with suppress(OSError):
            status = path.stat()
            found.append((status.st_atime, status.st_size, path))
    return found
