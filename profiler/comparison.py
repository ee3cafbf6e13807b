"""How the routing of two runs differs on the sequences that they share, block by block.

:mod:`profiler.alignment` finds these sequences; the arithmetic is in :mod:`profiler.metrics.comparison`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

import store
from profiler.alignment import Alignment, token_ids
from profiler.expert_pairs import LayerPair, renamed
from profiler.headline.subject import Groups
from profiler.metrics import comparison

MAX_GROUPS = 128
"""Sequences beyond so many are drawn anew in random groups; sums by group and expert are held for all layers."""

MAX_FLIPS = 200
"""Single tokens that are kept as those that flip most."""


@dataclass
class LayerComparison:
    """Sums over the tokens of one layer; what :mod:`profiler.metrics.comparison` makes figures of.

    pair: the layer in both runs; experts are numbered as it says. sums (groups, 5): ``agreement_sums``. loads: (groups,
    experts) selections in each run. firsts: (experts,) first choices in each run. margins: by name of ``MARGINS``,
    (2, bins) histograms over tokens that flip, and that do not (of the boundary margin alone: the others are 0 there).
    """

    pair: LayerPair
    top_k: tuple[int, int]
    sums: NDArray[np.float64]
    loads: tuple[NDArray[np.int64], NDArray[np.int64]]
    firsts: tuple[NDArray[np.int64], NDArray[np.int64]]
    margins: dict[str, NDArray[np.int64]]

    @classmethod
    def empty(cls, pair: LayerPair, groups: int) -> LayerComparison:
        """Nothing counted yet."""
        load, firsts = np.zeros((groups, pair.num_experts), np.int64), np.zeros(pair.num_experts, np.int64)
        return cls(
            pair,
            (pair.first.top_k, pair.second.top_k),
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
class TokenFlips:
    """The single tokens that flip in most layers, those first; all (tokens,).

    pair: row of the alignment's pairs. position: in the sequence. counted, flipped: layers; overlap: mean over the
    layers counted.
    """

    pair: NDArray[np.int64]
    position: NDArray[np.int64]
    counted: NDArray[np.int64]
    flipped: NDArray[np.int64]
    overlap: NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """How the routing of two runs differs.

    groups: of the paired sequences. changes: None without token ids. sequences (pairs, 3): sums over tokens and layers
    of counted, ``overlap`` and ``exact``. flips: the tokens that flip most.
    """

    alignment: Alignment
    groups: Groups
    layers: list[LayerComparison]
    changes: TokenChanges | None
    sequences: NDArray[np.float64]
    flips: TokenFlips

    @property
    def by_layer(self) -> dict[tuple[int, int], LayerComparison]:
        """The layers by (layer, step) of the first run."""
        return {(one.pair.first.layer, one.pair.first.step): one for one in self.layers}


@dataclass(frozen=True)
class _Held:
    """What the runs hold to tell how close a flip was: gate weights of both, logits of the first."""

    first_weights: bool = False
    second_weights: bool = False
    logits: bool = False

    @classmethod
    def of(cls, alignment: Alignment) -> _Held:
        first, second = ("weights" not in run.omissions for run in (alignment.first, alignment.second))
        return cls(first, second, alignment.first.has_scores)


def compare(alignment: Alignment, *, margins: bool = True) -> Comparison:
    """Compare every layer on the paired sequences. Memory does not grow with their number.

    margins: read gate weights and router scores too, where the runs hold them, and count how close flips were.
    """
    first = alignment.first
    groups = Groups.of(alignment.domains, MAX_GROUPS)
    layers = [LayerComparison.empty(pair, groups.count) for pair in alignment.layers]
    held = _Held.of(alignment) if margins else _Held()
    known = alignment.by == "token ids"
    vocabulary = int(first.table("vocabulary")["token_id"].max() or 0) + 1 if known else 0  # type: ignore[arg-type]
    changes, per_sequence, most = np.zeros((4, vocabulary)), np.zeros((len(alignment.pairs), 3)), []
    for block in alignment.blocks:
        lengths = alignment.lengths[block]
        tokens = np.repeat(groups.group[block], lengths)
        summed = np.zeros((3, len(tokens)))
        for found in layers:
            summed += _add(found, alignment, block, tokens, held)
        if known:
            changes += _by_token_id(first, alignment.pairs[block, 0], summed, vocabulary)
        per_sequence[block] = np.add.reduceat(summed, np.cumsum(lengths) - lengths, axis=1).T
        most.append(_most_flipped(summed, block.start, lengths))
    seen = np.flatnonzero(changes[0])
    per_id = TokenChanges(seen, changes[0, seen].astype(np.int64), *changes[1:, seen]) if known else None
    return Comparison(alignment, groups, layers, per_id, per_sequence, _flips(np.concatenate(most)))


def _add(
    found: LayerComparison,
    alignment: Alignment,
    block: slice,
    group: NDArray[np.int64],
    held: _Held,
) -> NDArray[np.float64]:
    """Add one layer's tokens of one block; (3, tokens): counted, overlap, exact of each."""
    here, there = alignment.pairs[block].T
    pair = found.pair
    own, own_weights = _read(alignment.first, pair.first, here, weights=held.first_weights)
    ids, weights = renamed(own, own_weights, pair.names[0])
    ids_there, weights_there = renamed(
        *_read(alignment.second, pair.second, there, weights=held.second_weights), pair.names[1]
    )
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
        margin = _boundary_margin(alignment.first, pair.first, here, alignment.lengths[block], own)
        values["boundary_margin"] = margin[flips]
        found.margins["boundary_margin"][1] += comparison.histogram(
            values=margin[tokens.exact], edges=comparison.LOGITS
        )
    for name, value in values.items():
        found.margins[name][0] += comparison.histogram(values=value, edges=comparison.MARGINS[name])
    return np.stack([tokens.counted, tokens.overlap, tokens.exact])


