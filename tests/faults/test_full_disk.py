"""A disk that is full: what was written before stays, the error says which disk and what to do, and it goes on."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import polars as pl
import pytest

import compressor
import store
from app.images import write_whole
from compressor.checkpoint import destination as destination_module
from moescope.errors import MoescopeError, RunError, ShardError
from tests.app import synthetic
from tests.compressor.apply_cases import drop, saved
from tests.faults.small import TOKENS, collected, mounted, remount


def _is_told(error: MoescopeError, folder: Path, *words: str) -> None:
    text = str(error)
    assert error.exit_code == 1 and "\n" not in text
    assert str(folder) in text and "make room" in text
    for word in words:
        assert word in text


def test_a_collection_goes_on_when_there_is_room_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with mounted(tmp_path / "disk", "size=400k") as disk:
        with pytest.raises(RunError) as caught:
            collected(disk, monkeypatch)
        _is_told(caught.value, disk / "small.live", "--resume", "is kept")
        with store.open_run(disk / "small.live") as live:
            kept = live.table("sequence")["sequence"].to_list()
            assert 0 < live.info.tokens < TOKENS and live.table("expert_load")["tokens"].sum() > 0
        assert not [name for name in os.listdir(disk / "small.live") if name.startswith(".shard")]
        remount(disk, "size=40m")
        with store.open_run(collected(disk, monkeypatch, resume=True)) as run:
            assert set(kept) < set(run.table("sequence")["sequence"].to_list())
            assert run.badge.status == "valid"
            load = run.table("expert_load").filter(kind="routed")["tokens"].sum()
            assert load == run.info.tokens * len(run.layers) * run.layers[0].top_k


def test_a_compaction_leaves_the_shards(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=40m") as disk:
        writer = synthetic.live(disk, shards=2)
        used = sum(file.stat().st_blocks * 512 for file in disk.rglob("*"))
        remount(disk, f"size={(used // 4096 + 40) * 4}k")
        with pytest.raises(ShardError) as caught:
            writer.finish()
        _is_told(caught.value, disk, "--resume", "the shards stay")
        assert os.listdir(disk) == ["growing.live"]
        remount(disk, "size=40m")
        with store.open_run(writer.finish()) as run:
            assert run.info.sequences == 6


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_what_was_there_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    path = synthetic.finished(tmp_path)
    store.write_plan(path, '{"old": 1}', name="mine")
    report = tmp_path / "report.html"
    report.write_text("old")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    def full(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    rows = pl.DataFrame({"metric": ["srp"], "parameters": ["{}"], "value": [0.5]})
    for folder, write in (
        (tmp_path, lambda: store.write_metrics(path, rows)),
        (tmp_path / "synthetic.plans", lambda: store.write_plan(path, '{"new": 1}', name="mine")),
        (tmp_path, lambda: write_whole(report, b"new")),
        (tmp_path, lambda: store.RunWriter.create(tmp_path, "next", synthetic.info())),
    ):
        with pytest.raises(RunError) as caught:
            write()
        _is_told(caught.value, folder)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_a_plan_is_applied_when_there_is_room_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = drop(saved("olmoe", tmp_path / "source", shard="40KB"), (1, 2))
    # A quota is not in what the system says is free.
    usage = shutil._ntuple_diskusage(1 << 40, 0, 1 << 40)  # type: ignore[attr-defined]
    monkeypatch.setattr(destination_module.shutil, "disk_usage", lambda folder: usage)
    with mounted(tmp_path / "disk", "size=200k") as disk:
        with pytest.raises(RunError) as caught:
            compressor.apply(plan, source=tmp_path / "source", destination=disk / "out")
        _is_told(caught.value, disk)
        assert os.listdir(disk) == [".out.partial"]
        remount(disk, "size=40m")
        receipt = compressor.apply(plan, source=tmp_path / "source", destination=disk / "out")
        assert os.listdir(disk) == ["out"] and receipt.bytes_after > 0
