"""Joining a Ray: what is refused at once, tasks whose workers die, and metrics and curves that its workers compute."""

import http.server
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

import store
from app.frames.placement import placed
from moescope import answers, cluster, memory
from moescope.errors import InputError, PlanError, RunError, StoreError
from planner.caching import study
from planner.simulate.what_if import what_if
from profiler import headline
from profiler.headline.spread import compute_on
from profiler.importers.job import import_run
from tests.planner.cache_settings import random_routes, slow_machine, written_run
from tests.profiler.test_memory_limit import LENGTHS, trace

pytest.importorskip("ray")


@pytest.fixture(scope="module")
def joined() -> Iterator[cluster.Cluster]:
    before = signal.getsignal(signal.SIGTERM)
    with cluster.connected("local", workers=2, cpus_per_worker=0.5) as found:
        yield found
    # Ray's handlers would end whatever this process does next.
    assert signal.getsignal(signal.SIGTERM) == before


def _square(item: tuple[int, str]) -> int:
    """The square of a number; of 3, its worker dies the first time, of 13 always; 7 is refused, 8 fails."""
    number, folder = item
    if number == 13 or (number == 3 and not Path(folder, "died").exists()):
        Path(folder, "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 7:
        raise PlanError("no 7")
    if number == 8:
        raise ZeroDivisionError("an eight")
    return number * number


def test_each_item_once_though_workers_die(joined: cluster.Cluster, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    items = [(number, str(tmp_path)) for number in range(6)]
    found = list(joined.map(_square, items, lambda done, of: told.append((done, of))))
    assert sorted(found) == [(number, number**2) for number in range(6)]
    assert told == [(done, 6) for done in range(1, 7)]
    assert (tmp_path / "died").exists()


def test_what_goes_wrong_in_tasks_is_one_line(
    joined: cluster.Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "TRIES", 1)

    def outcome(number: int) -> None:
        list(joined.map(_square, [(number, str(tmp_path))]))

    with pytest.raises(PlanError, match="^no 7$"):
        outcome(7)
    with pytest.raises(RunError, match=r"^piece 1 of 1 failed \(ZeroDivisionError: an eight\)$"):
        outcome(8)
    with pytest.raises(RunError, match="^piece 1 of 1: its worker was lost .* fewer --workers"):
        outcome(13)


def test_a_terminated_process_ends_in_order(joined: cluster.Cluster) -> None:
    with pytest.raises(KeyboardInterrupt):  # Ray's own handler would abort the process
        signal.raise_signal(signal.SIGTERM)


def test_a_local_ray_listens_on_this_machine_alone(joined: cluster.Cluster) -> None:
    node = joined.ray.nodes()[0]
    assert node["NodeManagerAddress"] == "127.0.0.1"
    listening = {
        line.split()[1].split(":")[0]
        for line in _sockets()
        if int(line.split()[1].split(":")[1], 16)
        in {
            node["NodeManagerPort"],
            node["ObjectManagerPort"],
            int(joined.ray.get_runtime_context().gcs_address.split(":")[1]),
        }
    }
    assert listening <= {"0100007F", "0000000000000000FFFF00000100007F"} and listening
    with pytest.raises(InputError, match="joined a Ray already"), cluster.connected("local", workers=1):
        pass


def _sockets() -> list[str]:
    """Listening sockets, one line each: number, local address, ..."""
    lines = [line for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return [line.strip() for line in lines if line.split()[3] == "0A"]


def _refused(address: str, **options: float) -> str:
    began = time.monotonic()
    with pytest.raises(InputError) as caught, cluster.connected(address, **{"workers": 1, **options}):  # type: ignore[arg-type]
        pass
    assert time.monotonic() - began < 10
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_joined_is_told_within_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert "no Ray answers" in _refused(f"127.0.0.1:{port}")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        monkeypatch.setattr(http.server.BaseHTTPRequestHandler, "log_message", lambda *_: None)
        monkeypatch.setattr(answers, "RAY_SECONDS", 2.0)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert "does not answer as Ray does" in _refused(f"127.0.0.1:{server.server_port}")
        server.shutdown()
    assert "client mode is not used" in _refused("ray://127.0.0.1:10001")
    assert "give 'local', or HOST:PORT" in _refused("nonsense")
    assert "at least one worker" in _refused("local", workers=0)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "pip install 'moescope[ray]'" in _refused("local")


def test_more_than_the_machine_has_is_refused_with_the_numbers(joined: cluster.Cluster) -> None:
    asked = cluster.Cluster(joined.ray, "local", workers=3, cpus=1, gpus=1)
    with pytest.raises(
        InputError, match="3 workers of 1 CPUs and 1 GPUs do not fit: this machine has .* 0 GPUs, room for 0"
    ):
        cluster._require_room(asked)
    assert joined.room() >= 2


def test_metrics_are_those_of_one_process(joined: cluster.Cluster, tmp_path: Path) -> None:
    file = trace(tmp_path / "t.npz", LENGTHS, layers=3, experts=8, top_k=2)
    path = import_run("npz", file, directory=tmp_path, name="a", metrics=False)
    with store.open_run(path) as run:
        alone = headline.compute(run, whole=True)
    told: list[str] = []
    spread = compute_on(joined, path, whole=True, tell=told.append)
    assert spread[0].equals(alone[0]) and spread[1].equals(alone[1])
    assert told[-1].startswith("computing metrics on 2 workers") and memory.worker_peak() > 50 << 20
    with pytest.raises(StoreError, match="no run at"):
        compute_on(joined, tmp_path / "none.duckdb")


class Backwards:
    """Layers that end in another order."""

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        return ((at, function(items[at])) for at in reversed(range(len(items))))


def test_curves_of_a_whole_trace_are_those_of_one_process(joined: cluster.Cluster, tmp_path: Path) -> None:
    routes = random_routes(5, layers=3, experts=8, k=2, requests=8, length=40)
    run = written_run(tmp_path, routes, domains=["code", "prose"] * 4, prompt=10)
    expected, *found = (
        study(run, slow_machine(), whole=True, other_weights=0, context=64, cluster=workers)
        for workers in (None, cast(Any, Backwards()), joined)
    )
    assert found == [expected, expected]


def test_placements_and_rules_are_those_of_one_process(joined: cluster.Cluster, tmp_path: Path) -> None:
    routes = random_routes(6, layers=3, experts=8, k=2, requests=8, length=40)
    run = written_run(tmp_path, routes, domains=["code", "prose"] * 4)
    asked: dict[str, Any] = {"method": "eplb", "devices": 4, "redundant": 4, "batch": 2}
    alone, shared = (placed(run, **asked, cluster=workers) for workers in (None, joined))
    assert shared.plan.text() == alone.plan.text()
    assert [told.verdict.sentence for told in (shared, alone) if told.verdict] == [alone.verdict.sentence] * 2  # type: ignore[union-attr]
    rule = [what_if(run, "ratio", cluster=workers).load for workers in (None, joined)]
    np.testing.assert_array_equal(rule[1], rule[0])
