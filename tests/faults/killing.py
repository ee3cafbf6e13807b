"""Children that are killed: at a moment, or when they are about to make their n-th change to files."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
"""What Python tells of before it is done, beside files that are opened for writing."""

PATIENCE = 120.0
"""Seconds after which a child that nothing killed is taken for one that hangs."""

Say = Callable[[Any], None]
Work = Callable[[Say], None]


@dataclass(frozen=True)
class Harm:
    """When a child dies: after so many seconds of its work, or before its n-th change (from 1); None = never."""

    seconds: float | None = None
    change: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a child.

    Attributes:
        killed: it died as was asked; False: it had ended before.
        said: what it reported until then.
        error: its traceback, where it failed by itself.
        seconds: of its work.
        changes: changes to files below its folder that it made, where it ended by itself.
    """

    killed: bool
    said: list[Any]
    error: str
    seconds: float
    changes: int


def run_child(work: Work, folder: Path, harm: Harm = Harm()) -> Outcome:
    """Do some work in a fork of this process. ``work`` is given a function that reports to the parent.

    This process must never have started a thread (polars and DuckDB do), since a fork takes over only the one that
    forked.
    """
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _be_child(work, folder, harm, writing)
    os.close(writing)
    return _watch(pid, reading, harm)


def _be_child(work: Work, folder: Path, harm: Harm, writing: int) -> None:
    def say(what: Any) -> None:
        os.write(writing, json.dumps(what).encode() + b"\n")

    code = 0
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        counted = _count_changes(folder, harm.change)
        say("begin")
        began = time.monotonic()
        work(say)
        say({"ended": time.monotonic() - began, "changes": counted[0]})
    except BaseException:
        say({"error": traceback.format_exc()})
        code = 1
    finally:
        os._exit(code)


def _count_changes(folder: Path, last: int | None) -> list[int]:
    counted, below = [0], str(folder.resolve())

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            if not isinstance(arguments[0], str) or not arguments[2] & (os.O_WRONLY | os.O_RDWR):
                return
        elif event not in CHANGES:
            return
        path = os.fspath(arguments[0]) if not isinstance(arguments[0], int) else ""
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        # Removing a tree names what it removes relative to a folder that is open.
        if not path.startswith(below) and (path.startswith("/") or event == "open"):
            return
        counted[0] += 1
        if counted[0] == last:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return counted


def _watch(pid: int, reading: int, harm: Harm) -> Outcome:
    """Wait for a child, and kill it when its time has come."""
    said, rest, began, killed = [], b"", 0.0, False
    os.set_blocking(reading, False)
    limit = time.monotonic() + PATIENCE
    status = None
    while status is None:
        done, code = os.waitpid(pid, os.WNOHANG)
        status = code if done else None
        lines, rest = _read(reading, rest)
        said += lines
        now = time.monotonic()
        if not began and said:
            began = now
        due = harm.seconds is not None and began and now - began >= harm.seconds
        if status is None and (due or now > limit):
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
        if status is None:
            time.sleep(0.0005)
    lines, rest = _read(reading, rest)
    os.close(reading)
    said = [line for line in [*said, *lines] if line != "begin"]
    killed = os.WIFSIGNALED(status)
    end: dict[str, Any] = next((one for one in said if isinstance(one, dict) and "ended" in one), {})
    error = next((one["error"] for one in said if isinstance(one, dict) and "error" in one), "")
    if killed and harm == Harm():
        error = f"a child that nobody was to kill ended by signal {os.WTERMSIG(status)}"
    plain = [one for one in said if not (isinstance(one, dict) and one.keys() & {"ended", "error"})]
    return Outcome(killed and not end, plain, error, float(end.get("ended", 0.0)), int(end.get("changes", 0)))


def _read(reading: int, rest: bytes) -> tuple[list[Any], bytes]:
    while True:
        try:
            part = os.read(reading, 65536)
        except BlockingIOError:
            break
        if not part:
            break
        rest += part
    *lines, rest = rest.split(b"\n")
    return [json.loads(line) for line in lines], rest
