"""Clocks that are set forward and back: nothing that matters hangs on them."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import time
from pathlib import Path

import pytest

import store
from app import jobs
from store import RunWriter, live
from tests.app import synthetic
from tests.faults.small import collected

YEAR = 365 * 86400.0


class Jumping:
    """A clock that is set to another time whenever it is asked."""

    def __init__(self) -> None:
        self._real, self._asked = time.time, 0

    def __call__(self) -> float:
        self._asked += 1
        return self._real() + (YEAR if self._asked % 2 else -YEAR)


def test_shards_keep_their_order_and_versions_differ(tmp_path: Path) -> None:
    writer = synthetic.live(tmp_path, shards=0)
    versions, now = [store.version_of(writer.folder)], time.time()
    for number, moment in enumerate((now, now + YEAR, now - YEAR, now)):
        shard = writer.write_shard(synthetic.tables(3, start=3 * number))
        assert shard is not None
        os.utime(shard, (moment, moment))
        versions.append(store.version_of(writer.folder))
    assert len(set(versions)) == len(versions)
    assert [path.name for path in live.shards(writer.folder)] == [f"shard-{number:06d}" for number in range(4)]
    writer.close()
    resumed = RunWriter.resume(tmp_path, "growing")
    assert resumed.sequences_done == set(range(12))
    resumed.write_shard(synthetic.tables(3, start=12))
    assert [path.name for path in live.shards(writer.folder)][-1] == "shard-000004"
    with store.open_run(resumed.finish()) as run:
        assert run.table("sequence")["sequence"].to_list() == list(range(15))


def test_a_replaced_file_of_the_same_time_and_size_has_another_version(tmp_path: Path) -> None:
    path = synthetic.finished(tmp_path)
    before, status = store.version_of(path), path.stat()
    copy = tmp_path / "copy"
    copy.write_bytes(path.read_bytes())
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
    copy.replace(path)
    assert store.version_of(path) != before


def test_a_collection_does_not_look_at_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", Jumping())
    told: list[store.Progress] = []
    with store.open_run(collected(tmp_path / "runs", monkeypatch, progress=told.append)) as run:
        assert 0 < run.info.seconds < 600
    collecting = [one for one in told if one.tokens]
    assert all(one.tokens_per_second > 0 and (one.seconds_left or 0.0) >= 0 for one in collecting)
    assert [one.tokens for one in collecting] == sorted(one.tokens for one in collecting)


def test_jobs_of_a_clock_that_was_set_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = synthetic.finished(tmp_path)
    monkeypatch.setattr(jobs.subprocess, "Popen", _Nothing)
    monkeypatch.setattr(time, "time", Jumping())
    first = jobs.recommend(run, memory=1, title="first")
    second = jobs.recommend(run, memory=2, title="second")
    third = jobs.recommend(run, memory=3, title="third")
    assert first.started < second.started < third.started
    assert [job.title for job in jobs.jobs(run)] == ["third", "second", "first"]
    # One that has not said a word is given its time by a clock that nobody sets.
    unheard = dataclasses.replace(third, pid=os.getpid(), host=socket.gethostname(), started=time.time() + YEAR)
    store.write_plan(run, json.dumps(dataclasses.asdict(unheard)), kind="job", name=unheard.name)
    assert jobs.status(unheard).state == "running"
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 60.0)
    assert jobs.status(unheard).state == "lost"


class _Nothing:
    """A process that was never started."""

    pid = 0

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def poll(self) -> int:
        return 0
