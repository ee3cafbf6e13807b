"""Plans beside the run that they come from, and what was done with them: ``NAME.plans/KIND-....json``.

A plan is kept as the text that its maker gives; this module knows JSON, not what a plan means. Beside plans stand the
receipts of applying them, the jobs that a dashboard started, and how far these are.
"""

from __future__ import annotations

import hashlib
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from moescope.errors import StoreError
from store.documents import parse, read_text
from store.whole import listing, refusal, write_whole

SUFFIX = ".plans"

KINDS = ("plan", "receipt", "check", "job", "progress", "recommendation", "curve", "caching", "serving")
"""What lies in the folder: plans; what applying one gave, and whether the result is what the plan says; commands
started in the background, and how far they are; recommendations for a budget; sizes against their prices; whether
caching experts pays on a machine; how a model is best served on one."""

_NAME = re.compile(r"[0-9a-z-]{1,64}")


def plans_folder(run: str | Path) -> Path:
    """Where the plans of a run lie; the folder comes with the first one."""
    run = Path(run)
    return run.with_name(run.name.removesuffix(".duckdb").removesuffix(".live") + SUFFIX)


def plan_path(run: str | Path, kind: str, name: str) -> Path:
    """Where a document of a kind and a name lies, or would lie.

    Raises:
        StoreError: no such kind, or a name that cannot be one: small letters, digits and dashes.
    """
    if kind not in KINDS:
        raise StoreError(f"no kind {kind!r} of documents beside a plan; there are {', '.join(KINDS)}")
    if not _NAME.fullmatch(name):
        raise StoreError(f"{name!r} cannot name a {kind}: small letters, digits and dashes, at most 64")
    return plans_folder(run) / f"{kind}-{name}.json"


def write_plan(run: str | Path, text: str, *, kind: str = "plan", name: str = "") -> Path:
    """Put a document beside a run; one of the same name is replaced at once.

    Args:
        run: a run file, or the folder of a run that is being collected.
        text: one JSON object.
        kind: one of :data:`KINDS`.
        name: what follows the kind in the file's name; without one, the first 12 digits of the text's SHA-256, so
            that the same plan takes the same name.

    Raises:
        StoreError: there is no such run, the text is no JSON object, or the folder is read-only.
        RunError: the disk is full.
    """
    run = Path(run)
    if not run.exists():
        raise StoreError(f"no run at {run}: plans are written beside a run")
    parse(text, f"the {kind}")
    path = plan_path(run, kind, name or hashlib.sha256(text.encode()).hexdigest()[:12])
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise refusal(path.parent, error) from error
    write_whole(path, text)
    return path


def list_plans(run: str | Path, kind: str = "plan") -> list[Path]:
    """The documents of a kind beside a run, the newest first."""
    folder = plans_folder(run)
    names = [entry.name for entry in listing(folder)]
    return sorted((folder / name for name in names if fnmatch(name, f"{kind}-*.json")), key=_age)


def read_plan(path: str | Path) -> str:
    """The text of one document.

    Raises:
        StoreError: it cannot be read, or is no JSON object.
    """
    text = read_text(path)
    parse(text, str(path))
    return text


def read_plan_document(path: str | Path) -> dict[str, Any]:
    """One document, parsed.

    Raises:
        StoreError: as :func:`read_plan`.
    """
    return parse(read_plan(path), str(path))


def _age(path: Path) -> tuple[float, str]:
    try:
        return -path.stat().st_mtime, path.name
    except OSError:  # just removed
        return 0.0, path.name
