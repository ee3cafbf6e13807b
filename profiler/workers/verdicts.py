"""The verdicts of many workers as one table of checks, no longer than that of one process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import polars as pl

from profiler.capture.check_rows import SCHEMA

GRAVITY = {"skipped": 0, "pass": 1, "warning": 2, "fail": 3}


def merged(tables: Iterable[Sequence[Mapping[str, Any]]]) -> pl.DataFrame:
    """Table ``check``: of each check of each layer the gravest verdict that a worker came to, and of equals the largest
    value.

    Args:
        tables: the rows of each worker. Checks of one name and layer that a worker has several of are told apart by
            their order.
    """
    rows: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    workers = 0
    for table in tables:
        workers += 1
        seen: dict[tuple[Any, ...], int] = {}
        for row in table:
            name = (row["name"], row["layer"], row["step"])
            seen[name] = seen.get(name, 0) + 1
            rows.setdefault((*name, seen[name]), []).append(row)
    chosen = []
    for found in rows.values():
        gravest = max(found, key=lambda row: (GRAVITY[row["status"]], _size(row["value"])))
        same = all(row["detail"] == gravest["detail"] for row in found)
        more = "" if same or workers == 1 else f" (one of {len(found)} workers)"
        chosen.append({**gravest, "detail": f"{gravest['detail']}{more}"})
    return pl.DataFrame(chosen, schema=SCHEMA)


def _size(value: float | None) -> float:
    """What cannot be compared is the gravest."""
    return -1.0 if value is None else (float("inf") if value != value else value)
