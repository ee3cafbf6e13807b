"""A store that nobody may write to: it can be looked at, and whoever would write is told so."""

from __future__ import annotations

from pathlib import Path

import pytest

import store
from app.cli import main
from moescope.errors import StoreError
from tests.app import synthetic
from tests.app.visiting import visited
from tests.faults.small import mounted, remount


def test_it_is_read_and_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with mounted(tmp_path / "disk", "size=40m") as disk:
        path = synthetic.finished(disk)
        synthetic.live(disk, "growing").close()
        remount(disk, "ro")
        for view in ("overview", "compress", "data"):
            app = visited(monkeypatch, disk, view, run="synthetic")
            assert not app.error, (view, app.error[0].value)
        assert not visited(monkeypatch, disk, "routing", run="growing").error
        assert main(["runs", "--store", str(disk)]) == 0
        for write in (
            lambda: store.RunWriter.create(disk, "new", synthetic.info()),
            lambda: store.RunWriter.resume(disk, "growing"),
            lambda: store.write_plan(path, "{}"),
            lambda: store.write_metrics(path, synthetic.derived()),
            lambda: store.Catalog(disk).rename("synthetic", "other"),
            lambda: store.Catalog(disk).delete("synthetic"),
        ):
            with pytest.raises(StoreError, match="cannot be written .Read-only file system.: choose a folder that"):
                write()
        capsys.readouterr()
        assert main(["runs", "delete", "synthetic", "--store", str(disk)]) == 2
        assert "Read-only" in capsys.readouterr().err
        assert path.exists()
