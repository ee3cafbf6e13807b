"""Super experts: the few experts whose down_proj output outliers make the model's massive activations.

Source: "Unveiling super experts in mixture-of-experts large language models" (arXiv 2507.23279), section 3, and its
published code, which follow different rules; both are here.

The values are a[l, e] = max over tokens and channels of |output of expert e's down_proj|, before the gate weight. Which
tokens is the caller's choice of input: all routed tokens (the paper), or the first routed token of each sequence (what
the published code sees for routed experts, because its hook reads row 0 of each batch).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moescope.errors import MetricError

from ._arrays import BoolArray, FloatArray

Kind = Literal["routed", "shared"]
_ENOUGH = 202  # with fewer experts the 99.5th percentile lies above the second largest value by construction


@dataclass(frozen=True)
class SuperExpert:
    """One super expert; ``expert`` counts within its kind, ``layer`` is the decoder layer."""

    layer: int
    kind: Kind
    expert: int
    value: float


@dataclass(frozen=True)
class SuperExperts:
    """The super experts, largest value first, and what they were judged by.

    percentile_threshold, max_threshold: the value must exceed both. considered: (layers, experts + shared) which values
    the thresholds were taken over. candidates: experts above both thresholds in layers that the rule leaves out (paper
    rule), largest first. notes: what weakens the verdict, in sentences; empty when nothing does.
    layer_kurtosis (layers,), expert_kurtosis (experts + shared,): excess kurtosis of the considered values over the
    experts of a layer, and over the layers of an expert; large = one stands out; NaN below 2 different values.
    """

    rule: Literal["paper", "code"]
    experts: list[SuperExpert]
    candidates: list[SuperExpert]
    percentile_threshold: float
    max_threshold: float
    considered: BoolArray
    layer_kurtosis: FloatArray
    expert_kurtosis: FloatArray
    notes: list[str]


def super_experts(
    *,
    output_max: NDArray[Any],
    layers: Sequence[int],
    shared_output_max: NDArray[Any] | None = None,
    massive_layers: Collection[int] | None = None,
    percentile: float = 99.5,
    fraction: float = 0.1,
) -> SuperExperts:
    """The paper's rule: a > P99.5(A), a > max(A) / 10, and massive activations form in the layer.

    Args:
        output_max: (layers, experts), NaN = the expert was never used. NaN is not a 0: it is left out of A, as where
            the published code does not call an expert without tokens; ``fill_never_used`` gives the other reading.
        layers: decoder layer of each row.
        shared_output_max: (layers, shared experts), NaN = the layer has none; they are members of A as well.
        massive_layers: decoder layers from ``forming_layers`` (or ``massive_activation_layers``, a wider reading of
            the paper). Empty: nothing is found. None: the third condition is not applied, and a note says so.
        percentile, fraction: of A and of its maximum.

    Raises:
        MetricError: shapes that do not fit, no finite value, negative or infinite values.
    """
    values = _joined(output_max, shared_output_max, layers)
    considered = np.isfinite(values)
    notes = _sample_notes(considered)
    population = values[considered]
    thresholds = float(np.percentile(population, percentile)), float(population.max()) * fraction
    above = considered & (values > thresholds[0]) & (values > thresholds[1])
    allowed = np.ones(len(values), dtype=bool)
    if massive_layers is None:
        notes.append("The layers with massive activations are not known, so experts of all layers were admitted.")
    else:
        allowed = np.isin(np.asarray(layers), list(massive_layers))
        if not allowed.any():
            notes.append("In no MoE layer do massive activations form, so no expert can be a super expert.")
    named = _Naming(values, list(layers), output_max.shape[1])
    found, others = named.experts(above & allowed[:, None]), named.experts(above & ~allowed[:, None])
    return SuperExperts("paper", found, others, *thresholds, considered, *_kurtoses(values, considered), notes)


def super_experts_code(
    *,
    output_max: NDArray[Any],
    layers: Sequence[int],
    num_hidden_layers: int,
    shared_output_max: NDArray[Any] | None = None,
    include_layers: float = 0.75,
    percentile: float = 99.5,
) -> SuperExperts:
    """The published code's rule: everything happens inside the first 75 % of the decoder layers.

    Kept as it is: the number of layers is round(include_layers * num_hidden_layers) with Python's rounding of halves to
    even, dense layers counted; A, percentile (linear interpolation) and maximum are taken inside; the second threshold
    is max // 10, floored to a whole number; both comparisons are strict. Args as ``super_experts``.

    Without a MoE layer inside, nothing is found, and a note says so.

    Raises:
        MetricError: as ``super_experts``.
    """
    values = _joined(output_max, shared_output_max, layers)
    included = round(include_layers * num_hidden_layers)
    inside = np.asarray(layers) < included
    considered = np.isfinite(values) & inside[:, None]
    notes = _sample_notes(considered)
    thresholds = np.nan, np.nan
    if considered.any():
        population = values[considered]
        thresholds = float(np.percentile(population, percentile)), float(population.max() // 10)
    else:
        notes = [f"No MoE layer with values lies in the first {included} of {num_hidden_layers} decoder layers."]
    above = considered & (values > thresholds[0]) & (values > thresholds[1])
    named = _Naming(values, list(layers), output_max.shape[1])
    kurtoses = _kurtoses(values, considered)
    return SuperExperts("code", named.experts(above), [], *thresholds, considered, *kurtoses, notes)


def massive_activation_layers(
    *,
    residual_max: ArrayLike,
    residual_median: ArrayLike,
    layers: Sequence[int],
    absolute: float = 100.0,
    ratio: float = 1000.0,
) -> list[int]:
    """Decoder layers after which the residual stream is massive: |h| > ``absolute`` and |h| >= ``ratio`` x median.

    residual_max (layers,): largest |hidden state| after each layer; residual_median (layers,): median |hidden state| of
    the token it stands in; layers: their decoder layer. Neither paper nor code of super experts defines the criterion;
    this is the one of Sun et al. (arXiv 2402.17762), quoted from memory and not checked again.
    """
    largest, median = np.asarray(residual_max, dtype=np.float64), np.asarray(residual_median, dtype=np.float64)
    if not largest.shape == median.shape == (len(layers),):
        raise MetricError(f"residual_max {largest.shape}, residual_median {median.shape} take one value per layer")
    massive = (largest > absolute) & (largest >= ratio * median)
    return [layer for layer, is_massive in zip(layers, massive, strict=True) if is_massive]


def forming_layers(
    *,
    residual_max: ArrayLike,
    residual_median: ArrayLike,
    layers: Sequence[int],
    absolute: float = 100.0,
    ratio: float = 1000.0,
    growth: float = 0.01,
) -> list[int]:
    """Decoder layers in which massive activations form: massive after the layer, and grown in it.

    Once there, massive activations stay in the residual stream to the last layers; the paper's set of layers is where
    they form, without saying how that is told. Here: the largest |hidden state| grew in the layer by at least
    ``growth`` times the largest of all layers. The first massive layer always counts.

    Args:
        residual_max, residual_median, layers, absolute, ratio: as in :func:`massive_activation_layers`; all decoder
            layers in ascending order.
        growth: 0 counts every layer that adds anything.
    """
    common: dict[str, Any] = {"residual_max": residual_max, "residual_median": residual_median, "layers": layers}
    massive = massive_activation_layers(**common, absolute=absolute, ratio=ratio)
    largest = np.nan_to_num(np.asarray(residual_max, dtype=np.float64), nan=0.0)
    grown = np.diff(largest, prepend=0.0) >= growth * largest.max(initial=0.0)
    forming = {layer for layer, has_grown in zip(layers, grown, strict=True) if has_grown} | set(massive[:1])
    return [layer for layer in massive if layer in forming]


def residual_peaks(*, layer: ArrayLike, absolute_max: ArrayLike, median_there: ArrayLike) -> dict[str, Any]:
    """The largest |hidden state| after each layer and the median beside it: the arguments of ``forming_layers``.

    Args:
        layer, absolute_max, median_there: (rows,) each, a row per domain and phase.
    """
    rows, largest = np.asarray(layer, dtype=np.int64), np.asarray(absolute_max, dtype=np.float64)
    order = np.lexsort((largest, rows))
    last = order[np.append(np.diff(rows[order]) > 0, True)] if len(order) else order
    median = np.asarray(median_there, dtype=np.float64)
    return {"residual_max": largest[last], "residual_median": median[last], "layers": rows[last].tolist()}


def maxima_by_layer(*, layer: ArrayLike, expert: ArrayLike, value: ArrayLike, layers: Sequence[int]) -> FloatArray:
    """(layers, experts) largest value of each expert, as the rules take it; NaN where an expert was never used.

    Args:
        layer, expert, value: (rows,) each, a row per domain and phase; NaN = no token there.
        layers: decoder layers in ascending order, one row of the result each.
    """
    numbers, values = np.asarray(expert, dtype=np.int64), np.asarray(value, dtype=np.float64)
    maxima = np.full((len(layers), int(numbers.max(initial=-1)) + 1), np.nan)
    rows = np.searchsorted(np.asarray(layers), np.asarray(layer, dtype=np.int64))
    np.fmax.at(maxima, (rows, numbers), values)
    return maxima


def fill_never_used(*, output_max: NDArray[Any]) -> FloatArray:
    """``output_max`` with 0 for experts that were never used: what the published code sees where all are called."""
    return np.nan_to_num(np.asarray(output_max, dtype=np.float64), nan=0.0)


@dataclass(frozen=True)
class _Naming:
    """Turns a mask over the joined array into named experts."""

    values: FloatArray
    layers: list[int]
    num_routed: int

    def experts(self, mask: BoolArray) -> list[SuperExpert]:
        found = [self._expert(int(row), int(column)) for row, column in np.argwhere(mask)]
        return sorted(found, key=lambda one: (-one.value, one.layer, one.kind, one.expert))

    def _expert(self, row: int, column: int) -> SuperExpert:
        value = float(self.values[row, column])
        if column < self.num_routed:
            return SuperExpert(self.layers[row], "routed", column, value)
        return SuperExpert(self.layers[row], "shared", column - self.num_routed, value)


def _joined(output_max: NDArray[Any], shared: NDArray[Any] | None, layers: Sequence[int]) -> FloatArray:
    """Routed and shared values side by side, (layers, experts + shared), checked."""
    parts = [np.asarray(output_max, dtype=np.float64)]
    if shared is not None:
        parts.append(np.asarray(shared, dtype=np.float64))
    for part in parts:
        if part.ndim != 2 or len(part) != len(layers):
            raise MetricError(
                f"output_max has shape {part.shape}; it takes (layers, experts) with {len(layers)} layers"
            )
    values = np.concatenate(parts, axis=1)
    if not np.isfinite(values).any():
        raise MetricError("output_max holds no value; record the expert outputs first (level activations)")
    wrong = np.argwhere(np.isinf(values) | (values < 0))
    if len(wrong):
        row, column = wrong[0]
        value = values[row, column]
        raise MetricError(
            f"output_max of layer {layers[row]}, column {column} is {value}; magnitudes are finite, from 0"
        )
    return values


def _sample_notes(considered: BoolArray) -> list[str]:
    """What the number of experts alone says about the verdict."""
    seen = int(considered.sum())
    if seen >= _ENOUGH:
        return []
    return [f"Only {seen} experts: the percentile lies between the two largest values, so at most one can exceed it."]


def _kurtoses(values: FloatArray, considered: BoolArray) -> tuple[FloatArray, FloatArray]:
    """Excess kurtosis per row and per column of the considered values."""
    kept = np.where(considered, values, np.nan)
    return np.array([_kurtosis(row) for row in kept]), np.array([_kurtosis(column) for column in kept.T])


def _kurtosis(values: FloatArray) -> float:
    """Excess kurtosis, biased: fourth central moment over squared variance, minus 3; NaN where the variance is 0."""
    seen = values[np.isfinite(values)]
    if len(np.unique(seen)) < 2:
        return float("nan")
    centred = seen - seen.mean()
    return float((centred**4).mean() / (centred**2).mean() ** 2 - 3.0)
