"""How the routing of two runs differs on the sequences that they share, block by block.

:mod:`profiler.alignment` finds these sequences; the arithmetic is in :mod:`profiler.metrics.comparison`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

import store
from moescope.errors import StoreError
from profiler.alignment import Alignment, token_ids
from profiler.headline.subject import Groups
from profiler.metrics import comparison

MAX_GROUPS = 128
"""Sequences beyond so many are drawn anew in random groups; sums by group and expert are held for all layers."""


@dataclass
class LayerComparison:
    """Sums over the tokens of one layer; what :mod:`profiler.metrics.comparison` makes figures of.

    sums (groups, 5): ``agreement_sums``. loads: (groups, experts) selections in each run. firsts: (experts,) first
    choices in each run. margins: by name of ``MARGINS``, (2, bins) histograms over tokens that flip, and that do
    not (of the boundary margin alone: the others are 0 there).
    """

    layer: store.LayerInfo
    top_k: tuple[int, int]
    sums: NDArray[np.float64]
    loads: tuple[NDArray[np.int64], NDArray[np.int64]]
    firsts: tuple[NDArray[np.int64], NDArray[np.int64]]
    margins: dict[str, NDArray[np.int64]]

    @classmethod
    def empty(cls, layer: store.LayerInfo, other: store.LayerInfo, groups: int) -> LayerComparison:
        """Nothing counted yet."""
        load, firsts = np.zeros((groups, layer.num_experts), np.int64), np.zeros(layer.num_experts, np.int64)
        return cls(
            layer,
            (layer.top_k, other.top_k),
            np.zeros((groups, len(comparison.AGREEMENTS) + 1)),
            (load, load.copy()),
            (firsts, firsts.copy()),
            {name: np.zeros((2, len(edges) - 1), np.int64) for name, edges in comparison.MARGINS.items()},
        )


@dataclass(frozen=True)
class TokenChanges:
    """Agreement by token id over all layers, each (ids,): occurrences, and sums over layers of ``overlap`` and
    ``exact`` over ``counted`` token-layers."""

    token_ids: NDArray[np.int64]
    occurrences: NDArray[np.int64]
    counted: NDArray[np.float64]
    overlap: NDArray[np.float64]
    exact: NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """How the routing of two runs differs. groups: of the paired sequences; changes: None without token ids."""

    alignment: Alignment
    groups: Groups
    layers: list[LayerComparison]
    changes: TokenChanges | None


@dataclass(frozen=True)
class _Held:
    """What the runs hold to tell how close a flip was: gate weights of both, logits of the first."""

    first_weights: bool = False
    second_weights: bool = False
    logits: bool = False

    @classmethod
    def of(cls, alignment: Alignment) -> _Held:
        first, second = ("weights" not in run.omissions for run in (alignment.first, alignment.second))
        try:
            alignment.first.router_scores(sequences=[int(alignment.pairs[0, 0])])
        except StoreError:
            return cls(first, second, False)
        return cls(first, second, True)


def compare(alignment: Alignment, *, margins: bool = True) -> Comparison:
    """Compare every layer on the paired sequences. Memory does not grow with their number.

    margins: read gate weights and router scores too, where the runs hold them, and count how close flips were.
    """
    first, second = alignment.first, alignment.second
    groups = Groups.of(alignment.domains, MAX_GROUPS)
    layers = [
        LayerComparison.empty(layer, other, groups.count)
        for layer, other in zip(first.layers, second.layers, strict=True)
    ]
    held = _Held.of(alignment) if margins else _Held()
    known = alignment.by == "token ids"
    vocabulary = int(first.table("vocabulary")["token_id"].max() or 0) + 1 if known else 0  # type: ignore[arg-type]
    changes = np.zeros((4, vocabulary))
    for block in alignment.blocks:
        tokens = np.repeat(groups.group[block], alignment.lengths[block])
        summed = np.zeros((3, len(tokens)))
        for found, other in zip(layers, second.layers, strict=True):
            summed += _add(found, other, alignment, block, tokens, held)
        if known:
            changes += _by_token_id(first, alignment.pairs[block, 0], summed, vocabulary)
    seen = np.flatnonzero(changes[0])
    per_id = TokenChanges(seen, changes[0, seen].astype(np.int64), *changes[1:, seen]) if known else None
    return Comparison(alignment, groups, layers, per_id)


def _add(
    found: LayerComparison,
    other: store.LayerInfo,
    alignment: Alignment,
    block: slice,
    group: NDArray[np.int64],
    held: _Held,
) -> NDArray[np.float64]:
    """Add one layer's tokens of one block; (3, tokens): counted, overlap, exact of each."""
    here, there = alignment.pairs[block].T
    ids, weights = _read(alignment.first, found.layer, here, weights=held.first_weights)
    ids_there, weights_there = _read(alignment.second, other, there, weights=held.second_weights)
    tokens = comparison.token_agreement(first=ids, second=ids_there)
    found.sums += comparison.agreement_sums(tokens=tokens, group=group, num_groups=len(found.sums))
    for one, load, firsts in zip((ids, ids_there), found.loads, found.firsts, strict=True):
        mine, experts = one[tokens.counted], load.shape[1]
        load += comparison.load_sums(ids=mine, group=group[tokens.counted], num_groups=len(load), num_experts=experts)
        firsts += np.bincount(mine[:, 0][mine[:, 0] >= 0], minlength=experts)
    flips, values = tokens.flipped, {}
    if weights is not None:
        mine, mine_weights = ids[flips], weights[flips]
        values["left_weight"] = comparison.left_weight(ids=mine, weights=mine_weights, kept=tokens.kept[flips])
        if weights_there is not None:
            values["weight_gap"] = comparison.weight_gap(
                first=mine, first_weights=mine_weights, second=ids_there[flips], second_weights=weights_there[flips]
            )
    if held.logits:
        margin = _boundary_margin(alignment.first, found.layer, here, ids)
        values["boundary_margin"] = margin[flips]
        found.margins["boundary_margin"][1] += comparison.histogram(
            values=margin[tokens.exact], edges=comparison.LOGITS
        )
    for name, value in values.items():
        found.margins[name][0] += comparison.histogram(values=value, edges=comparison.MARGINS[name])
    return np.stack([tokens.counted, tokens.overlap, tokens.exact])


