"""Is the text enough? How alike two texts of some length rank the experts, and how much more it takes."""

from __future__ import annotations

import math

import polars as pl

import store
from planner.importance import agreement as importance_agreement
from profiler.headline.coverage import layer_reach
from profiler.metrics import coverage as formulas
from profiler.metrics.agreement import cut_overlap

GOALS = {"ranking": "order of all experts", "cut 25 %": "the lowest quarter", "cut 50 %": "the lower half"}
"""What two texts should agree on."""

SCORES = {
    "frequency": "frequency", "gate_mass": "gate mass", "mean_gate": "mean gate weight", "ean": "EAN", "man": "MAN",
    "reap": "REAP",
}  # fmt: skip
"""The scores whose sums are kept for parts of the text, in words."""

_FACTORS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 8.0, 16.0)
_CONVERGENCE = {
    "score": pl.String, "goal": pl.String, "share": pl.Float64, "tokens": pl.Float64, "kind": pl.String,
    "value": pl.Float64, "low": pl.Float64, "high": pl.Float64, "chance": pl.Float64,
}  # fmt: skip
_NEEDED = {
    "score": pl.String, "goal": pl.String, "half": pl.Float64, "low": pl.Float64, "high": pl.Float64,
    "chance_high": pl.Float64, "whole": pl.Float64, "target": pl.Float64, "tokens": pl.Int64, "needed": pl.Float64,
    "verdict": pl.String,
}  # fmt: skip


def starved(run: store.Run) -> pl.DataFrame:
    """One row per expert with too few tokens: layer, step, expert, tokens, threshold, needed = tokens of such text that
    would give it as many as the threshold (at least that many, if it got none)."""
    rows = [
        (layer.layer, layer.step, expert, int(counts[expert]), reach.threshold, float(reach.needed[expert]))
        for layer, counts, reach in layer_reach(run)
        for expert in reach.starved.nonzero()[0].tolist()
    ]
    schema = {"layer": pl.Int32, "step": pl.Int32, "expert": pl.Int32, "tokens": pl.Int64, "threshold": pl.Float64,
              "needed": pl.Float64}  # fmt: skip
    return pl.DataFrame(rows, schema=schema, orient="row")


def convergence(run: store.Run) -> pl.DataFrame:
    """Agreement of two independent texts over their length: score, goal, share of this run's text, tokens, kind, value,
    low, high, chance.

    kind: "measured" on parts of the text (low, high: 95 % of random choices of parts), "expected" by Spearman-Brown
    from the agreement of halves. chance: what random rankings give.
    """
    found = _measured(run)
    if found.is_empty():
        return pl.DataFrame(schema=_CONVERGENCE)
    tokens = run.info.tokens
    chance = dict(_chance(run).select("goal", "value").iter_rows())
    rows: list[tuple[object, ...]] = [
        (score, goal, share, share * tokens, "measured", value, low, high, chance.get(goal))
        for score, goal, share, value, low, high in found.iter_rows()
    ]
    for score, goal, whole in _whole(run).iter_rows():
        rows += [
            (score, goal, factor, factor * tokens, "expected", _lengthened(goal, whole, factor), None, None,
             chance.get(goal))
            for factor in _FACTORS
        ]  # fmt: skip
    return pl.DataFrame(rows, schema=_CONVERGENCE, orient="row")


def needed(run: store.Run) -> pl.DataFrame:
    """One row per score and goal: agreement of two halves with its range over choices of halves, what is expected of
    two texts as long as this one, the target, tokens of this run, tokens that the target takes, and a verdict.

    verdict: "enough"; "collect N more"; "no better than chance" where halves agree no more than random rankings do.
    """
    chance = dict(_chance(run).select("goal", "high").iter_rows())
    wholes = {(score, goal): value for score, goal, value in _whole(run).iter_rows()}
    asked = {(score, goal): value for score, goal, value in _goal_rows(run, "tokens_needed").iter_rows()}
    tokens = run.info.tokens
    rows = []
    for score, goal, half, low, high in _halves(run).iter_rows():
        bound, wanted = chance.get(goal, math.nan), asked.get((score, goal), math.nan)
        whole = _lengthened(goal, wholes.get((score, goal), math.nan), 1.0)
        rows.append((score, goal, half, low, high, bound, whole, _target(goal), tokens, wanted,
                     verdict(half=half, chance_high=bound, tokens=tokens, needed=wanted)))  # fmt: skip
    return pl.DataFrame(rows, schema=_NEEDED, orient="row")


