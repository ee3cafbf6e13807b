"""The folder of a run that is being collected: ``NAME.live/`` with ``run.json``, ``progress.json`` and shards.

A shard is a folder ``shard-000012/`` with one Parquet file per table. It is written under a temporary name and renamed,
so that a reader sees all of its tables or none, and a kill loses at most the shard being written. The verdicts of the
checks so far lie in ``checks/``, one file per process that has collected the run.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moescope.errors import ShardError, StoreError
from store import lock
from store.info import Progress, RunInfo
from store.schema import literal, tables
from store.whole import is_alive, listing, write_whole

SUFFIX = ".live"
CHECKS = "checks"
STAGING = ".staging-"
"""Beginning of the name of a folder in which the workers of one collection make their shards."""

_INFO, _PROGRESS = "run.json", "progress.json"
_THEN = " and go on with --resume"
_WORKING = ("collecting", "compacting")


def write_info(folder: Path, info: RunInfo) -> None:
    """Store the provenance of a run that begins."""
    write_whole(folder / _INFO, json.dumps(info.to_row(), sort_keys=True, default=str), then=_THEN)


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
    content = {**asdict(progress), "host": socket.gethostname(), "pid": os.getpid()}
    write_whole(folder / _PROGRESS, json.dumps(content, sort_keys=True), lasting=False, then=_THEN)


def read_progress(folder: Path) -> Progress | None:
    """How far the collection is; None before the first report. A collector that was killed reads as interrupted."""
    content = _progress(folder)
    if content is None:
        return None
    host, pid = content.pop("host", ""), content.pop("pid", 0)
    if content.get("state") in _WORKING and not _works(folder, host, pid):
        content.update(state="interrupted", seconds_left=None, detail="the collecting process has ended")
    try:
        return Progress(**content)
    except TypeError:
        return None


def require_idle(folder: Path) -> None:
    """Refuse to touch a run that another process is collecting right now.

    Raises:
        StoreError: that process works on it.
    """
    if lock.is_ours(folder):
        return
    content = _progress(folder) or {}
    held, pid = lock.is_held(folder), content.get("pid", 0)
    if held is None:
        working = content.get("state") in _WORKING and content.get("host") == socket.gethostname()
        held, who = working and pid != os.getpid() and is_alive(pid), f"process {pid}"
    else:
        who = lock.holder(folder)
    if held:
        raise StoreError(f"{folder.name} is being collected by {who}: wait for it or stop it first")


def _works(folder: Path, host: str, pid: int) -> bool:
    """Whether the process that reported last still collects; of another machine it is believed, unless a lock tells."""
    held = lock.is_held(folder)
    if held is None or (not held and host != socket.gethostname()):
        return host != socket.gethostname() or is_alive(pid)
    return held


def _progress(folder: Path) -> dict[str, Any] | None:
    try:
        content = json.loads((folder / _PROGRESS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def shards(folder: Path) -> list[Path]:
    """The complete shards, in the order in which they were written: that of their numbers, whatever the clock said."""
    return [folder / one.name for one in listing(folder) if one.name.startswith("shard-") and one.is_dir()]


def shard_name(number: int) -> str:
    """The name of a shard's folder."""
    return f"shard-{number:06d}"


def shard_number(shard: Path) -> int:
    """The number of a shard by its folder's name."""
    return int(shard.name.removeprefix("shard-"))


def contents(folder: Path) -> dict[str, list[Path]]:
    """The Parquet files of each table that a shard holds, in the order of the shards; one look at each shard."""
    found: dict[str, list[Path]] = defaultdict(list)
    for shard in shards(folder):
        for entry in listing(shard):
            found[entry.name.removesuffix(".parquet")].append(shard / entry.name)
    verdicts = [folder / CHECKS / one.name for one in _verdicts(folder)]
    return {**found, "check": [*found["check"], *verdicts]}


def files(folder: Path, table: str) -> list[Path]:
    """The Parquet files of one table, in the order of the shards."""
    return contents(folder).get(table, [])


def next_verdicts(folder: Path) -> Path:
    """Where a process that begins to collect writes the verdicts of its checks."""
    taken = [int(one.name.split(".")[0]) for one in _verdicts(folder)]
    return folder / CHECKS / f"{max(taken, default=-1) + 1:06d}.parquet"


def _verdicts(folder: Path) -> list[os.DirEntry[str]]:
    return [entry for entry in listing(folder / CHECKS) if re.fullmatch(r"\d{6}\.parquet", entry.name)]


def source(folder: Path, table: str, content: Mapping[str, list[Path]] | None = None) -> str:
    """A table function over the shards of one table, or an empty table where no shard holds it.

    Args:
        content: :func:`contents` of the folder, by who asks for many tables.
    """
    found = (contents(folder) if content is None else content).get(table, [])
    present = ", ".join(literal(file) for file in found)
    if present:
        return f"read_parquet([{present}], union_by_name = true)"
    columns = ", ".join(f"null::{column.type} as {column.name}" for column in tables()[table].columns)
    return f"(select {columns} where false)"
