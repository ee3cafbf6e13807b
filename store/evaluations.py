"""What was measured on a model beside its run: ``NAME.evaluations/KIND-....json``, one JSON document per measurement.

A document says what was done, on which text, and what came of it. The same measurement, done again, takes the same
name and replaces the old one; there are no timestamps in it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from moescope.errors import StoreError
from store.documents import parse, read_text
from store.whole import listing, refusal, write_whole

SUFFIX = ".evaluations"
VERSION = 1

KINDS: dict[str, tuple[str, ...]] = {
    "ablation": ("model", "experts", "data", "base", "ablated", "controls", "layers", "verdict", "notes"),
    "evaluation": (
        *("model", "base", "data", "plan", "held_out", "divergence", "perplexity", "routing", "generation", "probes"),
        *("size", "speed", "notes", "verdict"),
    ),
    "sweep": (
        *("model", "data", "base", "rules", "slimmability", "contrast", "rerouting", "search", "notes", "verdict"),
    ),
}
"""Kind of document -> what it must hold beside ``kind`` and ``version``."""

IDENTITY: dict[str, tuple[str, ...]] = {
    "ablation": ("model", "experts", "data"),
    "evaluation": ("model", "base", "data"),
    "sweep": ("model", "data"),
}
"""Kind of document -> what says that two of them are the same measurement."""

Document = dict[str, Any]


def folder_of(run: str | Path) -> Path:
    """Where the evaluations of a run lie; the folder comes with the first one."""
    run = Path(run)
    return run.with_name(run.name.removesuffix(".duckdb").removesuffix(".live") + SUFFIX)


def write_evaluation(run: str | Path, document: Mapping[str, Any]) -> Path:
    """Put a document beside a run; one of the same name is replaced.

    The name is the kind and a hash of what was done, see :data:`IDENTITY`.

    Raises:
        StoreError: there is no such run, the document lacks something or holds NaN or infinity, or the folder is
            read-only.
        RunError: the disk is full.
    """
    run = Path(run)
    if not run.exists():
        raise StoreError(f"no run at {run}: evaluations are written beside a run")
    text = evaluation_text(document)
    done = json.dumps([document.get(name) for name in IDENTITY[document["kind"]]], sort_keys=True)
    folder = folder_of(run)
    path = folder / f"{document['kind']}-{hashlib.sha256(done.encode()).hexdigest()[:12]}.json"
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise refusal(folder, error) from error
    write_whole(path, text)
    return path


def evaluation_text(document: Mapping[str, Any]) -> str:
    """A document as it stands in its file.

    Raises:
        StoreError: it lacks something, or holds NaN or infinity.
    """
    _require(document, "the document")
    try:
        return json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise StoreError(f"an evaluation is plain JSON without NaN: {error}") from error


def list_evaluations(run: str | Path, kind: str | None = None) -> list[Path]:
    """The documents beside a run, the newest first; of one kind, or all."""
    folder, begins = folder_of(run), f"{kind}-" if kind else ""
    names = [entry.name for entry in listing(folder)]
    found = [folder / name for name in names if name.startswith(begins) and fnmatch(name, "[!.]*-*.json")]
    return sorted(found, key=_age)


def read_evaluation(path: str | Path) -> Document:
    """One document.

    Raises:
        StoreError: it cannot be read, or is none.
    """
    document = parse(read_text(path), str(path), finite=True)
    _require(document, str(path))
    return document


def number_or_none(value: float) -> float | None:
    """A figure for a document: None for NaN and infinity, which JSON does not know."""
    return float(value) if math.isfinite(value) else None


def _require(document: object, what: str) -> None:
    if not isinstance(document, Mapping):
        raise StoreError(f"{what} is no evaluation: it takes one JSON object")
    kind, version = document.get("kind"), document.get("version")
    if kind not in KINDS:
        raise StoreError(f"{what} has kind {kind!r}; there are {', '.join(KINDS)}")
    if version != VERSION:
        raise StoreError(f"{what} has version {version!r}; this moescope reads version {VERSION}: measure it again")
    missing = [name for name in KINDS[kind] if name not in document]
    if missing:
        raise StoreError(f"{what} lacks {', '.join(missing)}")


def _age(path: Path) -> tuple[float, str]:
    try:
        return -path.stat().st_mtime, path.name
    except OSError:  # just removed
        return 0.0, path.name
