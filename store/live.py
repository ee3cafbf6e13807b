"""The folder of a run that is being collected: ``NAME.live/`` with ``run.json``, ``progress.json`` and shards.

A shard is a folder ``shard-000012/`` with one Parquet file per table. It is written under a temporary name and renamed,
so that a reader sees all of its tables or none, and a kill loses at most the shard being written.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moescope.errors import ShardError, StoreError
from store.info import Progress, RunInfo
from store.schema import literal, tables

SUFFIX = ".live"
_INFO, _PROGRESS = "run.json", "progress.json"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file so that a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, sort_keys=True, default=str), encoding="utf-8")
    os.replace(temporary, path)


def write_info(folder: Path, info: RunInfo) -> None:
    """Store the provenance of a run that begins."""
    write_json(folder / _INFO, info.to_row())


def read_info(folder: Path) -> RunInfo:
    """The provenance of a live run.

    Raises:
        ShardError: ``run.json`` is missing or damaged.
    """
    try:
        return RunInfo.from_row(json.loads((folder / _INFO).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ShardError(f"{folder}: {_INFO} cannot be read ({error}); this is no run that can be resumed") from error


def write_progress(folder: Path, progress: Progress) -> None:
    """Tell readers how far the collection is, and which process does it."""
    write_json(folder / _PROGRESS, {**asdict(progress), "host": socket.gethostname(), "pid": os.getpid()})


def read_progress(folder: Path) -> Progress | None:
    """How far the collection is; None before the first report. A collector that was killed reads as interrupted."""
    try:
        content = json.loads((folder / _PROGRESS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    host, pid = content.pop("host", ""), content.pop("pid", 0)
    working = content.get("state") in ("collecting", "compacting")
    if working and host == socket.gethostname() and not _alive(pid):
        content.update(state="interrupted", seconds_left=None, detail="the collecting process has ended")
    return Progress(**content)


def require_idle(folder: Path) -> None:
    """Refuse to touch a run that another process is collecting right now.

    Raises:
        StoreError: that process is alive on this machine.
    """
    try:
        content = json.loads((folder / _PROGRESS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    pid = content.get("pid", 0)
    same_host = content.get("host") == socket.gethostname()
    if content.get("state") in ("collecting", "compacting") and same_host and pid != os.getpid() and _alive(pid):
        raise StoreError(f"{folder.name} is being collected by process {pid}: wait for it or stop it first")


def shards(folder: Path) -> list[Path]:
    """The complete shards, in the order in which they were written."""
    return sorted(path for path in folder.glob("shard-*") if path.is_dir())


def files(folder: Path, table: str) -> list[Path]:
    """The Parquet files of one table, in the order of the shards."""
    return [file for path in shards(folder) if (file := path / f"{table}.parquet").exists()]


def source(folder: Path, table: str) -> str:
    """A table function over the shards of one table, or an empty table where no shard holds it."""
    present = ", ".join(literal(file) for file in files(folder, table))
    if present:
        return f"read_parquet([{present}], union_by_name = true)"
    columns = ", ".join(f"null::{column.type} as {column.name}" for column in tables()[table].columns)
    return f"(select {columns} where false)"


def _alive(pid: int) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:
        return True
    return pid > 0
