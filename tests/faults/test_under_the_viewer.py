"""Runs that are collected, renamed, deleted or replaced under the viewer's feet: a sentence, and back again."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

import store
from app.views import PAGES
from moescope.errors import StoreError
from tests.app import synthetic
from tests.app.visiting import visited

VIEWS = [Path(page.file).stem for page in PAGES]


def _said(app: AppTest) -> str:
    kinds = (app.warning, app.error, app.info, app.markdown, app.caption, app.title)
    return "\n".join(str(element.value) for kind in kinds for element in kind).replace("\\", "")


def _drawn(app: AppTest) -> AppTest:
    app.run()
    assert not app.exception, app.exception[0].message
    return app


def _at(module: object, name: str, patch: pytest.MonkeyPatch, first: Callable[[], object]) -> None:
    """Do something once, right before a function is called next."""
    real = getattr(module, name)

    def between(*given: object, **more: object) -> object:
        patch.setattr(module, name, real)
        first()
        return real(*given, **more)

    patch.setattr(module, name, between)


@pytest.mark.parametrize("view", VIEWS)
def test_a_run_that_goes_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, view: str) -> None:
    path = synthetic.finished(tmp_path, "shown", sequences=3)
    away = tmp_path / "away"
    away.mkdir()
    app = visited(monkeypatch, tmp_path, view, run="shown")

    def leave() -> None:
        for file in tmp_path.glob("shown*"):
            shutil.move(file, away / file.name)

    # Between the list and the opening: the list has it, the disk has it no more; the next look finds that out.
    _at(store, "version_of", monkeypatch, leave)
    assert "No runs yet" in _said(_drawn(app))
    # Another of the same name with fewer tables takes its place, and its metrics are damaged.
    synthetic.finished(tmp_path, "shown", sequences=6, activations=False)
    store.derived.path_of(path).write_bytes(b"half")
    assert "shown.derived.duckdb cannot be read" in _said(_drawn(app))
    path.write_bytes(path.read_bytes()[:9000])  # as while it is copied over
    assert "The run cannot be read" in _said(_drawn(app))
    store.Catalog(tmp_path).delete("shown")
    synthetic.finished(tmp_path, "shown", sequences=3)
    again = _said(_drawn(app))
    assert "240 tokens · 3 sequences" in again and "cannot be read" not in again and not app.error


@pytest.mark.parametrize("view", VIEWS)
def test_a_collection_that_ends_while_a_page_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, view: str
) -> None:
    writer = synthetic.live(tmp_path, shards=1)
    app = visited(monkeypatch, tmp_path, view, run="growing")
    writer.write_shard(synthetic.tables(3, start=3))
    (writer.folder / ".shard-000002.elsewhere-1-0.tmp").mkdir()  # one that is being written
    assert app.get("progress") and not _drawn(app).error
    real, ended = store.open_run, []

    def opened(path: Path, **options: object) -> store.Run:
        run = real(path, **options)  # type: ignore[arg-type]
        if not ended:
            ended.append(writer.finish())  # after it was opened, before it is read
        return run

    writer.write_shard(synthetic.tables(3, start=6))
    monkeypatch.setattr(store, "open_run", opened)
    _drawn(app)
    monkeypatch.setattr(store, "open_run", real)
    assert ended and not _drawn(app).error and not app.get("progress")
    with real(ended[0]) as run:
        assert len(run.table("sequence")) == 9


def _open_though_deleted(directory: Path) -> list[str]:
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            found.append(os.readlink(descriptor))
        except OSError:
            continue
    return [name for name in found if name.startswith(str(directory)) and name.endswith("(deleted)")]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the system does not say which files are open")
def test_the_disk_gets_back_what_was_deleted_or_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = synthetic.finished(tmp_path, "shown", sequences=3)
    app = visited(monkeypatch, tmp_path, run="shown")
    synthetic.finished(tmp_path / "new", "shown", sequences=6)
    (tmp_path / "new" / "shown.duckdb").replace(path)
    assert _open_though_deleted(tmp_path)
    assert "6 sequences" in _said(_drawn(app))
    gc.collect()
    assert not _open_though_deleted(tmp_path)
    store.Catalog(tmp_path).delete("shown")
    assert _open_though_deleted(tmp_path)
    assert "No runs yet" in _said(_drawn(app))
    gc.collect()
    assert not _open_though_deleted(tmp_path)


def test_measurements_that_are_half_written_are_not_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = synthetic.finished(tmp_path, sequences=3)
    folder = tmp_path / "synthetic.evaluations"
    folder.mkdir()
    (folder / ".evaluation-0123456789ab.json.vm-1-0.tmp").write_text('{"kind": "evalu')
    assert store.list_evaluations(path) == []
    app = visited(monkeypatch, tmp_path, "compress")
    assert not app.error
    (folder / "evaluation-0123456789ab.json").write_text('{"kind": "evalu')  # written by who knows no better
    assert len(store.list_evaluations(path)) == 1 and "evaluation-0123456789ab.json is no" in _said(_drawn(app))
    assert not visited(monkeypatch, tmp_path, "super_experts").error


def test_a_store_that_cannot_be_read_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synthetic.finished(tmp_path, sequences=3)
    app = visited(monkeypatch, tmp_path)

    def refuse(self: store.Catalog) -> list[store.Entry]:
        raise StoreError(f"{self.directory} cannot be read: Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(store.Catalog, "entries", refuse)
        assert "Permission denied" in _said(_drawn(app))
    assert "cannot be read" not in _said(_drawn(app))


def test_a_rename_that_was_broken_off_is_ended_by_the_same_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = synthetic.finished(tmp_path, "old", sequences=3)
    store.write_plan(path, "{}")
    real, moved = Path.rename, []

    def rename(self: Path, target: Path) -> Path:
        if len(moved) == 2:
            raise OSError(5, "Input/output error")
        moved.append(self)
        return real(self, target)

    with monkeypatch.context() as patch, pytest.raises(StoreError, match="Input/output error"):
        patch.setattr(Path, "rename", rename)
        store.Catalog(tmp_path).rename("old", "new")
    with store.open_run(store.Catalog(tmp_path).rename("old", "new")) as run:
        assert run.info.sequences == 3 and not run.metrics().is_empty()
    assert len(store.list_plans(tmp_path / "new.duckdb")) == 1
