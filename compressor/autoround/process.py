"""The other process: started, listened to, and ended with this one."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from moescope.errors import InputError, RunError

JOB = Path(__file__).with_name("job.py")

GRACE = 10.0
"""Seconds that a process has to end by itself before it is killed."""

_OFFLINE = {
    "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "AR_ALLOW_W8_ASYM": "1", "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
}  # fmt: skip
"""Nothing is fetched, and AutoRound does not refuse zero points at 8 bits, which it writes and reads rightly."""


def require_auto_round(python: str) -> None:
    """Refuse a Python without AutoRound.

    Raises:
        InputError: with what to install.
    """
    code = "import importlib.util as u, sys; sys.exit(0 if u.find_spec('auto_round') else 3)"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, check=False)
    except OSError as error:
        raise InputError(f"{python} is no Python that can be started: {error.strerror or error}") from error
    if done.returncode:
        raise InputError(f"auto_round is not installed for {python}: pip install 'moescope[quantize]'")


def run_job(python: str, part: str, folder: Path, tell: Callable[[str], None]) -> None:
    """Run a part of a job, ``quantize`` or ``look``, to its end; its lines go to ``tell``.

    If this process is interrupted, so is the job.

    Raises:
        RunError: it failed; with the last line of its stderr.
    """
    process = subprocess.Popen(
        [python, str(JOB), part, str(folder)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, **_OFFLINE},
        start_new_session=True,  # so that it, and what it starts, can be ended together
    )
    assert process.stdout is not None and process.stderr is not None
    last: deque[str] = deque(maxlen=1)
    listeners = [
        threading.Thread(target=_listen, args=(stream, tell, kept), daemon=True)
        for stream, kept in ((process.stdout, deque(maxlen=1)), (process.stderr, last))
    ]
    for listener in listeners:
        listener.start()
    try:
        while (code := _code(process)) is None:
            pass
        for listener in listeners:
            listener.join(GRACE)
    finally:
        _end(process)
    if code:
        said = last[0] if last else f"it ended with code {code} and said nothing"
        raise RunError(f"AutoRound failed: {said}")


def _code(process: subprocess.Popen[str]) -> int | None:
    """What it ended with; None after a moment in which it has not. Waiting without an end could miss an interrupt."""
    try:
        return process.wait(0.2)
    except subprocess.TimeoutExpired:
        return None


def _listen(stream: IO[str], tell: Callable[[str], None], last: deque[str]) -> None:
    for line in stream:  # text mode takes \r for the end of a line, too
        text = line.strip()
        if text:
            last.append(text)
            tell(text)


def _end(process: subprocess.Popen[str]) -> None:
    """End the process and what it started, if it has not ended."""
    if process.poll() is not None:
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
            return
