"""Compactions that are killed: the shards stay until the run file is whole, and the next try ends equal."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import store
from moescope.errors import StoreError
from tests.app import synthetic
from tests.faults.equality import differences
from tests.faults.killing import Say
from tests.faults.subject import fingerprint, names

NAME = "shards"
SHARDS = 6


class Compacting:
    """``RunWriter.finish`` of a run with several shards."""

    name = "compaction"

    def __init__(self, shared: Path) -> None:
        self._shards, self._whole = shared / "live", shared / "whole"

    def prepare(self, folder: Path) -> None:
        writer = store.RunWriter.create(self._shards, NAME, synthetic.info(sequences=3 * SHARDS))
        for shard in range(SHARDS):
            writer.write_shard(synthetic.tables(3, start=3 * shard))
        shutil.copytree(self._shards, self._whole)
        store.RunWriter.resume(self._whole, NAME).finish(seconds=1.0)

    def begin(self, folder: Path) -> None:
        shutil.copytree(self._shards, folder)

    def work(self, folder: Path, say: Say) -> None:
        store.RunWriter.resume(folder, NAME).finish(seconds=1.0)

    def stage(self, folder: Path) -> str:
        found = names(folder)
        if f"{NAME}.duckdb" in found:
            return "run file there, shards not yet gone" if len(found) > 1 else "run file there"
        return "half a run file" if any(name.endswith(".tmp") for name in found) else "shards"

    def look(self, folder: Path, said: Sequence[Any]) -> list[str]:
        path = folder / f"{NAME}.duckdb"
        if path.exists():
            told = differences(path, self._whole / path.name, metrics=False)
            return [f"lost: {line}" for line in told]
        kept, wanted = fingerprint(folder / f"{NAME}.live"), fingerprint(self._shards / f"{NAME}.live")
        gone = [name for name, digest in wanted.items() if name.startswith("shard-") and kept.get(name) != digest]
        return [f"lost: {len(gone)} files of shards, such as {gone[0]}"] if gone else []

    def again(self, folder: Path) -> list[str]:
        try:
            store.RunWriter.resume(folder, NAME).finish(seconds=1.0)
        except StoreError as error:
            if "is finished" not in str(error):
                raise
        told = [f"left behind: {name}" for name in names(folder) if name not in names(self._whole)]
        return told + differences(folder / f"{NAME}.duckdb", self._whole / f"{NAME}.duckdb", metrics=False)
