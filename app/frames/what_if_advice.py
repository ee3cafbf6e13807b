"""Which statistic of a run recommends what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

import polars as pl

import store
from app.markdown import plain
from planner.simulate.what_if import advice as rows_of

_SCHEMA = {
    "name": pl.String, "statistic": pl.String, "observed": pl.Float64, "text": pl.String, "threshold": pl.String,
    "holds": pl.Boolean, "suggest": pl.String, "avoid": pl.String, "where": pl.String,
}  # fmt: skip


def advice(run: store.Run) -> pl.DataFrame:
    """One row per statistic that the run holds, those first from which something follows."""
    frame = pl.DataFrame([asdict(one) for one in rows_of(run)], schema=_SCHEMA)
    return frame.sort("holds", descending=True, maintain_order=True)


def plain_rows(frame: pl.DataFrame) -> Iterator[dict[str, str]]:
    """The words of each row, safe for Markdown."""
    for row in frame.select("statistic", "text", "threshold", "suggest", "avoid").iter_rows(named=True):
        yield {name: plain(str(value or ""), 200) for name, value in row.items()}


def disputed(holds: pl.DataFrame) -> list[str]:
    """What one statistic speaks against and another one for, of those that hold."""
    against = {word.strip() for text in holds["avoid"] for word in text.split(",") if word.strip()}
    return sorted(word for word in against if holds["suggest"].str.contains(word, literal=True).any())
