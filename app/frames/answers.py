"""A question in SQL about a run, alone or beside others, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import polars as pl

import store
from app.frames.plain import flat
from moescope.errors import MoescopeError

SECONDS = 10.0
"""How long a page waits for an answer."""

CELL = 200
"""Letters of a cell that a page shows; downloads hold all."""


@dataclass(frozen=True)
class Asked:
    """What came of a question.

    Attributes:
        answer: its rows; None where it failed.
        error: why it failed, in one line; empty where it did not.
    """

    answer: store.Answer | None = None
    error: str = ""

    @property
    def shown(self) -> pl.DataFrame:
        """The rows as a table shows them: lists and bytes as text, long cells cut."""
        return flat(self.answer.frame, limit=CELL) if self.answer is not None else pl.DataFrame()


def ask(run: store.Run, *, sql: str, rows: int, others: tuple[Path, ...] = (), seconds: float = SECONDS) -> Asked:
    """Ask a run, or with others its union with them."""
    try:
        return Asked(store.console([run.path, *others]).ask(sql, rows=rows, seconds=seconds))
    except MoescopeError as error:
        return Asked(error=str(error))


def default_chart(frame: pl.DataFrame) -> dict[str, str]:
    """What a chart of an answer shows first: kind, x, y, colour (may be empty); no kind where nothing can be drawn."""
    numbers = [name for name, kind in frame.schema.items() if kind.is_numeric()]
    if not numbers or frame.width < 2:
        return {}
    named = {"layer", "expert"} <= set(frame.columns)
    values = [name for name in numbers if name not in ("layer", "step", "expert", "sequence", "position", "run")]
    if named and values and frame.select("layer", "expert").is_unique().all():
        return {"kind": "heatmap", "x": "expert", "y": "layer", "colour": values[0]}
    value = (values or numbers)[0]
    others = [name for name in frame.columns if name != value]
    first = "layer" if "layer" in others else others[0]
    shades = [name for name in others if name != first and frame[name].n_unique() <= 12]
    words = [name for name in shades if not frame.schema[name].is_numeric()]
    line = frame.schema[first].is_numeric() and frame[first].n_unique() > 2
    colour = "" if frame[first].is_unique().all() else (words or shades or [""])[0]
    return {"kind": "line" if line else "bar", "x": first, "y": value, "colour": colour}
