"""Exhibits of the page Overview: what the text is, whether it is enough, and whether importance scores agree."""

from __future__ import annotations

from typing import Literal

import polars as pl

import store
from app.exhibits.absent import not_yet, require
from app.exhibits.exhibit import Absent, Entry, Exhibit, Frames, fresh
from app.figures import coverage as figures
from app.figures import curves, similarity
from app.figures.style import Theme
from app.frames import coverage as frames_of_coverage
from app.frames import domains, load
from planner.importance import find

Score = Literal["reap", "gate_mass", "frequency", "mean_gate", "ean", "man"]
Goal = Literal["ranking", "cut 25 %", "cut 50 %"]


def text(run: store.Run, *, frames: Frames = fresh, theme: Theme = "light") -> Exhibit:
    """Tokens per domain."""
    frame = frames(domains.domain_tokens, run)
    if frame.is_empty():
        raise Absent("No sequence of this run has been recorded.")
    return Exhibit(
        figure=curves.domain_bars(frame, theme=theme),
        frame=frame,
        read="Every statistic of this run can be read per domain; a domain with few tokens says little.",
        rests_on=f"{frame['tokens'].sum():,} tokens in {frame['sequences'].sum():,} sequences.",
        alt="Bars: tokens per domain of the run's text",
    )


def reach(run: store.Run, *, frames: Frames = fresh, theme: Theme = "light") -> Exhibit:
    """Tokens per expert over the layers."""
    frame = frames(load.coverage, run)
    starved = int(frame["starved"].sum())
    words = "No expert starves."
    if starved:
        words = f"{starved:,} experts starve: collect more text, or text that reaches them."
    return Exhibit(
        figure=curves.coverage_band(frame, theme=theme),
        frame=frame,
        read="Each layer's experts from the least to the most used. Experts below the dashed line, a tenth of the "
        f"balanced load, have too few tokens to be judged or calibrated. {words}",
        rests_on=f"{run.info.tokens:,} tokens.",
        alt="Bands: fewest, middle and most tokens per expert in every MoE layer",
    )


def convergence(
    run: store.Run,
    *,
    frames: Frames = fresh,
    theme: Theme = "light",
    score: Score | None = None,
    goal: Goal = "ranking",
) -> Exhibit:
    """How far two texts of one length agree on the ranking of experts; by the best score that the run has."""
    needed = measured(run, frames)
    scores = needed["score"].unique(maintain_order=True).to_list()
    if score is not None and score not in scores:
        raise Absent(f"This run has no ranking by {frames_of_coverage.SCORES[score]} for parts of its text.")
    chosen = score or preferred(scores)
    row = needed.filter((pl.col("score") == chosen) & (pl.col("goal") == goal)).row(0, named=True)
    curve = frames(frames_of_coverage.convergence, run)
    curve = curve.filter((pl.col("score") == chosen) & (pl.col("goal") == goal))
    words = frames_of_coverage.SCORES.get(chosen, chosen)
    return Exhibit(
        figure=figures.convergence_curve(
            curve, title=f"Agreement of two texts, experts ranked by {words}", tokens=row["tokens"],
            target=row["target"], theme=theme,
        ),
        frame=curve,
        read="Two texts of the same kind would agree this far on which experts to keep. Below the target, a plan made "
        "on this text is partly made of its accidents. The dashed line carries the agreement of halves on to longer "
        "texts; where it leaves the measured points, do not trust it beyond them.",
        rests_on=f"Mean over {len(run.layers)} layers of 100 random choices of disjoint parts (band: 95 % of them), "
        f"sixteenths of the text: {_length(run)}",
        alt="Curve: agreement of two texts over their length, with target and chance",
    )  # fmt: skip


def score_agreement(run: store.Run, *, frames: Frames = fresh, theme: Theme = "light") -> Exhibit:
    """How far the importance scores of a run agree with each other."""
    frame = frames(frames_of_coverage.agreement, run).filter(pl.col("layer").is_null())
    if frame.is_empty():
        raise Absent("This run can give one score of importance only: there is nothing to compare it with.")
    titles = {name: find(name).title for name in dict.fromkeys([*frame["first"], *frame["second"]])}
    return Exhibit(
        figure=similarity.agreement_map(
            frame, titles, title="Agreement of scores, mean over the layers", theme=theme,
            beside=("overlap_25", "cut alike, lowest quarter", "random rankings"),
        ),
        frame=frame,
        read="Blue: both scores rank the experts alike, so the cheaper one will do. In brackets: no more alike than "
        "random rankings. Where scores differ, only damage measured after a cut can say which is right.",
        rests_on=f"{frame['experts'][0]:,} experts, {_length(run)}",
        alt="Map of importance scores by importance scores: rank correlation",
    )  # fmt: skip


def measured(run: store.Run, frames: Frames) -> pl.DataFrame:
    """``app.frames.coverage.needed``, which has rows.

    Raises:
        Absent: parts of the run's text were not compared.
    """
    what = "Whether two texts would rank the experts alike"
    if run.live:
        raise not_yet(what, run)
    needed = frames(frames_of_coverage.needed, run)
    if needed.is_empty():
        require(what, run, "order")
        if run.info.sequences < 2 and run.has_trace:
            raise Absent("The run holds a single sequence: it cannot be halved.")
        raise not_yet(what, run)
    return needed


def preferred(scores: list[str]) -> str:
    """The score that is shown first."""
    return next((name for name in ("reap", "gate_mass", "frequency") if name in scores), scores[0])


def _length(run: store.Run) -> str:
    """What the figures rest on, with a full stop."""
    sequences = f" in {run.info.sequences:,} sequences" if run.info.sequences else ""
    return f"{run.info.tokens:,} tokens{sequences}."


EXHIBITS = (
    Entry("text", text, "Tokens per domain", page="overview"),
    Entry("tokens-per-expert", reach, "Tokens per expert", page="overview"),
    Entry("convergence", convergence, "Whether the text is enough", page="overview"),
    Entry("score-agreement", score_agreement, "Agreement of importance scores", page="overview", report=False),
)
