"""Alerts: what in a run needs attention, with the numbers that say so and the chance that it is an accident."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

import store
from app.frames import coverage
from app.frames.axes import layer_label
from app.frames.confidence import router_health
from app.frames.load import NEARLY_DEAD, balance
from profiler.metrics.coverage import STARVED

SCHEMA = {"severity": pl.String, "alert": pl.String, "layers": pl.String, "detail": pl.String, "page": pl.String}
MAX_VIOLATION = 3.0
"""The busiest expert takes more than 4 times the mean load."""
COLLAPSE = 1.25
"""A layer collapsed when it uses fewer effective experts than this times top_k."""
TIES = 0.01
"""Share of tokens whose last selected and first rejected expert have equal logits."""
ACCIDENT = 0.05
"""Dead experts are blamed on the router when chance explains fewer than so many of them."""


def alerts(run: store.Run) -> pl.DataFrame:
    """One row per alert, the most severe first: severity (problem | warning | note), alert, layers, detail, page."""
    even = balance(run).drop_nulls("max_violation")
    rows = [
        *_checks(run),
        *_collapse(even),
        *_router(run),
        *_dead(even),
        *_imbalance(even),
        *_starved(run),
        *_unsettled(run),
        *_incomplete(run),
    ]
    order = {"problem": 0, "warning": 1, "note": 2}
    return pl.DataFrame(sorted(rows, key=lambda row: order[row[0]]), schema=SCHEMA, orient="row")


Row = tuple[str, str, str, str, str]


def _checks(run: store.Run) -> list[Row]:
    table = run.table("check").filter(pl.col("status").is_in(["fail", "warning"]))
    rows: list[Row] = []
    if run.badge.status == "unchecked" and not run.live:
        detail = "no check proves that this run recorded what the model did, as in imported traces"
        rows.append(("note", "capture unchecked", "", detail, "Overview"))
    for (status, name), part in table.group_by("status", "name", maintain_order=True):
        severity = "problem" if status == "fail" else "warning"
        verb = "failed" if status == "fail" else "warns"
        where = _names([str(layer) for layer in part["layer"].drop_nulls().unique().sort()])
        rows.append((severity, f"check {verb}: {name}", where, str(part["detail"][0] or ""), "Overview"))
    return rows


def _collapse(even: pl.DataFrame) -> list[Row]:
    found = even.filter(
        (pl.col("effective_experts") < COLLAPSE * pl.col("top_k")) & (pl.col("num_experts") > pl.col("top_k"))
    )
    if found.is_empty():
        return []
    worst = found.sort("effective_experts").row(0, named=True)
    detail = (
        f"layer {worst['label']} uses {worst['effective_experts']:.1f} effective experts of {worst['num_experts']}, "
        f"with {worst['top_k']} per token"
    )
    return [("problem", "routing collapse", _names(found["label"]), detail, "Routing")]


def _router(run: store.Run) -> list[Row]:
    health = router_health(run)
    rows: list[Row] = []
    broken = health.filter(pl.col("nonfinite_tokens") > 0)
    if len(broken):
        detail = f"{broken['nonfinite_tokens'].sum():,} token-layers with NaN or infinite router logits"
        rows.append(("problem", "non-finite router logits", _names(broken["label"]), detail, "Routing"))
    tied = health.filter(pl.col("tie_share") > TIES)
    if len(tied):
        worst = tied.sort("tie_share", descending=True).row(0, named=True)
        detail = (
            f"in layer {worst['label']}, {worst['tie_share']:.1%} of tokens tie between the last expert taken and the "
            "next"
        )
        rows.append(("note", "ties at the selection boundary", _names(tied["label"]), detail, "Routing"))
    return rows


def _dead(even: pl.DataFrame) -> list[Row]:
    rows: list[Row] = []
    dead = even.filter(pl.col("dead") > 0)
    if len(dead):
        explained = bool((dead["expected_dead"] >= ACCIDENT).any())
        worst = dead.sort("dead", descending=True).row(0, named=True)
        detail = (
            f"{dead['dead'].sum()} experts were never used; in layer {worst['label']}, {worst['dead']} of "
            f"{worst['num_experts']} on {worst['tokens']:,.0f} tokens. A balanced router leaves a given expert unused "
            f"with probability {worst['zero_probability']:.1e}"
        )
        detail += ": too few tokens to blame the router" if explained else ""
        rows.append(("note" if explained else "warning", "dead experts", _names(dead["label"]), detail, "Routing"))
    nearly = even.filter(pl.col("nearly_dead") > 0)
    if len(nearly):
        detail = f"{nearly['nearly_dead'].sum()} experts get less than {NEARLY_DEAD:.0%} of the balanced load"
        rows.append(("warning", "nearly dead experts", _names(nearly["label"]), detail, "Routing"))
    return rows


def _imbalance(even: pl.DataFrame) -> list[Row]:
    found = even.filter(pl.col("max_violation") > MAX_VIOLATION)
    if found.is_empty():
        return []
    worst = found.sort("max_violation", descending=True).row(0, named=True)
    detail = f"MaxVio {worst['max_violation']:.2f} in layer {worst['label']}: its busiest expert takes"
    detail += f" {worst['max_violation'] + 1:.1f} times the mean load"
    return [("warning", "uneven load", _names(found["label"]), detail, "Routing")]


def _starved(run: store.Run) -> list[Row]:
    """Experts with too few tokens to be judged, and how much text of this kind would do."""
    found = coverage.starved(run)
    if found.is_empty():
        return []
    reached = found.filter(pl.col("tokens") > 0)["needed"]
    unused = len(found) - len(reached)
    parts = [
        f"{len(found)} experts have fewer than {STARVED:.0%} of a balanced router's tokens, too few to judge them by"
    ]
    if len(reached):
        parts.append(
            f"{coverage.rounded(float(reached.to_numpy().max()))} tokens of such text give all that were used so many"
        )
    if unused:
        parts.append(f"{unused} were never used: only other text may reach them")
    places = found.select("layer", "step").unique(maintain_order=True).iter_rows()
    where = _names([layer_label(*place) for place in places])
    return [("note", "starved experts", where, "; ".join(parts), "Overview")]


def _unsettled(run: store.Run) -> list[Row]:
    """Scores by which two texts of this length would rank the experts differently, and what to do."""
    ranked = coverage.needed(run).filter(pl.col("goal") == "ranking").sort("needed")
    ranked = ranked.with_columns(pl.col("score").replace(coverage.SCORES))
    found = ranked.filter(pl.col("verdict") != "enough")
    if found.is_empty():
        return []
    words = [f"{score}, {verdict}" for score, verdict in found.select("score", "verdict").iter_rows()]
    shown = words if len(words) < 3 else [words[0], "…", words[-1]]
    detail = f"by {len(found)} of {len(ranked)} scores, two texts of {run.info.tokens:,} tokens would order the experts"
    detail += f" less alike than {found['target'][0]:.2f} (rank correlation); tokens by score: {'; '.join(shown)}"
    settled = ranked.filter(pl.col("verdict") == "enough")["score"].to_list()
    if settled:
        detail += f"; or cut by {', '.join(settled)}"
    return [("note", "rankings are not settled", "", detail, "Overview")]


def _incomplete(run: store.Run) -> list[Row]:
    if run.live or run.info.complete:
        return []
    return [("note", "incomplete collection", "", "the collection ended before its text did", "Overview")]


def _names(labels: Sequence[str] | pl.Series) -> str:
    """Up to eight layer names, and how many more."""
    names = list(labels)
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more
