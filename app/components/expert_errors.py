"""What narrower weights do to one expert: its errors by width, and the scores of importance as a table."""

from __future__ import annotations

from typing import Any

import polars as pl

from app import data
from app.components import chart, table
from app.components.table import Column
from app.exhibits import expert as exhibits
from app.frames import expert_errors as frames
from store import Run


def section(run: Run, where: dict[str, Any]) -> None:
    """Draw the section; one sentence where the run has no level errors."""
    key = f"expert-errors-{where['label']}-{where['expert']}"
    if not chart.exhibit(exhibits.widths, run, key=key, layer=where["label"], expert=where["expert"]):
        return
    table.show(
        data.frame(frames.errors, run, **where),
        key=f"{key}-table",
        alt="Relative change of the output by width, for all projections and each alone",
        read="Change of the output over its own size; rank 1 = the most hurt expert of the layer.",
        columns={
            "width": Column("bits", "text", width=72),
            "whole": Column("all projections"),
            "gate": Column("gate alone"),
            "up": Column("up alone"),
            "down": Column("down alone"),
            "median": Column("median of the layer"),
            "tokens": Column("sampled tokens", "count"),
        },
    )


def scores(frame: pl.DataFrame, *, key: str) -> None:
    """The scores of importance of one expert as a table.

    frame: ``app.frames.expert.importance_of``.
    """
    if frame.is_empty():
        return
    table.show(
        frame.select("title", "value", "unit", "rank", "of"),
        key=key,
        alt="Every score of the expert with its rank in the layer",
        read="A larger score means: keep it.",
        columns={
            "title": Column("score", "text"),
            "value": Column("value"),
            "rank": Column("rank in the layer", "count", "1 = the layer can spare it least"),
            "of": Column("of experts", "count"),
        },
    )
