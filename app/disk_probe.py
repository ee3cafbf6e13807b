"""How fast a disk gives what is not in the page cache: a file of random bytes is written, and read in large pieces."""

from __future__ import annotations

import errno
import mmap
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moescope.errors import InputError

PIECE = 32 << 20
"""Bytes of one read that is timed: an expert of a few million weights."""

REQUEST = 8 << 20
"""Bytes that the system is asked for at a time."""

SMALLEST, LARGEST = 64 << 20, 1 << 30
"""Bytes of the file."""

_MEMORY = ("tmpfs", "ramfs")


@dataclass(frozen=True)
class Reading:
    """Reads of one disk.

    Attributes:
        bandwidths: bytes per second of each large read.
        latencies: seconds of each small one.
        how: what kept the page cache out, in words.
    """

    bandwidths: list[float]
    latencies: list[float]
    how: str


def read_speed(folder: Path, *, seconds: float) -> Reading:
    """Bandwidth and latency of reads from a folder's disk, past the page cache where the system allows it.

    Args:
        folder: where a file of up to 1 GiB is written for the time of the measurement.
        seconds: about how long all may take.

    Raises:
        InputError: no such folder, no right to write, no room, or a file system that lies in memory.
    """
    _check(folder)
    room = shutil.disk_usage(folder).free
    if room < 4 * SMALLEST:
        raise InputError(
            f"{folder} has {room >> 20} MiB free: reads are measured on a file; give --disk another folder"
        )
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix="moescope-disk-", suffix=".tmp") as file:
            size = _fill(file.fileno(), min(LARGEST, room // 4), seconds / 2)
            with _opened(Path(file.name)) as (read, how):
                bandwidths = _large_reads(read, size, seconds / 3)
                latencies = _small_reads(read, size, seconds / 6)
    except OSError as error:
        raise InputError(
            f"{folder} cannot be measured: {error.strerror or error}; give --disk another folder"
        ) from error
    return Reading(bandwidths, latencies, f"{PIECE >> 20} MiB at a time of a file of {size >> 20} MiB, {how}")


def _check(folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(f"--disk {folder} is no folder: give one on the disk that experts would be read from")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"--disk {folder} cannot be written to: give a folder of yours on the same disk")
    if (kind := _file_system(folder)) in _MEMORY:
        raise InputError(f"--disk {folder} lies in memory ({kind}): give a folder on a disk")


def _file_system(folder: Path) -> str:
    """Its type, empty where the system does not say."""
    try:
        lines = Path("/proc/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    place, best, found = str(folder.resolve()), -1, ""
    for line in lines:
        point, kind = line.split()[1:3]
        point = point.replace("\\040", " ")
        if (place == point or place.startswith(point.rstrip("/") + "/")) and len(point) >= best:
            best, found = len(point), kind
    return found


def _fill(file: int, wanted: int, seconds: float) -> int:
    """Write random bytes until there are enough or the time is up; returns how many."""
    block = os.urandom(REQUEST)
    end, size = time.perf_counter() + seconds, 0
    while size < SMALLEST or (size < wanted and time.perf_counter() < end):
        size += os.write(file, block)
    os.fsync(file)
    return size // PIECE * PIECE


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Callable[[int, int], None], str]]:
    """What reads (offset, bytes) of the file, and what keeps the page cache out."""
    direct = getattr(os, "O_DIRECT", 0)
    how = "past the page cache (O_DIRECT)"
    try:
        file = os.open(path, os.O_RDONLY | direct)
    except OSError as error:
        if not direct or error.errno != errno.EINVAL:
            raise
        direct = 0
        file = os.open(path, os.O_RDONLY)
    if not direct:
        how = _without_cache(file)
    buffer = mmap.mmap(-1, PIECE)  # begins at a page, as O_DIRECT asks for
    view = memoryview(buffer)

    def read(offset: int, size: int) -> None:
        if not direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        done = 0
        while done < size:
            got = os.preadv(file, [view[done : min(done + REQUEST, size)]], offset + done)
            if not got:
                raise OSError("the file ended early")
            done += got

    try:
        yield read, how
    finally:
        os.close(file)
        view.release()
        buffer.close()


def _without_cache(file: int) -> str:
    """Ask the system to keep the file out of its cache; says what was asked."""
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(file, 48, 1)  # F_NOCACHE
        return "past the page cache (F_NOCACHE)"
    if hasattr(os, "posix_fadvise"):
        return "after asking the system to drop it from the page cache (posix_fadvise)"
    return "perhaps out of the page cache: the system has no way around it"


def _large_reads(read: Callable[[int, int], None], size: int, seconds: float) -> list[float]:
    found: list[float] = []
    end = time.perf_counter() + seconds
    offset = 0
    while len(found) < 5 or (time.perf_counter() < end and len(found) < 1000):
        start = time.perf_counter()
        read(offset, PIECE)
        found.append(PIECE / (time.perf_counter() - start))
        offset = (offset + PIECE) % size
    return found


def _small_reads(read: Callable[[int, int], None], size: int, seconds: float) -> list[float]:
    places = random.Random(0)
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < 5 or (time.perf_counter() < end and len(found) < 1000):
        offset = places.randrange(size // 4096) * 4096
        start = time.perf_counter()
        read(offset, 4096)
        found.append(time.perf_counter() - start)
    return found