def verdict(*, half: float, chance_high: float, tokens: float, needed: float) -> str:
    """Whether a text is enough for one score, in words."""
    if not math.isfinite(half) or half <= chance_high:
        return "no better than chance"
    if needed <= tokens:
        return "enough"
    return f"collect {rounded(needed - tokens)} more"


def agreement(run: store.Run) -> pl.DataFrame:
    """How far the scores agree with each other: see ``planner.importance.agreement``."""
    return importance_agreement.agreement(run)


def rounded(tokens: float) -> str:
    """A number of tokens with two digits that count: the estimate is no better."""
    if not math.isfinite(tokens):
        return "endlessly many"
    digits = max(len(str(int(tokens))) - 2, 0)
    return f"{round(tokens / 10**digits) * 10**digits:,}"


def _target(goal: str) -> float:
    """The agreement that is asked for: 0.95, of a cut as its overlap at that correlation."""
    if goal == "ranking":
        return formulas.TARGET
    return float(cut_overlap(correlation=formulas.TARGET, share=_share(goal)))


def _share(goal: str) -> float:
    return float(goal.split()[1]) / 100


def _lengthened(goal: str, whole: float, factor: float) -> float:
    """Agreement of texts ``factor`` times as long as those that correlate ``whole``; of a cut, as its overlap."""
    correlation = formulas.lengthened(agreement=whole, factor=factor)
    return float(correlation if goal == "ranking" else cut_overlap(correlation=correlation, share=_share(goal)))


def _halves(run: store.Run) -> pl.DataFrame:
    """Agreement of halves over all layers: score, goal, value, low, high."""
    frame = _split(run).filter(pl.col("length").is_null() & (pl.col("measure") != "kendall"))
    return frame.select("score", "goal", "value", "low", "high")


def _whole(run: store.Run) -> pl.DataFrame:
    """What is expected of two texts as long as this one, as a correlation: score, goal, value."""
    return _split(run).filter(pl.col("length") == "whole").select("score", "goal", "value")


def _split(run: store.Run) -> pl.DataFrame:
    frame = _rows(run, "split_half_agreement").filter(pl.col("control") == "observed").with_columns(goal=_goal("at"))
    text = pl.col("parameters").str
    return frame.with_columns(length=text.json_path_match("$.length"), measure=text.json_path_match("$.measure"))


def _measured(run: store.Run) -> pl.DataFrame:
    """Agreement of two texts of each length: score, goal, share, value, low, high."""
    frame = _rows(run, "prefix_agreement").filter(pl.col("parameters").str.json_path_match("$.against") == "equal")
    share = pl.col("parameters").str.json_path_match("$.share").cast(pl.Float64)
    frame = frame.with_columns(cut=share).with_columns(goal=_goal("cut"))
    return frame.select("score", "goal", pl.col("at").alias("share"), "value", "low", "high")


def _goal_rows(run: store.Run, metric: str) -> pl.DataFrame:
    return _rows(run, metric).with_columns(goal=_goal("at")).select("score", "goal", "value")


def _chance(run: store.Run) -> pl.DataFrame:
    frame = run.metrics("split_half_agreement").filter((pl.col("control") == "chance") & pl.col("layer").is_null())
    return frame.with_columns(goal=_goal("at")).select("goal", "value", "high")


def _rows(run: store.Run, metric: str) -> pl.DataFrame:
    """Rows of all layers together, with the score's name beside them."""
    frame = run.metrics(metric).filter(pl.col("layer").is_null())
    return frame.with_columns(score=pl.col("parameters").str.json_path_match("$.score"))


def _goal(share: str) -> pl.Expr:
    """The goal that a share of experts stands for; none = the ranking."""
    cut = pl.format("cut {} %", (pl.col(share) * 100).round().cast(pl.Int64))
    return pl.when(pl.col(share).is_null()).then(pl.lit("ranking")).otherwise(cut)
