"""A store on a slow mount: what a page asks the disk does not grow with runs and shards."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.app import synthetic
from tests.app.visiting import visited

ASKED = 60
"""Questions to the disk that one drawing of a page may take, with the run open already."""


@contextmanager
def counted(directory: Path) -> Iterator[Counter[str]]:
    """What is asked of the disk about a folder, by kind of question."""
    asked: Counter[str] = Counter()
    patch = pytest.MonkeyPatch()

    def watch(module: object, name: str) -> None:
        real = getattr(module, name)

        def see(path: object = ".", *more: object, **options: object) -> object:
            asked[name] += str(path).startswith(str(directory))
            return real(path, *more, **options)

        patch.setattr(module, name, see)

    for name in ("stat", "scandir", "listdir", "open", "lstat"):
        watch(os, name)
    try:
        yield asked
    finally:
        patch.undo()


def test_questions_do_not_grow_with_runs_and_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synthetic.finished(tmp_path, "shown")
    writer = synthetic.live(tmp_path, "growing")
    counts = []
    apps = [visited(monkeypatch, tmp_path, "routing", run=name) for name in ("shown", "growing")]
    for many in (False, True):
        if many:
            for number in range(60):
                os.link(tmp_path / "shown.duckdb", tmp_path / f"run-{number}.duckdb")
                shutil.copytree(writer.folder / "shard-000000", writer.folder / f"shard-{number + 1:06d}")
            (writer.folder / "shard-000000").rename(writer.folder / "shard-000099")
            for number in range(1, 61):  # as many shards, with the content of one
                for file in (writer.folder / f"shard-{number:06d}").iterdir():
                    file.unlink()
        for app in apps:
            app.run()  # whatever is new is opened
            with counted(tmp_path) as asked:
                app.run()
            assert not app.exception and not app.error
            counts.append(asked)
    for few, more in zip(counts[:2], counts[2:], strict=True):
        assert more.total() == few.total() <= ASKED, (few, more)