def _most_flipped(summed: NDArray[np.float64], start: int, lengths: NDArray[np.int64]) -> NDArray[np.float64]:
    """(tokens, 5) of the tokens of one block that flip in most layers: flipped, counted, overlap, pair, position.

    summed (3, tokens): counted, overlap and exact, summed over the layers; start: pair that the block begins with.
    """
    counted, overlap, exact = summed
    row = np.repeat(np.arange(len(lengths)), lengths)
    position = np.arange(len(row)) - (np.cumsum(lengths) - lengths)[row]
    rows = np.stack([counted - exact, counted, overlap, start + row, position], axis=1)
    return _first_rows(rows[counted > exact])


def _first_rows(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """The first ``MAX_FLIPS`` rows: most layers flipped, then least overlap, then in the order of the text."""
    return rows[np.lexsort((rows[:, 4], rows[:, 3], rows[:, 2], -rows[:, 0]))[:MAX_FLIPS]]


def _flips(rows: NDArray[np.float64]) -> TokenFlips:
    flipped, counted, overlap, pair, position = _first_rows(rows).T
    whole = [one.astype(np.int64) for one in (pair, position, counted, flipped)]
    return TokenFlips(whole[0], whole[1], whole[2], whole[3], overlap / np.maximum(counted, 1))


def _boundary_margin(
    run: store.Run,
    layer: store.LayerInfo,
    numbers: NDArray[np.int64],
    lengths: NDArray[np.int64],
    ids: NDArray[np.int16],
) -> NDArray[np.float64]:
    """(tokens,) margin between logits of the sequences ``numbers``, which select ``ids``; NaN without scores."""
    scores = run.layer_scores(layer=layer.layer, step=layer.step, sequences=numbers.tolist())
    margins, begin = np.full(len(ids), np.nan), 0
    places = {int(number): place for place, number in enumerate(scores.sequences)}
    for number, length in zip(numbers.tolist(), lengths.tolist(), strict=True):
        tokens, begin = slice(begin, begin + length), begin + length
        if number in places:
            logits = scores.logits[scores.offsets[places[number]] :][:length]
            margins[tokens] = comparison.boundary_margin(ids=ids[tokens], logits=logits)
    return margins


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
