"""Two processes that want to collect one run, and what a dead one leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import store
from moescope.errors import ShardError, StoreError
from store import Catalog, RunInfo, RunWriter, live, lock
from tests.app import synthetic

COLLECT = """
import sys, store
writer = store.RunWriter.resume(sys.argv[1], "growing")
writer.write_progress(store.Progress(tokens=16, token_budget=100))
print("ready", flush=True)
sys.stdin.read()
"""


@contextmanager
def other_collector(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that collects the run ``growing``."""
    command = [sys.executable, "-c", COLLECT, str(directory)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "ready\n"
        yield other
    finally:
        other.kill()
        other.communicate()


def test_one_collects_and_the_other_is_told_who(tmp_path: Path) -> None:
    synthetic.live(tmp_path).close()
    folder = tmp_path / "growing.live"
    with other_collector(tmp_path) as other:
        told = f"growing.live is being collected by process {other.pid}: wait for it or stop it first"
        for refused in (
            lambda: RunWriter.resume(tmp_path, "growing"),
            lambda: RunWriter.create(tmp_path, "growing", RunInfo(model="toy")),
            lambda: Catalog(tmp_path).rename("growing", "grown"),
            lambda: Catalog(tmp_path).delete("growing"),
        ):
            with pytest.raises(StoreError) as caught:
                refused()
            assert str(caught.value) == told
        progress = live.read_progress(folder)
        assert progress is not None and progress.state == "collecting"
        # Its number may be given to another process by the time it is dead: the lock tells, not the number.
        content = json.loads((folder / "progress.json").read_text())
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
        (folder / "progress.json").write_text(json.dumps(content | {"pid": os.getppid()}))
        progress = live.read_progress(folder)
        assert progress is not None and progress.state == "interrupted"
        assert RunWriter.resume(tmp_path, "growing").sequences_done == {0, 1, 2}


def test_a_lock_of_another_machine_that_nobody_holds_any_more(tmp_path: Path) -> None:
    writer = synthetic.live(tmp_path)
    writer.close()
    (writer.folder / lock.NAME).write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    content = json.loads((writer.folder / "progress.json").read_text())
    (writer.folder / "progress.json").write_text(json.dumps(content | {"host": "elsewhere", "pid": 1}))
    progress = live.read_progress(writer.folder)
    assert progress is not None and progress.state == "collecting"  # nobody here can tell
    assert lock.holder(writer.folder) == "process 1 on elsewhere"
    RunWriter.resume(tmp_path, "growing").finish()


def test_without_locks_the_number_of_the_process_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "fcntl", None)
    writer = synthetic.live(tmp_path)
    content = json.loads((writer.folder / "progress.json").read_text())
    (writer.folder / "progress.json").write_text(json.dumps(content | {"pid": os.getppid()}))
    with pytest.raises(StoreError, match=f"by process {os.getppid()}"):
        RunWriter.resume(tmp_path, "growing")


def test_where_no_lock_holds_them_apart_one_of_two_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "fcntl", None)  # as on a mount that two machines share without locks
    first = synthetic.live(tmp_path)
    second = RunWriter.resume(tmp_path, "growing")
    first.write_shard(synthetic.tables(3, start=3))
    with pytest.raises(ShardError, match="another process collects this run too"):
        second.write_shard(synthetic.tables(3, start=3))
    with store.open_run(first.finish()) as run:
        assert run.table("sequence")["sequence"].to_list() == list(range(6))


def test_what_a_killed_collector_had_found_out_stays(tmp_path: Path) -> None:
    writer = synthetic.live(tmp_path, shards=0)
    writer.write_shard({name: frame for name, frame in synthetic.tables(3).items() if name != "check"})
    checks = synthetic.tables(1)["check"].select("name", "layer", "step", "status", "detail")
    writer.write_checks(checks.head(1).with_columns(status=synthetic.pl.lit("fail")))
    writer.close()
    resumed = RunWriter.resume(tmp_path, "growing")
    resumed.write_checks(checks.tail(2))
    resumed.write_checks(checks.tail(1))  # in place of its own, not of the other's
    with store.open_run(resumed.folder) as growing:
        assert growing.badge.status == "invalid"
    with store.open_run(resumed.finish()) as run:
        assert len(run.table("check")) == 2 and run.badge.status == "invalid"


def test_a_run_of_a_name_that_was_deleted_inherits_nothing(tmp_path: Path) -> None:
    path = synthetic.finished(tmp_path, "again")
    path.unlink()  # by hand: what lies beside it stays
    writer = RunWriter.create(tmp_path, "again", synthetic.info(sequences=3))
    writer.write_shard(synthetic.tables(3))
    with store.open_run(writer.finish()) as run:
        assert run.metrics().is_empty()


def test_a_run_file_that_is_not_of_the_shards_is_not_taken_for_it(tmp_path: Path) -> None:
    synthetic.live(tmp_path).close()
    (tmp_path / "growing.duckdb").write_bytes(synthetic.finished(tmp_path / "other").read_bytes())
    with pytest.raises(StoreError, match="is not what .* was made from"):
        RunWriter.resume(tmp_path, "growing")
    assert len(live.shards(tmp_path / "growing.live")) == 1
