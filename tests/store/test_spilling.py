"""Queries that do not fit into memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from store import connection


def test_what_does_not_fit_into_memory_leaves_nothing_where_people_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(connection, "_settings", {"memory_limit": "60MB", "threads": "1"})
    opened = connection.connect({})
    connection.lock(opened)
    numbers = "select hash(i) as a, hash(i + 1) as b from range(6000000) t(i)"
    spilt = f"select count(*) from (select a, count(*) as n from ({numbers}) group by a) where n > 0"
    assert connection.query(opened, spilt).item() > 5_000_000
    assert list(Path.cwd().iterdir()) == []
    assert (tmp_path / f"moescope-{os.getpid()}").is_dir()
    opened.close()
    assert not (tmp_path / f"moescope-{os.getpid()}").exists()
