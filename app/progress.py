"""Progress of long work on bytes: a line on stderr, and a JSON file for other programs; and stopping it kindly."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import store
from app import line
from moescope.errors import InputError

EVERY = 0.5
"""Seconds between two lines."""


class Stoppable:
    """A context in which SIGTERM does what Ctrl-C does: it raises ``KeyboardInterrupt``, so that work can tidy up.

    Inside another one, and in a thread other than the main one, where signals cannot be caught, it does nothing.

    Attributes:
        stopped: SIGTERM came.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._caught = False

    def __enter__(self) -> Stoppable:
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._interrupt)
            self._caught = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._caught:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True
        raise KeyboardInterrupt


class ByteProgress:
    """Called with the bytes done and the bytes in all; says so twice a second. A context: leaving it ends the line.

    Args:
        what: is being done: the first word of the line.
        file: JSON file with done_bytes, total_bytes, bytes_per_second and seconds_left (null = unknown), replaced at
            once each time.
        clock: seconds, for tests.

    Raises:
        InputError: the file cannot be written.
    """

    def __init__(self, what: str, *, file: Path | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._what, self._file, self._clock = what, file, clock
        self._first: tuple[float, int] | None = None
        self._told = float("-inf")
        if file is not None:
            self._write(0, 0, 0.0, None)

    def __call__(self, done: int, total: int) -> None:
        """Tell how far it is."""
        now = self._clock()
        if self._first is None:
            self._first = (now, done)
        if now - self._told < EVERY and done < total:
            return
        self._told = now
        began, already = self._first
        # What was there before this start (a resumed job) took no time of this one.
        speed = (done - already) / (now - began) if now > began else 0.0
        left = (total - done) / speed if speed > 0 else None
        self._show(done, total, speed, left)
        if self._file is not None:
            self._write(done, total, speed, left)

    def __enter__(self) -> ByteProgress:
        return self

    def __exit__(self, *_: object) -> None:
        line.end()

    def _show(self, done: int, total: int, speed: float, left: float | None) -> None:
        from app.text import duration, size

        share = f"{min(1.0, done / total):4.0%} " if total else ""
        text = f"{self._what} {share}{size(done)} of {size(total)}, {size(speed)}/s, {duration(left)} left"
        line.over(text)

    def _write(self, done: int, total: int, speed: float, left: float | None) -> None:
        assert self._file is not None
        document = {"done_bytes": done, "total_bytes": total, "bytes_per_second": round(speed), "seconds_left": left}
        try:
            with store.replacing(self._file, lasting=False) as temporary:
                temporary.write_text(json.dumps(document) + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"--progress-file {self._file}: {error.strerror or error}") from error
