"""How often neighbouring tokens share experts, by how far apart they are, beside controls."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

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


def repetition_rows(subject: Subject) -> Rows:
    """Repeat rates of every MoE layer with intervals over sequences, and of its controls."""
    rows: Rows = []
    if not subject.has_trace or int(subject.lengths.max(initial=0)) < 2:
        return rows
    lags = [lag for lag in LAGS if lag < int(subject.lengths.max())]
    weights = resample_weights(num_sequences=subject.groups.count, num_resamples=NUM_RESAMPLES, seed=SEED)
    for axis, layer in enumerate(subject.run.layers):
        for control in CONTROLS:
            wanted = lags if control in ("observed", "shuffled") else lags[:1]
            sums = _sums(subject, axis, control, wanted)
            place = {"control": control, "layer": layer.layer, "step": layer.step}
            for index, lag in enumerate(wanted):
                rows += _rows(sums[index], weights if control == "observed" else None, {**place, "at": float(lag)})
    return rows


def _sums(subject: Subject, axis: int, control: str, lags: list[int]) -> NDArray[np.float64]:
    """(lags, groups, 4) as ``temporal.repeat_sums``: over all blocks, or, of a control, over a sample."""
    sums = np.zeros((len(lags), subject.groups.count, 4))
    common: dict[str, Any] = {
        "num_experts": subject.run.layers[axis].num_experts,
        "lags": lags,
        "num_groups": subject.groups.count,
    }
    if control != "observed":
        sample = subject.sample(CONTROL_TOKENS)
        ids = sample.ids(axis, control=control)
        return temporal.repeat_sums(ids=ids, offsets=sample.block.offsets, group=sample.group, **common)
    for block in subject.blocks:
        group = subject.groups.of_block(subject.blocks, block.number)
        sums += temporal.repeat_sums(ids=subject.ids(axis, block), offsets=block.offsets, group=group, **common)
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
