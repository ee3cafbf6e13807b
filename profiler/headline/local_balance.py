"""How even single sequences are: texts that use few experts each can hide behind an even load over all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from profiler.headline.layerwise import LayerPart, joined
from profiler.headline.load import CONFIDENCE, NUM_RESAMPLES
from profiler.headline.subject import SEED, Rows, Sample, Subject, as_text
from profiler.metrics import load
from profiler.metrics._intervals import Resamples, interval
from profiler.metrics.controls import uniform_tokens

LOCAL_FIELDS = ("normalised_entropy", "effective_experts", "cv")
"""Measures of evenness inside single sequences."""

CONTROL_TOKENS = 1 << 17
"""Tokens of whole sequences, drawn at random, on which the controls rest."""

SEQUENCES_AT_ONCE = 4096


def local_balance_layer(subject: Subject, axis: int) -> Rows:
    """Evenness inside single sequences, averaged; beside sequences of shuffled tokens and of uniformly random experts.

    The controls rest on a sample of sequences (``CONTROL_TOKENS``), as large as the rows say.
    """
    layer = subject.run.layers[axis]
    measured = [_local(subject.ids(axis, block), block.offsets, layer.num_experts) for block in subject.blocks]
    values = np.concatenate(measured)
    place = {"metric": "local_balance", "layer": layer.layer, "step": layer.step}
    rows = _local_rows(values, subject.once(_resamples), place)
    sample = subject.sample(CONTROL_TOKENS)
    for control, ids in _controls(sample, axis, layer.num_experts):
        values = _local(ids, sample.block.offsets, layer.num_experts)
        rows += _local_rows(values, None, {**place, "control": control, "tokens": sample.block.tokens})
    return rows


LOCAL_BALANCE = LayerPart("local balance", local_balance_layer, joined)
"""Evenness inside single sequences, layer by layer."""


def _resamples(subject: Subject) -> Resamples:
    return Resamples.of(len(subject.lengths), num_resamples=NUM_RESAMPLES, seed=SEED)


def _controls(sample: Sample, axis: int, num_experts: int) -> Iterator[tuple[str, NDArray[np.int16]]]:
    """A sample's selections in one layer with its tokens shuffled over all sequences, and with random experts."""
    ids = sample.ids(axis)
    yield "shuffled", ids[np.random.default_rng(SEED).permutation(len(ids))]
    yield "uniform", uniform_tokens(ids, num_experts, seed=(SEED, axis))


def _local(ids: NDArray[Any], offsets: NDArray[np.int64], num_experts: int) -> NDArray[np.float64]:
    """(sequences, measures) evenness of each sequence; NaN for one without selections."""
    from profiler.metrics._counts import counts_of

    parts = []
    for start in range(0, len(offsets) - 1, SEQUENCES_AT_ONCE):
        edges = offsets[start : start + SEQUENCES_AT_ONCE + 1]
        even = load.balance(load=counts_of(ids, edges, num_experts))
        parts.append(np.stack([getattr(even, name) for name in LOCAL_FIELDS], axis=1))
    return np.concatenate(parts)


def _local_rows(values: NDArray[np.float64], resamples: Resamples | None, place: dict[str, Any]) -> Rows:
    """One row per measure: its mean over sequences; values (sequences, measures)."""
    from profiler.metrics._counts import summed_by

    known = ~np.isnan(values)
    sums = np.stack([np.where(known, values, 0.0), known.astype(np.float64)])
    rows: Rows = []
    mean = _mean(sums.sum(1))
    ends: list[NDArray[np.float64]] = []
    if resamples is not None and len(values) > 1:
        grouped = summed_by(np.moveaxis(sums, 0, 1), resamples.group, resamples.groups)
        drawn = resamples.sums(grouped)
        ends = list(
            interval(estimate=mean, resampled=_mean(np.moveaxis(drawn, 1, 0)), confidence=CONFIDENCE, rule="basic")
        )
    for index, name in enumerate(LOCAL_FIELDS):
        row = {**place, "parameters": as_text({"measure": name}), "value": float(mean[index]), "sequences": len(values)}
        if ends:
            row |= {"low": float(ends[0][index]), "high": float(ends[1][index])}
        rows.append(row)
    return rows


def _mean(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """sums[0] / sums[1]; NaN where there is nothing."""
    return np.divide(sums[0], sums[1], out=np.full_like(sums[0], np.nan), where=sums[1] > 0)
