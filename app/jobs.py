"""Commands that the dashboard starts in the background: apply a plan, then measure what came of it; or price and
measure plans for a budget.

A job is a process of its own, ``python -m app.job_runner JOB.json``, which runs ``moescope`` commands one after the
other. It outlives the page, the tab and the dashboard. Two files beside the run say all about it:
``NAME.plans/job-ID.json``, written by whoever starts it, and ``progress-ID.json``, written by the job itself. What it
prints is in ``log-ID.txt``.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import store
from moescope.errors import InputError, RunError, StoreError

State = Literal["running", "done", "failed", "stopped", "lost", "elsewhere"]
"""``lost``: the process went away without a word. ``elsewhere``: it was started on another machine."""

_LOG_BYTES = 4096
_STARTUP = 20.0
"""Seconds that a process may take before it says its first word, from when this one first asked for it: by a clock
that nobody sets."""
_ASKED: dict[tuple[str, float], float] = {}
_GUARD = threading.Lock()
_STARTED: list[subprocess.Popen[bytes]] = []
"""Jobs of this process, so that they are reaped when they end."""


@dataclass(frozen=True)
class Job:
    """One job, as its file says.

    Attributes:
        name: what its files are called by.
        plan: file name of the plan; empty where it follows none.
        digest: of the plan.
        source: folder of the checkpoint; empty where it reads none.
        destination: folder of the new one; empty where it writes none.
        commands: arguments of ``moescope``, one list per command.
        host: machine that it runs on.
        pid: number of its process.
        started: seconds since the epoch.
        run: path of the run beside which it lies.
        title: what it does, for a job that follows no plan.
    """

    name: str
    plan: str
    digest: str
    source: str
    destination: str
    commands: tuple[tuple[str, ...], ...]
    host: str
    pid: int
    started: float
    run: str
    title: str = ""

    @property
    def path(self) -> Path:
        """Its file."""
        return store.plan_path(self.run, "job", self.name)

    @property
    def log(self) -> Path:
        """What it prints."""
        return self.path.with_name(f"log-{self.name}.txt")


@dataclass(frozen=True)
class Status:
    """How far a job is.

    Attributes:
        state: see :data:`State`.
        step: number of the command it is at, from 1.
        command: its name: apply, evaluate or recommend.
        share: 0..1 of its bytes; None = unknown.
        words: the last line that it printed.
        log: the end of what it printed.
    """

    state: State
    step: int
    command: str
    share: float | None
    words: str
    log: str


def start(run: Path, *, plan: Path, digest: str, source: Path, destination: Path, held_out: Sequence[str] = ()) -> Job:
    """Apply a plan in the background; afterwards measure the result on held-out text, where some is given.

    A job of the same plan, source and destination that was stopped goes on where it stopped.

    Args:
        run: the run that the plan lies beside.
        plan: its file.
        digest: of the plan.
        source: folder of the checkpoint.
        destination: folder of the new checkpoint.
        held_out: files or folders of text by their absolute paths, as ``moescope evaluate --data`` takes them.

    Raises:
        InputError: a job is writing to that folder already.
        StoreError: the job's file cannot be written.
    """
    source, destination = source.resolve(), destination.resolve()
    name = hashlib.sha256("\n".join((digest, str(source), str(destination))).encode()).hexdigest()[:12]
    with _GUARD:
        _require_free(run, destination)
        bytes_file = store.plan_path(run, "progress", f"{name}-bytes")
        commands = [_apply_command(run, plan, source, destination, bytes_file)]
        if held_out:
            commands.append(_evaluate_command(run, source, destination, held_out))
        return _launch(
            Job(
                name=name,
                plan=plan.name,
                digest=digest,
                source=str(source),
                destination=str(destination),
                commands=tuple(map(tuple, commands)),
                host=socket.gethostname(),
                pid=0,
                started=_now(run),
                run=str(run.resolve()),
            )
        )


def recommend(
    run: Path, *, memory: int, title: str, options: Sequence[str] = (), source: Path | None = None,
    texts: Sequence[str] = (), curve: bool = False,
) -> Job:  # fmt: skip
    """Price all methods for a budget in the background, and measure the best ones where a model and text are given; the
    recommendation comes to lie beside the run.

    Args:
        run: the run.
        memory: bytes that the weights may take: of the experts, or of the whole model where ``source`` is given.
        title: what the job is called.
        options: further arguments of ``moescope recommend``.
        source: folder of the run's checkpoint.
        texts: files or folders of text to measure on, by their absolute paths.
        curve: price all sizes too.

    Raises:
        InputError: the same is being worked out already.
        StoreError: the job's file cannot be written.
    """
    command = ["recommend", str(run.resolve()), *([str(source.resolve())] if source else []), "--memory", str(memory)]
    command += [*options, *(["--curve"] if curve else []), *(["--data", *texts] if texts else [])]
    return _once(run, command, title=title, source=str(source or ""))


def sweep(run: Path, *, plan: Path, digest: str, source: Path, texts: Sequence[str], title: str) -> Job:
    """Try a plan that changes routing on the model itself; what it costs in loss comes to lie beside the run.

    Args:
        run: the run.
        plan: the plan's file beside it.
        digest: of the plan.
        source: folder of the checkpoint.
        texts: files or folders of held-out text, by their absolute paths.
        title: what the job is called.

    Raises:
        InputError: no text, or the same is being measured already.
        StoreError: the job's file cannot be written.
    """
    if not texts:
        raise InputError("on which text? Name files or folders of held-out text")
    command = ["sweep", str(source.resolve()), "--plan", str(plan.resolve()), "--against", str(run.resolve())]
    command += ["--data", *texts]
    return _once(run, command, title=title, source=str(source.resolve()), plan=plan.name, digest=digest)


def again(job: Job) -> Job:
    """Start a job that ended once more, from the command that it was at; what it wrote before is taken up.

    Raises:
        InputError: it runs, or another one is writing to its folder.
    """
    with _GUARD:
        if job.destination:
            _require_free(Path(job.run), Path(job.destination))
        left = job.commands[status(job).step - 1 :]
        return _launch(replace(job, commands=left, pid=0, started=_now(Path(job.run)), host=socket.gethostname()))


def _once(run: Path, command: Sequence[str], *, title: str, source: str, plan: str = "", digest: str = "") -> Job:
    """Start one command, unless the same runs already."""
    name = hashlib.sha256("\n".join(command).encode()).hexdigest()[:12]
    with _GUARD:
        if any(other.name == name and status(other).state == "running" for other in jobs(run)):
            raise InputError("the same is being worked out already: wait for it, or stop it")
        return _launch(
            Job(
                name=name, plan=plan, digest=digest, source=source, destination="", commands=(tuple(command),),
                host=socket.gethostname(), pid=0, started=_now(run), run=str(run.resolve()), title=title,
            )
        )  # fmt: skip


def _now(run: Path) -> float:
    """Seconds since the epoch; always later than the jobs before, also where the clock was set back meanwhile."""
    return max([time.time(), *(job.started + 1e-3 for job in jobs(run))])


def _require_free(run: Path, destination: Path) -> None:
    for other in jobs(run):
        if other.destination and other.destination == str(destination) and status(other).state == "running":
            raise InputError(f"a job is writing to {destination} already: wait for it, or stop it")


def _apply_command(run: Path, plan: Path, source: Path, destination: Path, progress: Path) -> list[str]:
    where = ["--store", str(run.resolve().parent), "--progress-file", str(progress.resolve())]
    return ["apply", str(plan.resolve()), str(source), "-o", str(destination), *where]


def _evaluate_command(run: Path, source: Path, destination: Path, held_out: Sequence[str]) -> list[str]:
    data = ["--data", *held_out]
    return ["evaluate", str(destination), "--against", str(source), "--beside", str(run.resolve()), *data]


def _launch(job: Job) -> Job:
    for kind in (job.name, f"{job.name}-bytes"):
        store.plan_path(job.run, "progress", kind).unlink(missing_ok=True)
    _write(job)
    command = [sys.executable, "-P", "-m", "app.job_runner", str(job.path)]
    with job.log.open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd=Path(job.run).parent
        )
    _STARTED.append(process)
    started = replace(job, pid=process.pid)
    _write(started)
    return started


def jobs(run: Path) -> list[Job]:
    """The jobs beside a run, the newest first; files that are none are left out."""
    found = []
    for path in store.list_plans(run, "job"):
        try:
            found.append(read(path, run))
        except (StoreError, KeyError, TypeError, ValueError):
            continue
    return sorted(found, key=lambda job: -job.started)


def status(job: Job) -> Status:
    """How far a job is: from its files, and from whether its process is still that one."""
    for process in [process for process in _STARTED if process.poll() is not None]:
        with suppress(ValueError):  # another session was faster
            _STARTED.remove(process)
    said = _document(job, job.name)
    log = _tail(job.log)
    words = next((line.strip() for line in reversed(log.replace("\r", "\n").split("\n")) if line.strip()), "")
    counted = _document(job, f"{job.name}-bytes")
    total, done = _number(counted, "total_bytes"), _number(counted, "done_bytes")
    step = int(min(max(_number(said, "step"), 1), len(job.commands)))
    command = job.commands[step - 1][0]
    share = min(1.0, done / total) if total > 0 and command == "apply" else None
    return Status(_state(job, said), step, command, share, words, log)


def _state(job: Job, said: dict[str, Any]) -> State:
    told: dict[object, State] = {"done": "done", "failed": "failed", "stopped": "stopped"}
    state = said.get("state")
    if isinstance(state, str) and state in told:
        return told[state]
    if job.host != socket.gethostname():
        return "elsewhere"
    return "running" if is_alive(job) or _just_started(job, said) else "lost"


def is_alive(job: Job) -> bool:
    """Whether the job's process runs, and is still that command: numbers of processes are given out again."""
    if job.pid <= 0 or job.host != socket.gethostname():
        return False
    return str(job.path) in _command_line(job.pid)


