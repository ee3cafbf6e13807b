"""Who collects a run: a lock on a file in its folder, which the system lets go when its process ends.

A lock holds against other processes, not against this one: a notebook that was interrupted goes on with its own run.
"""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

from moescope.errors import StoreError

try:
    import fcntl
except ImportError:  # where files cannot be locked this way, the number of the process has to do
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"
_TRIES, _PAUSE = 5, 0.05
"""A reader that looks whether a folder is locked holds the lock for an instant."""

_held: dict[tuple[int, int], tuple[int, int]] = {}
"""(device, inode) of a lock file -> (descriptor, process): closing any other descriptor of it would let the lock go."""


def take(folder: Path) -> None:
    """Lock a folder for this process, until :func:`release` or its end.

    Raises:
        StoreError: another process holds it; the message says which.
        OSError: the lock file cannot be written.
    """
    if fcntl is None or is_ours(folder):
        return
    descriptor = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o666)
    for left in range(_TRIES, 0, -1):
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError):
            if left == 1:
                os.close(descriptor)
                raise StoreError(
                    f"{folder.name} is being collected by {holder(folder)}: wait for it or stop it first"
                ) from None
            time.sleep(_PAUSE)
        except OSError:  # a file system without locks
            os.close(descriptor)
            return
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)
    status = os.fstat(descriptor)
    _held[status.st_dev, status.st_ino] = (descriptor, os.getpid())


def release(folder: Path) -> None:
    """Let go of a folder, if this process holds it."""
    key = _key(folder)
    if key is not None and is_ours(folder):
        os.close(_held.pop(key)[0])


def is_held(folder: Path) -> bool | None:
    """Whether a process, this one or another, collects into a folder; None where locks cannot tell."""
    if is_ours(folder):
        return True
    if fcntl is None:
        return None
    try:
        descriptor = os.open(folder / NAME, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return False


def is_ours(folder: Path) -> bool:
    """Whether it is this process that holds a folder."""
    key = _key(folder)
    return key is not None and _held.get(key, (0, 0))[1] == os.getpid()


def holder(folder: Path) -> str:
    """Who holds or held a folder, in words."""
    try:
        content = json.loads((folder / NAME).read_text(encoding="utf-8"))
        host, pid = content["host"], int(content["pid"])
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
    return f"process {pid}" + ("" if host == socket.gethostname() else f" on {host}")


def _key(folder: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(folder / NAME)
    except OSError:
        return None
    return status.st_dev, status.st_ino
