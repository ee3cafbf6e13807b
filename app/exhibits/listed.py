"""Several names as one choice of an exhibit: a comma list, in which names that hold commas stand in quotes."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

import store
from moescope.errors import InputError


def listed(names: Sequence[str]) -> str | None:
    """The names as one text; None for no name."""
    if not names:
        return None
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="").writerow(names)
    return buffer.getvalue()


def domains_of(run: store.Run, text: str | None) -> tuple[str, ...] | None:
    """The domains that a comma list names; None for all.

    Raises:
        InputError: the run has no such domain.
    """
    names = tuple(name.strip() for row in csv.reader([text or ""]) for name in row if name.strip())
    unknown = [name for name in names if name not in run.domains]
    if unknown:
        raise InputError(f"run {run.name!r} has no domain {unknown[0]!r}; there are {', '.join(run.domains)}")
    return names or None
