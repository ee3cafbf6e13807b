"""Findings about the run itself: whether it can be trusted, whether its text is enough, and what it cannot say."""

from __future__ import annotations

import polars as pl

import store
from app.exhibits.exhibit import Frames
from app.findings.finding import Evidence, Finding, Tone, listed
from app.frames import coverage as frames_of_coverage
from app.frames import overview
from profiler.metrics.coverage import STARVED

_LEVELS = {
    "activations": "super experts, importance from outputs, what experts add to the stream",
    "similarity": "how alike experts are",
    "errors": "what narrower weights do",
    "lookahead": "whether routers can be asked ahead",
    "attention": "attention sinks",
    "predictions": "experts for predicted tokens",
    "gradients": "importance from gradients",
    "moments": "second moments of the experts' inputs",
}
"""What each level of collection would add."""


def capture(run: store.Run, frames: Frames) -> list[Finding]:
    """Whether the capture proved itself right."""
    counts = dict(frames(_statuses, run).iter_rows())
    words: dict[str, tuple[str, Tone]] = {
        "valid": ("The capture proved itself right", "plain"),
        "warning": ("The capture is doubtful", "attention"),
        "invalid": ("The capture is invalid and nothing below should be relied on", "problem"),
        "unchecked": ("The capture could not prove itself right", "attention"),
    }
    sentence, tone = words[run.badge.status]
    if run.live:
        sentence = (
            f"This run is still being collected: all figures are of the {run.info.tokens:,} tokens published so far"
        )
        tone = "attention"
    elif not run.info.complete:
        sentence += ", and the collection ended before its text did"
    return [Finding("Capture", f"{sentence}: {run.badge.reason}", evidence=tuple(
        Evidence(f"checks, {status}", float(number), form="count", source="table check")
        for status, number in counts.items()
    ), tone=tone, page="Overview")]  # fmt: skip


def starved(run: store.Run, frames: Frames) -> list[Finding]:
    """Whether the text reaches every expert."""
    found = frames(frames_of_coverage.starved, run)
    experts = sum(layer.num_experts for layer in run.layers)
    more = ""
    if found.is_empty():
        answer = f"No expert lacks tokens: none has fewer than {STARVED:.0%} of a balanced router's"
    else:
        verb, them = ("has", "it") if len(found) == 1 else ("have", "them")
        answer = f"{len(found):,} of {experts:,} experts {verb} fewer than {STARVED:.0%} of a balanced router's tokens,"
        answer += f" too few to judge or calibrate {them}"
        reached = found.filter(pl.col("tokens") > 0)["needed"]
        if len(reached):
            most = frames_of_coverage.rounded(float(reached.to_numpy().max()))
            more = f"About {most} tokens of such text would give all that were used enough."
    return [Finding("Coverage", answer, more, (
        Evidence("experts with too few tokens", float(len(found)), control=float(experts), control_is="experts in all",
                 form="count", source="starved_experts", exhibit="tokens-per-expert"),
    ), "attention" if len(found) else "plain", page="Overview")]  # fmt: skip


def rankings(run: store.Run, frames: Frames) -> list[Finding]:
    """Whether the text settles the order of the experts."""
    ranked = frames(frames_of_coverage.needed, run).filter(pl.col("goal") == "ranking").sort("score")
    if ranked.is_empty():
        return []
    enough_first = (pl.col("verdict") == "enough").alias("enough")
    ranked = ranked.with_columns(pl.col("score").replace(frames_of_coverage.SCORES), enough_first)
    ranked = ranked.sort("enough", "whole", descending=True, nulls_last=True, maintain_order=True)
    enough = ranked.filter("enough")["score"].sort().to_list()
    open_ = ranked.filter(~pl.col("enough")).sort("needed").select("score", "verdict").rows()
    if not open_:
        answer = "The text settles the order of experts by every score: two such texts would rank them alike"
    elif enough:
        answer = f"The text settles the order of experts by {listed(enough)}"
    else:
        answer = "No score of importance orders the experts reliably on this text"
    words = listed([f"{score}: {verdict}" for score, verdict in open_])
    more = "Agreement is that of two texts as long as this one."
    more += f" Tokens that {'others' if enough else 'it'} would take: {words}." if open_ else ""
    return [Finding("Rankings", answer, more, tuple(
        Evidence(f"agreement by {row['score']}", row["whole"], control=row["chance_high"],
                 control_is="at random, 97.5 %", source="split_half_agreement",
                 exhibit="convergence")
        for row in ranked.iter_rows(named=True)
    ), "attention" if open_ else "plain", page="Overview")]  # fmt: skip


def unknown(run: store.Run, frames: Frames) -> list[Finding]:
    """What the source cannot say, and which levels were not recorded."""
    found = [
        Finding("Not known", f"This source cannot say anything of {subject}: {reason.rstrip('.')}", tone="unknown")
        for subject, reason in frames(overview.omissions, run).iter_rows()
    ]
    if run.info.origin.startswith("import"):
        return found
    recorded = {level.strip() for level in run.info.levels.split(",")}
    missing = [f"{level} ({what})" for level, what in _LEVELS.items() if level not in recorded]
    if missing:
        answer = f"Not recorded, and so not known: {'; '.join(missing)}"
        recorded_levels = Evidence("recorded levels", ", ".join(sorted(recorded)), source="table run")
        found.append(Finding("Not known", answer, evidence=(recorded_levels,), tone="unknown"))
    return found


def _statuses(run: store.Run) -> pl.DataFrame:
    counted = run.table("check").group_by("status").len()
    order = {status: place for place, status in enumerate(overview.STATUS_ORDER)}
    return counted.sort(pl.col("status").replace_strict(order, default=9, return_dtype=pl.Int8))
