"""Shards that must not count: of workers that outlived the process that began the run, and copied ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from moescope.errors import ShardError, StoreError
from profiler.workers.place import Place
from store import RunInfo, RunWriter, filled_tables, located, publish_shard, shard_target
from store.remote.collecting import gather
from store.remote.objects import Objects

pytest.importorskip("fsspec")

FRAMES = {"sequence": {"sequence": [0], "domain": ["code"], "tokens": [2], "prompt_tokens": [2]}}


def test_no_worker_of_an_earlier_driver_adds_a_shard_to_a_run_that_is_resumed(tmp_path: Path) -> None:
    """Nobody knows of its sequences by then: they would count twice."""
    writer = RunWriter.create(tmp_path, "mine", RunInfo(model="toy"))
    target = Place(writer.folder, resuming=False).target
    staged = target.stage(1)
    (staged / "sequence.parquet").touch()
    writer.close()  # as after a kill: what was staged stays
    again = RunWriter.resume(tmp_path, "mine")
    assert again.sequences_done == set()
    with pytest.raises(OSError, match="staging"):
        target.publish(1, staged)
    assert again.shard_names == []
    again.write_shard(FRAMES)
    again.finish()


def test_a_marker_that_was_copied_to_another_number_counts_nothing(tmp_path: Path) -> None:
    url = f"memory://markers-{tmp_path.name}"
    assert publish_shard(shard_target(f"{url}/mine.live"), 1, filled_tables(FRAMES), "shard 1")
    objects = Objects(url)
    objects.create("mine.live/shard-000002.json", objects.read("mine.live/shard-000001.json", 1 << 16))
    folder = tmp_path / "mine.live"
    folder.mkdir()
    with pytest.raises(ShardError, match="it names the files of shard 000001"):
        gather(objects, folder)
    assert [path.name for path in folder.iterdir()] == ["shard-000001"]


def test_a_shard_whose_sequences_were_recorded_anew_counts_nothing(tmp_path: Path) -> None:
    """A worker that outlived its driver, while one process went on with the run, and left some of its part undone."""
    url = f"memory://twice-{tmp_path.name}"
    both = {"sequence": {"sequence": [0, 1], "domain": ["code"] * 2, "tokens": [2, 2], "prompt_tokens": [2, 2]}}
    writer = RunWriter.create(tmp_path, "mine", RunInfo(model="toy"))
    writer.write_shard(FRAMES)
    late = writer.next_shard + 4
    publish_shard(shard_target(f"{url}/mine.live"), late, filled_tables(both), "of a worker that came too late")
    with pytest.raises(ShardError, match=rf"shard-00000{late}.json is of a worker .* sequence 0 .* remove that object"):
        gather(Objects(url), writer.folder)
    assert writer.sequences_done == {0} and len(writer.shard_names) == 1
    Objects(url).remove(f"mine.live/shard-00000{late}.json")
    assert gather(Objects(url), writer.folder) == 1
    writer.close()


def test_a_run_is_not_begun_where_a_shard_of_another_one_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESCOPE_CACHE", str(tmp_path))
    url = f"memory://late-{tmp_path.name}/runs"
    publish_shard(shard_target(f"{url}/mine.live"), 1, filled_tables(FRAMES), "of a worker that came too late")
    writer = RunWriter.create(located(url), "mine", RunInfo(model="toy"))
    with pytest.raises(StoreError, match="has an unfinished run 'mine'"):
        Place(writer.folder, resuming=False)
    assert "mine.live/run.json" not in Objects(url).beneath("mine.live")
    writer.close()
