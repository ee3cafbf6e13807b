"""Reports that are killed: the file is the old one or the new one, and nothing else stays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from app.cli import main
from tests.app import synthetic
from tests.faults.killing import Say
from tests.faults.subject import names

OLD = "# The report of last week"


class Reporting:
    """``moescope report`` over a report that is there already."""

    name = "report"

    def __init__(self, shared: Path) -> None:
        self._run, self._whole = shared / "runs", shared / "whole"

    def prepare(self, folder: Path) -> None:
        synthetic.finished(self._run, "told", activations=False, text=False, metrics=False, sequences=3)
        self._whole.mkdir(parents=True)
        self._report(self._whole)

    def begin(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "report.md").write_text(OLD)

    def work(self, folder: Path, say: Say) -> None:
        self._report(folder)

    def stage(self, folder: Path) -> str:
        if len(names(folder)) > 1:
            return "half a file beside it"
        return "old report" if (folder / "report.md").read_text() == OLD else "new report"

    def look(self, folder: Path, said: Sequence[Any]) -> list[str]:
        found = (folder / "report.md").read_text()
        whole = found == OLD or found == (self._whole / "report.md").read_text()
        return [] if whole else ["corrupt: the report is neither the old one nor the new one"]

    def again(self, folder: Path) -> list[str]:
        if names(folder) == ["report.md"]:
            return []  # a report begins anew each time: nothing is left that could disturb the next one
        self._report(folder)
        told = [f"left behind: {name}" for name in names(folder) if name != "report.md"]
        same = (folder / "report.md").read_text() == (self._whole / "report.md").read_text()
        return told + ([] if same else ["unequal: the report is not that of an undisturbed job"])

    def _report(self, folder: Path) -> None:
        arguments = ["report", str(self._run / "told.duckdb"), "-o", str(folder / "report.md"), "--layers", "0"]
        code = main([*arguments, "--force"])
        if code:
            raise RuntimeError(f"moescope report ended with {code}")