def _boundary_margin(
    run: store.Run, layer: store.LayerInfo, numbers: NDArray[np.int64], ids: NDArray[np.int16]
) -> NDArray[np.float64]:
    """(tokens,) margin between logits of the sequences ``numbers``, whose selections are ``ids``."""
    scores = run.router_scores(layers=[layer.layer], sequences=numbers.tolist())
    axis, place = scores.layers.index((layer.layer, layer.step)), np.searchsorted(scores.sequences, numbers)
    real = np.arange(scores.logits.shape[2]) < scores.lengths[place, None]
    return comparison.boundary_margin(ids=ids, logits=scores.logits[axis][place][real])


def _by_token_id(
    run: store.Run, numbers: NDArray[np.int64], summed: NDArray[np.float64], vocabulary: int
) -> NDArray[np.float64]:
    """(4, ids) occurrences and the sums of tokens by their id."""
    ids = np.concatenate([one for _, one in token_ids(run, numbers)])
    parts = [np.bincount(ids, weights=values, minlength=vocabulary) for values in (np.ones(len(ids)), *summed)]
    return np.stack(parts)


def _read(
    run: store.Run, layer: store.LayerInfo, numbers: NDArray[np.int64], *, weights: bool
) -> tuple[NDArray[np.int16], NDArray[np.float32] | None]:
    """Selections of some sequences, one after the other in the order of ``numbers``: (tokens, k)."""
    low, high = int(numbers.min()), int(numbers.max())
    if high - low < 2 * len(numbers):
        read = run.layer_selections(layer=layer.layer, step=layer.step, first=low, last=high, weights=weights)
        if np.array_equal(read.sequences, numbers):
            return read.ids, read.weights
        place = np.searchsorted(read.sequences, numbers)
        starts, lengths = read.offsets[place], np.diff(read.offsets)[place]
        rows = np.repeat(starts - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())
        return read.ids[rows], None if read.weights is None else read.weights[rows]
    trace = run.selections(layers=[layer.layer], sequences=numbers.tolist())
    axis, place = trace.layers.index((layer.layer, layer.step)), np.searchsorted(trace.sequences, numbers)
    real = np.arange(trace.ids.shape[2]) < trace.lengths[place, None]
    return trace.ids[axis][place][real], trace.weights[axis][place][real] if weights else None