def stop(job: Job) -> bool:
    """Ask the job's process to stop; what it has written stays, so that it can go on. False: it does not run.

    Raises:
        RunError: the process is someone else's.
    """
    if not is_alive(job):
        return False
    try:
        os.kill(job.pid, signal.SIGTERM)
    except ProcessLookupError:
        return False
    except PermissionError as error:
        raise RunError(f"process {job.pid} cannot be stopped: {error.strerror}") from error
    return True


def _write(job: Job) -> None:
    store.write_plan(job.run, json.dumps(asdict(job), indent=1) + "\n", kind="job", name=job.name)


def read(path: Path, run: Path | None = None) -> Job:
    """A job from its file; beside ``run``, wherever the store lies now.

    Raises:
        StoreError: it cannot be read, or is another job's.
        KeyError, TypeError, ValueError: it is none.
    """
    document = store.read_plan_document(path)
    commands = document["commands"]
    if not isinstance(commands, list) or not all(isinstance(command, list) for command in commands):
        raise TypeError("a job takes commands of words")
    job = Job(**{**document, "commands": tuple(map(tuple, commands))})
    _require_kinds(job)
    if f"job-{job.name}.json" != path.name:
        raise StoreError(f"{path} is another job's file")
    return job if run is None else replace(job, run=str(run.resolve()))


