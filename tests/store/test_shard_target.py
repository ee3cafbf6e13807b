"""Shards that come late, from workers that outlived the process that began the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from profiler.workers.place import Place
from store import RunInfo, RunWriter


def test_no_worker_of_an_earlier_driver_adds_a_shard_to_a_run_that_is_resumed(tmp_path: Path) -> None:
    """Nobody knows of its sequences by then: they would count twice."""
    writer = RunWriter.create(tmp_path, "mine", RunInfo(model="toy"))
    target = Place(writer.folder, resuming=False).target
    frames = {"sequence": {"sequence": [0], "domain": ["code"], "tokens": [2], "prompt_tokens": [2]}}
    staged = target.stage(1)
    (staged / "sequence.parquet").touch()
    writer.close()  # as after a kill: what was staged stays
    again = RunWriter.resume(tmp_path, "mine")
    assert again.sequences_done == set()
    with pytest.raises(OSError, match="staging"):
        target.publish(1, staged)
    assert again.shard_names == []
    again.write_shard(frames)
    again.finish()
