"""Room to cut, before any plan: which layers do little, and which of their neurons."""

from __future__ import annotations

from app.components import chart
from app.exhibits import compress as exhibits
from store import Run


def section(run: Run) -> None:
    """Draw the section."""
    with chart.pair():
        chart.exhibit(exhibits.depth, run, key="influence")
        chart.exhibit(exhibits.width, run, key="width")
