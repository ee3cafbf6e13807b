"""How often neighbouring tokens share experts, by how far apart they are, beside controls."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from profiler.headline.layerwise import LayerPart, joined
from profiler.headline.subject import CONTROLS, SEED, Rows, Subject
from profiler.metrics import temporal
from profiler.metrics._intervals import interval, resample_weights

LAGS = (1, 2, 4, 8, 16, 32)
"""Distances in tokens; the first choice is compared at the first alone, as published."""

RATES = ("first_choice_repeat", "overlap_repeat", "mean_overlap")
CONTROL_TOKENS = 150_000
"""Tokens of whole sequences, drawn at random, on which controls rest."""

NUM_RESAMPLES = 1000
CONFIDENCE = 0.95


def repetition_layer(subject: Subject, axis: int) -> Rows:
    """Repeat rates of one MoE layer with intervals over sequences, and of its controls."""
    rows: Rows = []
    longest = int(subject.lengths.max(initial=0))
    if longest < 2:
        return rows
    layer, lags = subject.run.layers[axis], [lag for lag in LAGS if lag < longest]
    for control in CONTROLS:
        wanted = lags if control in ("observed", "shuffled") else lags[:1]
        sums = _sums(subject, axis, control, wanted)
        place = {"control": control, "layer": layer.layer, "step": layer.step}
        weights = subject.once(_weights) if control == "observed" else None
        for index, lag in enumerate(wanted):
            rows += _rows(sums[index], weights, {**place, "at": float(lag)})
    return rows


REPETITION = LayerPart("repetition", repetition_layer, joined)
"""Repeat rates, layer by layer."""


def _weights(subject: Subject) -> NDArray[np.float64]:
    return resample_weights(num_sequences=subject.groups.count, num_resamples=NUM_RESAMPLES, seed=SEED)


def _sums(subject: Subject, axis: int, control: str, lags: list[int]) -> NDArray[np.float64]:
    """(lags, groups, 4) as ``temporal.repeat_sums``: over all blocks, or, of a control, over a sample."""
    sums = np.zeros((len(lags), subject.groups.count, 4))
    text = subject.everything if control == "observed" else subject.sample(CONTROL_TOKENS)
    for mine, block, ids in text.pieces(axis, control):
        sums += temporal.repeat_sums(
            ids=ids, offsets=block.offsets, num_experts=subject.run.layers[axis].num_experts, lags=lags,
            group=text.group[mine], num_groups=subject.groups.count,
        )  # fmt: skip
    return sums


def _rows(sums: NDArray[np.float64], weights: NDArray[np.float64] | None, place: dict[str, object]) -> Rows:
    """Rates of one lag from sums by group, (groups, 4); with intervals where there are weights to draw by."""
    pairs = sums[:, 3].sum()
    if not pairs:
        return []
    names = RATES if place["at"] == 1.0 else RATES[2:]
    rows: Rows = []
    for index, name in enumerate(RATES):
        if name not in names:
            continue
        value = sums[:, index].sum() / pairs
        row = {**place, "metric": name, "value": float(value), "tokens": int(pairs)}
        if weights is not None and len(sums) > 1:
            drawn = weights @ sums
            ends = interval(
                estimate=np.asarray(value), resampled=drawn[:, index] / np.maximum(drawn[:, 3], 1.0),
                confidence=CONFIDENCE, rule="percentile",
            )  # fmt: skip
            row |= {"low": float(ends[0]), "high": float(ends[1])}
        rows.append(row)
    return rows
