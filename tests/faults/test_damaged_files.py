"""Files that were damaged, deleted or replaced: named, with what to do, and everything else can still be read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import store
from app.cli import main
from moescope.errors import MoescopeError, ShardError, StoreError
from store import RunWriter
from tests.app import synthetic
from tests.faults.small import TOKENS, collected


def _spoil(file: Path, *, begin: float = 0.3) -> None:
    """Overwrite a part of a file in its midst, as a bad disk does."""
    content = bytearray(file.read_bytes())
    start = int(len(content) * begin)
    content[start : start + len(content) // 2] = b"\xa5" * (len(content) // 2)
    file.write_bytes(content)


@pytest.mark.parametrize("torn", [False, True])
def test_a_damaged_shard_is_named_and_recorded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torn: bool
) -> None:
    def stop(progress: store.Progress) -> None:
        if progress.tokens > TOKENS // 2:
            raise KeyboardInterrupt

    runs = tmp_path / "runs"
    with pytest.raises(MoescopeError, match="--resume"):
        collected(runs, monkeypatch, progress=stop)
    shard = runs / "small.live" / "shard-000001"
    for file in ("expert_load.parquet", "sequence.parquet"):
        (shard / file).write_bytes(b"PAR1") if torn else _spoil(shard / file)
    with pytest.raises(ShardError) as caught:
        collected(runs, monkeypatch, resume=True)
    assert f"{shard}/" in str(caught.value) and f"remove {shard} and go on with --resume" in str(caught.value)
    with pytest.raises(MoescopeError, match="shard-000001"), store.open_run(runs / "small.live") as live:
        live.table("expert_load")
    shutil.rmtree(shard)
    with store.open_run(collected(runs, monkeypatch, resume=True)) as run:
        assert run.info.tokens == run.table("router_load").filter(layer=0)["tokens"].sum() > TOKENS // 2


def test_a_damaged_run_file_does_not_hide_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = synthetic.finished(tmp_path, "bad"), synthetic.finished(tmp_path, "good")
    copy = path.read_bytes()
    _spoil(path)
    with pytest.raises(StoreError, match="bad.duckdb"), store.open_run(path) as run:
        for name in store.tables():
            run.table(name)
    assert main(["runs", "--store", str(tmp_path)]) == 0
    assert "good" in capsys.readouterr().out
    path.write_bytes(copy)
    with store.open_run(path) as run:
        assert run.info.sequences == 9


@pytest.mark.parametrize("content", [b"", b"no database", None])
def test_damaged_metrics_count_as_missing_and_are_made_again(tmp_path: Path, content: bytes | None) -> None:
    path = synthetic.finished(tmp_path, sequences=3)
    beside = store.derived.path_of(path)
    beside.write_bytes(content) if content is not None else _spoil(beside, begin=0.0)
    with store.open_run(path) as run:
        assert run.info.sequences == 3 and run.metrics().is_empty()
        assert run.unreadable == (
            "synthetic.derived.duckdb cannot be read, so the metrics are missing: moescope runs compute synthetic "
            "makes them again",
        )
    store.write_metrics(path, synthetic.derived())
    with store.open_run(path) as run:
        assert not run.unreadable and not run.metrics("srp").is_empty()


def test_a_run_that_is_deleted_or_replaced_while_it_is_open(tmp_path: Path) -> None:
    path = synthetic.finished(tmp_path, sequences=3)
    with store.open_run(path) as old:
        synthetic.finished(tmp_path / "new", sequences=6)
        (tmp_path / "new" / "synthetic.duckdb").replace(path)
        assert len(old.table("sequence")) == 3  # what was opened goes on being read
        with store.open_run(path) as new:
            assert len(new.table("sequence")) == 6
        store.Catalog(tmp_path).delete("synthetic")
        assert len(old.table("route_chunk")) == 3 * len(synthetic.LAYERS)
    writer = synthetic.live(tmp_path, "growing")
    with store.open_run(writer.folder) as growing:
        writer.finish()
        with pytest.raises(StoreError, match="was finished, renamed or deleted while it was read"):
            growing.table("expert_load")
    resumed = RunWriter.create(tmp_path, "later", synthetic.info())
    assert resumed.folder.is_dir()
