"""Plans whose application is killed: the source is untouched, the destination whole or absent, the rest goes on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers

import compressor
from tests.compressor.apply_cases import drop, saved
from tests.faults.killing import Say
from tests.faults.subject import fingerprint, names


class Applying:
    """``apply`` of a plan that drops experts to a checkpoint of several files."""

    name = "apply"

    def __init__(self, shared: Path) -> None:
        self._source, self._whole = shared / "source", shared / "whole" / "out"  # the card tells the name
        transformers.utils.logging.disable_progress_bar()
        self._plan = drop(saved("olmoe", self._source, shard="40KB"), (1, 2))
        self._before = fingerprint(self._source)

    def prepare(self, folder: Path) -> None:
        compressor.apply(self._plan, source=self._source, destination=self._whole)

    def begin(self, folder: Path) -> None:
        folder.mkdir()

    def work(self, folder: Path, say: Say) -> None:
        compressor.apply(self._plan, source=self._source, destination=folder / "out")

    def stage(self, folder: Path) -> str:
        if (folder / "out").exists():
            return "whole"
        partial = folder / ".out.partial"
        if not partial.exists():
            return "nothing"
        if (partial / "config.json").exists():
            return "all files, not yet named"
        return f"{len(list(partial.glob('*.safetensors')))} files"

    def look(self, folder: Path, said: Sequence[Any]) -> list[str]:
        told = [] if fingerprint(self._source) == self._before else ["corrupt: the source was changed"]
        if (folder / "out").exists() and fingerprint(folder / "out") != fingerprint(self._whole):
            told.append("corrupt: the destination is there and not whole")
        return told

    def again(self, folder: Path) -> list[str]:
        if not (folder / "out").exists():
            compressor.apply(self._plan, source=self._source, destination=folder / "out")
        told = [f"left behind: {name}" for name in names(folder) if name != "out"]
        same = fingerprint(folder / "out") == fingerprint(self._whole)
        return told + ([] if same else ["unequal: the result is not that of an undisturbed job"])
