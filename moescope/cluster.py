"""Ray, as far as moescope uses it: joined with deadlines, asked for workers, left without a trace.

Ray is an extra and is imported inside functions. What Ray says of itself stays off the terminal; its usage statistics
are off; a Ray that is started here listens on this machine alone and ends with the block that it was started for.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from moescope import memory
from moescope.answers import require_answer
from moescope.errors import InputError, MoescopeError, RunError

LOCAL = "local"
TRIES = 3
"""Workers that may be lost on one and the same piece of work before it is given up."""

_OBJECT_STORE = 1 << 30
"""Bytes of a local Ray's object store: what is sent is small, and Ray's default takes a third of the memory."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class Cluster:
    """A Ray that has been joined; made by :func:`connected`.

    Attributes:
        ray: the module.
        address: as it was asked for.
        workers: how many run at once.
        cpus: of each; a worker computes with so many threads.
        gpus: of each.
    """

    def __init__(self, ray: Any, address: str, *, workers: int, cpus: float, gpus: float) -> None:
        self.ray, self.address = ray, address
        self.workers, self.cpus, self.gpus = workers, cpus, gpus

    @property
    def version(self) -> str:
        """Of Ray."""
        return str(self.ray.__version__)

    @property
    def options(self) -> dict[str, Any]:
        """What Ray has to give each worker."""
        threads = str(max(1, int(self.cpus)))
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "POLARS_MAX_THREADS")
        variables = dict.fromkeys(names, threads)
        if not self.gpus:  # Ray alone would let them all take the first one
            variables["CUDA_VISIBLE_DEVICES"] = ""
        if self.address == LOCAL:  # the modules of this process, wherever it found them
            variables["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, "runtime_env": {"env_vars": variables}}

    def actor(self, kind: type, *arguments: Any) -> Any:
        """A worker with a state of its own; Ray does not start it again by itself."""
        remote = self.ray.remote(kind).options(**self.options, max_restarts=0, max_task_retries=0)
        return remote.remote(*arguments)

    def room(self) -> int:
        """Workers of this size for which the nodes that are alive have CPUs and GPUs, whoever uses them now."""
        return sum(_fitting(node["Resources"], self.cpus, self.gpus) for node in self.ray.nodes() if node.get("Alive"))

    def map(
        self,
        function: Callable[[Item], Result],
        items: Sequence[Item],
        tell: Callable[[int, int], None] | None = None,
    ) -> Iterator[tuple[int, Result]]:
        """Results of ``function`` on each item as they come, each exactly once, with the item's index.

        How much memory the workers took at most is reported to :mod:`moescope.memory`.

        Args:
            function: importable, or a function that Ray can pickle; it may run twice on an item whose worker was lost.
            items: small ones: each is sent when a worker is free for it.
            tell: called with how many are done, and of how many.

        Raises:
            MoescopeError: what the function raised of ours, as it was.
            RunError: the function failed otherwise, or its worker was lost again and again.
        """
        task = self.ray.remote(_measured).options(**self.options, max_retries=TRIES, retry_exceptions=False)
        waiting = list(enumerate(items))[::-1]
        running: dict[Any, int] = {}
        done = 0
        try:
            while waiting or running:
                while waiting and len(running) < self.workers:
                    index, item = waiting.pop()
                    running[task.remote(function, item)] = index
                ready, _ = self.ray.wait(list(running), num_returns=1)
                index = running.pop(ready[0])
                try:
                    result, peak = self.ray.get(ready[0])
                except Exception as error:
                    raise failure(error, f"piece {index + 1} of {len(items)}") from error
                memory.report_worker(peak)
                done += 1
                if tell is not None:
                    tell(done, len(items))
                yield index, result
        finally:
            for reference in running:
                with suppress(Exception):
                    self.ray.cancel(reference, force=True)

    def in_order(
        self,
        function: Callable[[Item], Result],
        items: Sequence[Item],
        tell: Callable[[int, int], None] | None = None,
    ) -> Iterator[Result]:
        """The results of :meth:`map` in the order of the items; those that come early wait for their turn."""
        early: dict[int, Result] = {}
        turn = 0
        for index, result in self.map(function, items, tell):
            early[index] = result
            while turn in early:
                yield early.pop(turn)
                turn += 1


def _measured(function: Callable[[Item], Result], item: Item) -> tuple[Result, int]:
    """In a worker: the result, and the most memory that the process has held."""
    return function(item), memory.peak()


@contextmanager
def connected(
    address: str, *, workers: int, cpus_per_worker: float = 1, gpus_per_worker: float = 0
) -> Iterator[Cluster]:
    """Join a Ray, or start one on this machine, and leave or end it afterwards.

    Args:
        address: ``local``, or ``HOST:PORT`` of a cluster's head.
        workers: how many are to run at once.
        cpus_per_worker: CPUs, and so threads, of each.
        gpus_per_worker: GPUs of each; a part of one shares it.

    Raises:
        InputError: Ray is not installed, nobody answers, or there are fewer CPUs or GPUs than asked for.
    """
    if workers < 1 or cpus_per_worker <= 0 or gpus_per_worker < 0:
        raise InputError(
            f"{workers} workers of {cpus_per_worker:g} CPUs and {gpus_per_worker:g} GPUs: give at least one worker,"
            " more than 0 CPUs, and no less than 0 GPUs"
        )
    ray = _module()
    if address != LOCAL:
        require_answer(address)
    if ray.is_initialized():
        raise InputError("this process has joined a Ray already: leave it first (ray.shutdown())")
    folder = Path(tempfile.mkdtemp(prefix="mray-", dir="/tmp" if os.path.isdir("/tmp") else None))
    with _sigterm_put_back():
        try:
            _join(ray, address, folder)
            _hush(ray)
            _interrupt_on_sigterm()
            joined = Cluster(ray, address, workers=workers, cpus=cpus_per_worker, gpus=gpus_per_worker)
            _require_room(joined)
            yield joined
        finally:
            with suppress(Exception):
                ray.shutdown()
            _remove(folder)


def _remove(folder: Path) -> None:
    """Remove Ray's folder, in which processes that are ending may still write for a moment."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


def failure(error: Exception, what: str) -> MoescopeError:
    """The error for work that a worker did not finish.

    Args:
        error: what ``ray.get`` raised.
        what: the piece of work, in words.
    """
    import ray.exceptions as known

    cause = getattr(error, "cause", None)
    if isinstance(cause, MoescopeError):
        return cause
    if isinstance(error, MoescopeError):
        return error
    if isinstance(error, known.RayTaskError):
        return told(type(cause).__name__ if cause is not None else type(error).__name__, str(cause or error), what)
    if isinstance(error, known.OutOfMemoryError):
        return RunError(f"{what}: the worker's machine ran out of memory: give fewer --workers, or smaller pieces")
    if isinstance(error, known.RayError):
        return RunError(
            f"{what}: its worker was lost ({type(error).__name__}) {TRIES + 1} times: if the machine is short of"
            " memory, give fewer --workers, or smaller pieces"
        )
    return told(type(error).__name__, str(error), what)


def told(kind: str, message: str, what: str) -> RunError:
    """One line of an exception in a worker."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    last = lines[-1].removeprefix(f"{kind}: ") if lines else "no message"
    if kind == "ModuleNotFoundError":
        last += "; install moescope, in this version, on every node"
    return RunError(f"{what} failed ({kind}: {last[:300]})")


# Joining


def _module() -> Any:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
    except ImportError:
        raise InputError("--ray needs Ray, which is not installed: pip install 'moescope[ray]'") from None
    return ray


def _join(ray: Any, address: str, folder: Path) -> None:
    quiet = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    own = {
        "include_dashboard": False,
        "_temp_dir": str(folder),
        "num_cpus": _own_cpus(),
        "object_store_memory": _OBJECT_STORE,
    }
    try:
        if address == LOCAL:
            with _loopback():
                ray.init(address=LOCAL, **quiet, **own)
        else:
            ray.init(address=address, **quiet)
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no message"]
        raise InputError(f"Ray at {address} could not be joined ({type(error).__name__}: {lines[0][:300]})") from error


def _hush(ray: Any) -> None:
    """Keep what Ray prints about lost workers off the terminal: they are replaced, or told in one line here."""
    worker = getattr(ray._private, "worker", None)
    if worker is not None and hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = lambda *_, **__: None


@contextmanager
def _loopback() -> Iterator[None]:
    """While entered, a Ray that is started listens on 127.0.0.1 alone: Ray does so where it cannot make clusters."""
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _sigterm_put_back() -> Iterator[None]:
    """A context that leaves SIGTERM's handler as it found it.

    Ray's own ones, in Python and below it, would stay when Ray has been left, and end the process without a word.
    """
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _interrupt_on_sigterm() -> None:
    """SIGTERM ends the work as Ctrl-C does, not as Ray does, which prints its stack and aborts."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def _require_room(joined: Cluster) -> None:
    """Compare what was asked for with what the nodes that are alive have, whoever uses it now."""
    nodes = [node["Resources"] for node in joined.ray.nodes() if node.get("Alive")]
    room = joined.room()
    if room >= joined.workers:
        return
    cpus, gpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
    has = "this machine has" if joined.address == LOCAL else f"the {len(nodes)} nodes of {joined.address} have"
    raise InputError(
        f"{joined.workers} workers of {joined.cpus:g} CPUs and {joined.gpus:g} GPUs do not fit: {has} {cpus:g} CPUs and"
        f" {gpus:g} GPUs, room for {room}; give fewer --workers, or smaller --cpus-per-worker or --gpus-per-worker"
    )


def _fitting(resources: Mapping[str, float], cpus: float, gpus: float) -> int:
    """Workers that fit on one node."""
    rounding = 1e-9
    fitting = [int(resources.get("CPU", 0) / cpus + rounding)]
    if gpus:
        fitting.append(int(resources.get("GPU", 0) / gpus + rounding))
    return min(fitting)


def _own_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
