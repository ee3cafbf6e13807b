"""Files that appear whole or not at all; what dead processes left of theirs; and what is said when a disk refuses."""

from __future__ import annotations

import errno
import itertools
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moescope.errors import MoescopeError, RunError, StoreError

_COUNTER = itertools.count()
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NOTHING_LEFT = 1 << 16
"""Bytes free below which a write that failed for no reason is taken to have found the disk full."""

_SHUT = (errno.EROFS, errno.EACCES, errno.EPERM)


def temporary_for(path: Path) -> Path:
    """A hidden name beside ``path`` that no other process and no other thread takes; :func:`sweep` knows whose."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}-{next(_COUNTER)}.tmp")


@contextmanager
def replacing(path: Path, *, lasting: bool = True) -> Iterator[Path]:
    """A temporary name to write to, which becomes ``path`` at once when the block has ended well.

    Args:
        lasting: the file survives a power failure too, and what dead processes left beside it is removed. False: for
            small files that are written again and again.

    Raises:
        OSError: it cannot be written; nothing is left of it, and what was at ``path`` stays.
    """
    temporary = temporary_for(path)
    try:
        if b"\0" in os.fsencode(temporary):
            raise ValueError
    except ValueError:  # a zero byte, or half a character
        raise OSError(errno.EINVAL, "it cannot be the name of a file") from None
    try:
        yield temporary
        if lasting:
            sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        remove(temporary)
        raise
    finally:
        with suppress(OSError):
            temporary.with_name(temporary.name + ".wal").unlink(missing_ok=True)
    if lasting:
        sync(path.parent)
        sweep(path.parent)


def write_whole(path: Path, content: str | bytes, *, lasting: bool = True, then: str = "") -> None:
    """Write a file that readers see whole: the old one or the new one.

    Args:
        lasting: see :func:`replacing`.
        then: see :func:`refusal`.

    Raises:
        RunError: the disk is full.
        StoreError: the folder is gone or cannot be written to.
    """
    try:
        with replacing(path, lasting=lasting) as temporary:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise refusal(path, error, then) from error


def sync(path: Path) -> None:
    """Make a file's content, or the names in a folder, last through a power failure; file systems that cannot, do not.

    Raises:
        OSError: the disk refuses what was written before.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EROFS):
            raise
    finally:
        os.close(descriptor)


def sweep(folder: Path) -> None:
    """Remove what processes of this machine that are no more left half-written in a folder."""
    ours = re.compile(rf"\..+\.{re.escape(socket.gethostname())}-(\d+)-\d+\.tmp(\.wal)?")
    try:
        found = [(entry.name, match[1]) for entry in os.scandir(folder) if (match := ours.fullmatch(entry.name))]
    except OSError:
        return
    for name, pid in found:
        if not is_alive(pid):
            remove(folder / name)


def remove(path: Path) -> None:
    """Remove a file or a folder, as far as that can be done."""
    try:
        path.unlink()
    except FileNotFoundError:
        return
    except OSError:
        shutil.rmtree(path, ignore_errors=True)


def is_alive(pid: int | str) -> bool:
    """Whether a process of this machine has that number."""
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:
        return True
    return int(pid) > 0


def refusal(path: Path, error: Exception, then: str = "") -> MoescopeError:
    """The error for what could not be written to ``path``; ``then``: what to do once it can, after "make room"."""
    code = code_of(error)
    if code in _FULL:
        return RunError(f"{path} cannot be written, the disk of {path.parent} is full: make room{then}")
    if code in _SHUT:
        return StoreError(f"{path} cannot be written ({os.strerror(code)}): choose a folder that can be written to")
    return StoreError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}")


def code_of(error: BaseException) -> int:
    """The system's number of an error, also where a library tells it in words; 0 where there is none."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    text = str(error)
    found = re.search(r"os error (\d+)", text)
    if found:
        return int(found[1])
    told = [code for code in (*_FULL, *_SHUT) if os.strerror(code) in text]
    return told[0] if told else 0


def cause(error: Exception, folder: Path) -> Exception:
    """The error, or that the disk of a folder is full where a library says so in no word (Parquet footers)."""
    with suppress(OSError):
        if not code_of(error) and shutil.disk_usage(folder).free < _NOTHING_LEFT:
            return OSError(errno.ENOSPC, str(error))
    return error


def listing(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder, by name; nothing where it is not there.

    Raises:
        StoreError: it is there and cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StoreError(f"{folder} cannot be read: {error.strerror or error}") from error
