"""Metrics on the workers of a Ray: the same rows in the same order as here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import store
from moescope import cluster, memory
from moescope.errors import StoreError
from profiler import headline
from profiler.headline.spread import compute_on
from profiler.importers.job import import_run
from tests.profiler.test_memory_limit import LENGTHS, trace

pytest.importorskip("ray")


@pytest.fixture(scope="module")
def joined() -> Iterator[cluster.Cluster]:
    with cluster.connected("local", workers=2, cpus_per_worker=0.5) as found:
        yield found


def test_rows_are_those_of_one_process(joined: cluster.Cluster, tmp_path: Path) -> None:
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
