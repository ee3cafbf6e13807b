"""What a run says, in plain words: one sentence each, with the figures that it rests on and where to see them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import polars as pl

import store
from app.frames import confidence, consistency, coverage, specialization, super_experts
from app.frames.load import balance, expert_load

EVEN = 0.8
"""A layer that uses so large a part of its experts effectively counts as even."""

FEW_EXPERTS = 200
"""Below so many experts, less than one lies above the 99.5th percentile by construction."""

SCHEMA = {
    "finding": pl.String, "evidence": pl.String, "page": pl.String, "layer": pl.String, "expert": pl.Int64,
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One row of :func:`findings`."""

    finding: str
    evidence: str
    page: str
    layer: str | None = None
    expert: int | None = None


def findings(run: store.Run) -> pl.DataFrame:
    """One row per finding, the most telling first: finding = a sentence without a full stop, evidence = the figures
    behind it, page that shows them, layer (its label) and expert where it names one. What the run lacks is left out.
    """
    makers: tuple[Callable[[store.Run], Finding | None], ...] = (
        _outliers,
        _load,
        _domains,
        _tokens,
        _neighbours,
        _cache,
        _router,
        _text,
    )
    found = [finding for make in makers if (finding := make(run)) is not None]
    return pl.DataFrame([astuple(finding) for finding in found], schema=SCHEMA, orient="row")


def _outliers(run: store.Run) -> Finding | None:
    limits = super_experts.thresholds(run).filter((pl.col("rule") == "paper") & (pl.col("tokens") == "all"))["value"]
    if limits.is_empty():
        return None
    marked = super_experts.super_experts(run).filter((pl.col("rule") == "paper") & (pl.col("tokens") == "all"))
    maxima = super_experts.output_maxima(run)
    if maxima.is_empty():
        return None
    top = maxima.row(0, named=True)
    evidence = f"the largest output is {top['value']:,.3g}, of expert {top['expert']} in layer {top['label']}"
    if limits[0] is not None:
        evidence += f"; the rule asks for more than {limits[0]:,.3g}"
        if marked.is_empty() and top["value"] > limits[0]:
            evidence += ", and for a massive activation that forms in its layer"
    where = {"layer": top["label"], "expert": top["expert"] if top["kind"] == "routed" else None}
    if marked.is_empty():
        return Finding("No expert stands out by its outputs: there is no super expert", evidence, "Super experts",
                       **where)  # fmt: skip
    names = ", ".join(f"({layer}, {expert})" for layer, expert in marked.select("layer", "expert").head(4).iter_rows())
    names += f" and {len(marked) - 4} more" if len(marked) > 4 else ""
    what = f"{len(marked)} super expert{'s' if len(marked) > 1 else ''}, as (layer, expert): {names}"
    return Finding(what, f"{evidence}; removing them can break the model", "Super experts", **where)


def _load(run: store.Run) -> Finding | None:
    even = balance(run).drop_nulls("max_violation")
    if even.is_empty():
        return None
    worst = even.sort("max_violation", descending=True).row(0, named=True)
    share = even.select((pl.col("effective_experts") / pl.col("num_experts")).median()).item()
    load = expert_load(run).filter((pl.col("layer") == worst["layer"]) & (pl.col("step") == worst["step"]))
    busiest = load.sort("tokens", descending=True)["expert"][0]
    words = "The load is even" if share >= EVEN else "The load is uneven"
    evidence = f"in layer {worst['label']}, the least even, expert {busiest} takes {worst['max_violation'] + 1:.1f} × "
    evidence += "the mean"
    what = f"{words}: the median layer uses {share:.0%} of its experts effectively"
    return Finding(what, evidence, "Routing", worst["label"], busiest)


def _domains(run: store.Run) -> Finding | None:
    row = _of_model(run, kind="domain", metric="domain_variation")
    if row is None:
        return None
    what = "Experts depend on the domain" if _above(row) else "Experts hardly depend on the domain"
    evidence = f"their use varies by {row['value']:.2f} of its mean{_range(row)}"
    return Finding(what, f"{evidence}; {row['shuffled']:.2f} with the labels shuffled", "Routing")


