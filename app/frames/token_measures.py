"""Measures of single tokens from what the router decided there: one figure for each, of one layer or of all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

import store
from app.exhibits.exhibit import Absent
from app.frames.expert import importance
from app.frames.token_measure import Measure
from app.frames.token_routes import Routes
from moescope.errors import StoreError
from profiler.metrics.comparison import boundary_margin

COLUMNS = {"position": pl.Int64, "expert": pl.Int32, "value": pl.Float64}
NAMES = ("entropy", "margin", "importance", "weight")
"""Measures of this module; ``weight`` is of one layer only."""

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """A measure of successive tokens.

    Attributes:
        measure: its words and range.
        frame: one row per token: position, expert (first choice in the layer), value (null = not known).
    """

    measure: Measure
    frame: pl.DataFrame


def measured(
    run: store.Run,
    routes: Routes,
    *,
    sequence: int,
    name: str,
    label: str,
    every: bool = False,
    expert: int = 0,
    score: str = "frequency",
    scores: pl.DataFrame | None = None,
) -> Measured:
    """One of :data:`NAMES` of the tokens of ``routes``.

    Args:
        sequence: whose tokens they are.
        label: the layer.
        every: the mean over all layers instead; importance is then over the mean of its layer.
        expert: whose weight is asked for.
        score: importance score, one of ``score_names``.
        scores: ``app.frames.expert.importance`` of the run, where it has been made already.

    Raises:
        Absent: the run does not hold what the measure is taken from.
    """
    labels = routes.labels if every and name != "weight" else [label]
    makers: dict[str, Callable[[], tuple[Measure, Values]]] = {
        "entropy": lambda: _entropy(run, routes, sequence, labels),
        "margin": lambda: _margin(run, routes, sequence, labels),
        "importance": lambda: _importance(
            run, routes, labels, importance(run) if scores is None else scores, score=score, every=every
        ),
        "weight": lambda: _weight(run, routes, label, expert),
    }
    measure, values = makers[name]()
    return Measured(measure, of_first(routes, label, values))


def of_first(routes: Routes, label: str, values: Values | None = None) -> pl.DataFrame:
    """One row per token that uses an expert in the layer: position, expert (its first choice), value (NaN = null)."""
    ids, _ = routes.of(label)
    first = ids[:, 0] if ids.shape[1] else np.full(len(ids), -1, np.int16)
    used = np.flatnonzero(first >= 0)
    value = np.full(len(first), np.nan) if values is None else values
    columns = {"position": used + routes.start, "expert": first[used], "value": value[used]}
    return pl.DataFrame(columns, schema=COLUMNS).with_columns(pl.col("value").fill_nan(None))


def score_names(scores: pl.DataFrame) -> dict[str, str]:
    """The importance scores of ``app.frames.expert.importance`` with their titles."""
    return dict(scores.select("score", "title").unique(maintain_order=True).iter_rows())


def of_weights(routes: Routes, label: str) -> Values:
    """(tokens,) entropy of the gate weights over ln of their number: 0 = one expert decides, 1 = even; NaN without."""
    ids, _ = routes.of(label)
    parts = routes.parts[routes.labels.index(label)].astype(np.float64)
    nats = -np.sum(parts * np.log(np.where(parts > 0, parts, 1.0)), axis=1)
    used = (ids >= 0).sum(axis=1)
    known = parts.sum(axis=1) > 0
    return np.where(known & (used > 1), nats / np.log(np.maximum(used, 2)), np.where(known, 0.0, np.nan)).clip(max=1.0)


def _entropy(run: store.Run, routes: Routes, sequence: int, labels: list[str]) -> tuple[Measure, Values]:
    scores = _scores(run, routes, sequence, labels)
    if scores is None:
        _require_several(run, routes, labels, "The entropy of a token")
        values = np.stack([of_weights(routes, label) for label in labels])
        return _mean_measure(
            "entropy", "entropy of the gate weights", labels, _mean(values),
            note="Of the gate weights over the selection, divided by ln k: 0 = one expert decides, 1 = even. The run "
            "keeps no router scores of single tokens.",
        ), _mean(values)  # fmt: skip
    sizes = {layer.layer: layer.num_experts for layer in run.layers}
    values = np.stack([_router_entropy(*scores[label], sizes[_layer(routes, label)]) for label in labels])
    return _mean_measure(
        "entropy", "router entropy", labels, _mean(values),
        note="Of the router probabilities, divided by ln of the experts: 0 = certain, 1 = even. What lies beyond the "
        "largest scores that were kept counts as spread evenly.",
    ), _mean(values)  # fmt: skip


def _router_entropy(logits: NDArray[np.float32], log_partition: NDArray[np.float32], num_experts: int) -> Values:
    """(tokens,) entropy of the router probabilities over ln E, from the largest logits and logsumexp of all."""
    log = np.minimum(logits.astype(np.float64) - log_partition[:, None].astype(np.float64), 0.0)
    known = np.isfinite(log)
    part = np.where(known, np.exp(np.where(known, log, 0.0)), 0.0)
    nats = -np.sum(part * np.where(known, log, 0.0), axis=1)
    rest, others = np.clip(1.0 - part.sum(axis=1), 0.0, 1.0), num_experts - known.sum(axis=1)
    spread = (rest > 0) & (others > 0)
    nats -= np.where(spread, rest * np.log(np.where(spread, rest, 1.0) / np.maximum(others, 1)), 0.0)
    return np.where(known.any(axis=1), nats / np.log(max(num_experts, 2)), np.nan).clip(0.0, 1.0)


def _margin(run: store.Run, routes: Routes, sequence: int, labels: list[str]) -> tuple[Measure, Values]:
    scores = _scores(run, routes, sequence, labels)
    if scores is None:
        _require_several(run, routes, labels, "The margin of a token")
        parts = [routes.parts[routes.labels.index(label)].astype(np.float64) for label in labels]
        used = np.stack([(routes.of(label)[0] >= 0).sum(axis=1) > 1 for label in labels])
        values = np.where(used, np.stack([part[:, 0] - part[:, 1] for part in parts]), np.nan)
        return _mean_measure(
            "margin", "margin of the first two gate weights", labels, _mean(values),
            note="The first gate weight minus the second, as parts of their sum: 0 = a tie. The run keeps no router "
            "scores of single tokens, which would say how close the last choice was.",
        ), _mean(values)  # fmt: skip
    values = np.stack([boundary_margin(ids=routes.of(label)[0], logits=scores[label][0]) for label in labels])
    mean = _mean(values)
    return Measure(
        "margin", f"margin at the boundary{_of(labels)}", "logits", 0.0, ceiling(mean),
        note="Logit of the last expert taken minus that of the first left out: 0 = a tie, which rounding can decide.",
    ), mean  # fmt: skip


def _importance(
    run: store.Run, routes: Routes, labels: list[str], scores: pl.DataFrame, *, score: str, every: bool
) -> tuple[Measure, Values]:
    frame = scores.filter(pl.col("score") == score)
    if frame.is_empty():
        raise Absent(f"The run cannot give the importance score {score}.")
    even = "weights" in run.omissions
    summed = []
    for label in labels:
        layer, step = routes.layers[routes.labels.index(label)]
        mine = frame.filter((pl.col("layer") == layer) & (pl.col("step") == step))
        worth = np.full(max(int(mine["expert"].to_numpy().max(initial=-1)), int(routes.ids.max(initial=0))) + 1, np.nan)
        worth[mine["expert"].to_numpy()] = mine["value"].to_numpy()
        if every:
            worth = worth / np.nanmean(worth) if np.nansum(np.abs(worth)) > 0 else worth
        ids, weights = routes.of(label)
        scored = np.where(ids >= 0, worth[np.maximum(ids, 0)], np.nan)
        parts = np.where(np.isnan(scored), 0.0, np.where(ids >= 0, 1.0, 0.0) if even else weights.astype(np.float64))
        total = parts.sum(axis=1)
        value = np.sum(np.nan_to_num(scored) * parts, axis=1) / np.where(total > 0, total, 1.0)
        summed.append(np.where(total > 0, value, np.nan))
    values = _mean(np.stack(summed))
    title, unit = frame["title"][0], "x layer mean" if every else frame["unit"][0]
    how = "equally, as the run holds no gate weights" if even else "by their gate weights"
    of = "mean over all layers, each score over the mean of its layer" if every else "in this layer"
    low = float(np.nanmin(values)) if np.isfinite(values).any() else 0.0
    return Measure(
        "importance", f"{title} of the experts{_of(labels)}", unit, floor(low), ceiling(values, part=100),
        note=f"Mean of the score over the selected experts, weighted {how}; {of}.",
    ), values  # fmt: skip


def _weight(run: store.Run, routes: Routes, label: str, expert: int) -> tuple[Measure, Values]:
    if "weights" in run.omissions:
        raise Absent(f"Gate weights are not known: {run.omissions['weights'].rstrip('.')}.")
    ids, weights = routes.of(label)
    values = np.where(ids == expert, weights, 0.0).sum(axis=1, dtype=np.float64)
    return Measure(
        "weight", f"gate weight of expert {expert}, layer {label}", "", 0.0, ceiling(values, part=100),
        note="The weight that the model multiplies this expert's output with; 0 where it is not selected.",
    ), values  # fmt: skip


def ceiling(values: Values, part: float = 98.0) -> float:
    """The top of a scale: a percentile of the values, rounded up to two digits; 1 where there is none."""
    known = values[np.isfinite(values)]
    top = float(np.percentile(known, part)) if len(known) else 0.0
    if top <= 0:
        return 1.0
    size = 10.0 ** (np.floor(np.log10(top)) - 1)
    return float(np.round(np.ceil(top / size - 1e-6) * size, 12))


def floor(value: float) -> float:
    """The bottom of a scale: the value rounded down to two digits."""
    if value == 0:
        return 0.0
    size = 10.0 ** (np.floor(np.log10(abs(value))) - 1)
    return float(np.round(np.floor(value / size + 1e-6) * size, 12))


def _mean_measure(name: str, label: str, labels: list[str], values: Values, *, note: str) -> Measure:
    """A share of 1: over the whole range in one layer; a mean of many varies little, and gets the range that it has."""
    known = values[np.isfinite(values)]
    low, high = (floor(float(known.min())), ceiling(values, part=100)) if len(labels) > 1 and len(known) else (0.0, 1.0)
    return Measure(name, label + _of(labels), "", low, high, note)


def _of(labels: list[str]) -> str:
    return f", mean of {len(labels)} layers" if len(labels) > 1 else f", layer {labels[0]}"


def _mean(values: Values) -> Values:
    """(tokens,) mean over layers of what is known; NaN where nothing is."""
    known = np.isfinite(values)
    count = known.sum(axis=0)
    return np.where(count > 0, np.where(known, values, 0.0).sum(axis=0) / np.maximum(count, 1), np.nan)


def _require_several(run: store.Run, routes: Routes, labels: list[str], what: str) -> None:
    """Refuse what is taken from gate weights where there are none, or one."""
    if "weights" in run.omissions:
        raise Absent(f"{what} needs gate weights or router scores: {run.omissions['weights'].rstrip('.')}.")
    if all((routes.of(label)[0] >= 0).sum(axis=1).max(initial=0) < 2 for label in labels):
        raise Absent(
            f"{what} cannot be told from one gate weight: each token uses one expert, and the run keeps no router "
            "scores. Collect again:",
            remedy="moescope collect MODEL --data PATH --router-scores 16",
        )


def _scores(
    run: store.Run, routes: Routes, sequence: int, labels: list[str]
) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]] | None:
    """Router logits (tokens, m) and logsumexp (tokens,) of each layer; None where the run keeps none."""
    try:
        kept = run.stretch_scores(
            sequence,
            first=routes.start,
            last=routes.start + routes.count - 1,
            layers=sorted({_layer(routes, label) for label in labels}),
        )
    except StoreError:
        return None
    axis = {pair: index for index, pair in enumerate(kept.layers)}
    places = {label: axis[routes.layers[routes.labels.index(label)]] for label in labels}
    return {label: (kept.logits[at, 0], kept.log_partition[at, 0]) for label, at in places.items()}


def _layer(routes: Routes, label: str) -> int:
    return routes.layers[routes.labels.index(label)][0]