def _require_kinds(job: Job) -> None:
    """Refuse what a file says in other words than a job's: later, texts become paths and numbers processes."""
    texts = (job.name, job.plan, job.digest, job.source, job.destination, job.host, job.run, job.title)
    if not all(isinstance(one, str) and "\0" not in one for one in texts):
        raise TypeError("a job says in text where it runs and on what")
    if not isinstance(job.pid, int) or abs(job.pid) >= 2**31 or not isinstance(job.started, int | float):
        raise TypeError("a job says in numbers which process it is, and since when")
    if not job.commands or not all(one and all(isinstance(word, str) for word in one) for one in job.commands):
        raise ValueError("a job takes commands of words")


def _document(job: Job, name: str) -> dict[str, Any]:
    try:
        return store.read_plan_document(store.plan_path(job.run, "progress", name))
    except StoreError:
        return {}


def _number(document: dict[str, Any], name: str) -> float:
    """A number that another process has written; 0 for what is none."""
    value = document.get(name)
    return float(value) if isinstance(value, int | float) and abs(value) < 2**63 else 0.0


def _just_started(job: Job, said: dict[str, Any]) -> bool:
    """Before its first word: it may not have its number yet, and a process that has just begun has no command line."""
    now = time.monotonic()
    if said:
        _ASKED.pop((str(job.path), job.started), None)
        return False
    if now - _ASKED.setdefault((str(job.path), job.started), now) > _STARTUP:
        return False
    if job.pid:
        try:
            os.kill(job.pid, 0)
        except OSError:
            return False
    return True


def _command_line(pid: int) -> str:
    """The command line of a process; empty where there is none, or only its remains."""
    proc = Path("/proc")
    try:
        if (proc / "self").exists():
            return (proc / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        asked = subprocess.run(["ps", "-o", "command=", "-p", str(pid)], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return asked.stdout


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _LOG_BYTES))
            return file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