def _tokens(run: store.Run) -> Finding | None:
    row = _of_model(run, kind="input", metric="first_choice_vocabulary")
    if row is None:
        return None
    what = "Experts choose by the token itself" if _above(row) else "Experts hardly choose by the token itself"
    evidence = f"{row['value']:.1%} of first choices are tokens of the expert's own{_range(row, '%')}"
    return Finding(what, f"{evidence}; {row['shuffled']:.1%} in shuffled text", "Expert")


def _neighbours(run: store.Run) -> Finding | None:
    rows = consistency.srp_model(run).filter(pl.col("domain").is_null() & (pl.col("segment_length") == 16))
    row = _with_control(rows)
    if row is None:
        return None
    above = row["shuffled"] is None or _above(row)
    what = "Neighbouring tokens share experts" if above else "Neighbouring tokens share no more experts than others"
    evidence = f"SRP over 16 tokens is {row['value']:.1%}{_range(row, '%')}"
    evidence += f"; popularity alone gives {row['shuffled']:.1%}" if row["shuffled"] is not None else ""
    return Finding(what, evidence, "Local consistency")


def _cache(run: store.Run) -> Finding | None:
    rows = {row["name"]: row for row in consistency.key_numbers(run).iter_rows(named=True)}
    if "LRU hit rate" not in rows:
        return None
    lru = rows["LRU hit rate"]
    what = f"A cache of twice the experts that a token uses answers {lru['value']:.0%} of the requests"
    parts = ["LRU, one cache for all layers"]
    parts += [f"{lru['control']:.0%} in shuffled text"] if lru["control"] is not None else []
    parts += [f"at most {rows['Belady hit rate']['value']:.0%} by any rule"] if "Belady hit rate" in rows else []
    return Finding(what, "; ".join(parts), "Cache")


def _router(run: store.Run) -> Finding | None:
    frame = confidence.confidence(run).filter(pl.col("quantity") == "selected_probability").drop_nulls("mean")
    if frame.is_empty():
        return None
    low, middle, high = (float(frame.select(getattr(pl.col("mean"), how)()).item()) for how in ("min", "median", "max"))
    what = f"The selected experts hold {middle:.0%} of the router's probability"
    return Finding(what, f"median of the layers, {low:.0%} to {high:.0%}; the rest is what top-k leaves out", "Routing")


def _text(run: store.Run) -> Finding | None:
    needed = coverage.needed(run).filter(pl.col("goal") == "ranking")
    enough = needed.filter(pl.col("verdict") == "enough")["score"].to_list()
    if not enough:
        return None  # the alerts say so
    names = ", ".join(coverage.SCORES.get(name, name) for name in enough)
    evidence = f"two texts of this length order them alike (rank correlation {needed['target'][0]:.2f})"
    return Finding(f"The text is enough to rank experts by {names}", evidence, "Overview")


def _of_model(run: store.Run, *, kind: str, metric: str) -> dict[str, Any] | None:
    """The row of the whole model of one measure of specialization that has its control."""
    frame = specialization.specialization(run).filter(pl.col("layer").is_null() & pl.col("shuffled").is_not_null())
    frame = frame.filter((pl.col("kind") == kind) & (pl.col("metric") == metric))
    return None if frame.is_empty() else frame.row(0, named=True)


def _with_control(rows: pl.DataFrame) -> dict[str, Any] | None:
    observed = rows.filter(pl.col("control") == "observed")
    if observed.is_empty():
        return None
    shuffled = rows.filter(pl.col("control") == "shuffled")["value"]
    return {**observed.row(0, named=True), "shuffled": shuffled[0] if len(shuffled) else None}


def _above(row: dict[str, Any]) -> bool:
    """Whether the figure lies above its control, its interval counted."""
    return bool((row["low"] if row["low"] is not None else row["value"]) > row["shuffled"])


def _range(row: dict[str, Any], form: str = "f") -> str:
    low, high = row["low"], row["high"]
    if low is None or high is None:
        return ""
    return f" ({low:.1%} to {high:.1%})" if form == "%" else f" ({low:.2f} to {high:.2f})"
