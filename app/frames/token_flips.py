"""Tokens whose experts differ in another run of the same text: which sequences have them, and where."""

from __future__ import annotations

import numpy as np
import polars as pl
from numpy.typing import NDArray

import store
from app.frames import comparison_made
from app.frames.axes import layer_label
from app.frames.token_measure import Measure
from app.frames.token_routes import Routes
from moescope.errors import InputError
from profiler.alignment import align
from profiler.expert_pairs import Made, pair_layers, renamed
from profiler.metrics.comparison import token_agreement

_SEQUENCES = {
    "sequence": pl.Int64, "other_sequence": pl.Int64, "domain": pl.String, "tokens": pl.Int64, "hits": pl.Int64,
    "share": pl.Float64, "position": pl.Int64,
}  # fmt: skip


def sequences(run: store.Run, other: store.Run, *, label: str) -> dict[str, pl.DataFrame]:
    """Under "sequences", one row per sequence that both runs have, the most changed first: sequence, other_sequence,
    domain, tokens, hits = tokens whose set of experts differs in the layer, share of its tokens, position of the first
    one (null = none). Under "about", one row: by ("token ids" or "position"), left_out.

    Sequences are paired by their tokens, or by number and length where a run keeps none.

    Raises:
        InputError: the runs cannot be compared.
    """
    found = align(run, other, by_position=not (run.has_tokens and other.has_tokens), made=_made(run, other))
    pair = next((one for one in found.layers if layer_label(one.first.layer, one.first.step) == label), None)
    if pair is None:
        raise InputError(f"run {other.name!r} has no layer that stands for layer {label}")
    rows = []
    for block in found.blocks:
        here, there = found.pairs[block].T
        mine, theirs = _read(run, pair.first, here), _read(other, pair.second, there)
        for index, (one, its) in enumerate(zip(here.tolist(), there.tolist(), strict=True)):
            flipped = _flipped(mine[one], theirs[its], pair.names)
            at = np.flatnonzero(flipped)
            first = int(at[0]) if len(at) else None
            row = block.start + index
            share = len(at) / max(len(flipped), 1)
            rows.append((one, its, str(found.domains[row]), len(flipped), len(at), share, first))
    frame = pl.DataFrame(rows, schema=_SEQUENCES, orient="row").sort(["hits", "sequence"], descending=[True, False])
    about = pl.DataFrame({"by": [found.by], "left_out": [found.left_out[0]]})
    return {"sequences": frame, "about": about}


def flips(run: store.Run, other: store.Run, routes: Routes, there: Routes, *, labels: list[str]) -> NDArray[np.float64]:
    """(tokens,) share of a token's experts that the other run does not use, mean over layers: 0 = the same set. NaN
    where either run has no selection.

    Args:
        routes: tokens of the first run.
        there: the same tokens of the other.
    """
    pairs = pair_layers(run, other, _made(run, other))
    places = {layer_label(one.first.layer, one.first.step): one for one in pairs}
    summed, counted = np.zeros(routes.count), np.zeros(routes.count)
    for label in labels:
        pair = places.get(label)
        if pair is None:  # a plan took the layer away
            continue
        mine, _ = routes.of(label)
        theirs, _ = there.of(layer_label(pair.second.layer, pair.second.step))
        found = token_agreement(
            first=renamed(mine, None, pair.names[0])[0], second=renamed(theirs, None, pair.names[1])[0]
        )
        summed += np.where(found.counted, 1.0 - found.overlap, 0.0)
        counted += found.counted
    return np.where(counted > 0, summed / np.maximum(counted, 1), np.nan)


def _made(run: store.Run, other: store.Run) -> Made | None:
    """Which experts and layers are left where one model was made of the other by a plan."""
    return comparison_made.made_by(comparison_made.link(run, other))


def measure(labels: list[str], other: str) -> Measure:
    """The words of :func:`flips`."""
    where = f", mean of {len(labels)} layers" if len(labels) > 1 else f", layer {labels[0]}"
    return Measure(
        "flip", f"experts changed{where}", "%", 0.0, 1.0,
        note=f"Part of the token's experts that run {other} does not use for it: 0 = the same set.",
    )  # fmt: skip


def _read(run: store.Run, layer: store.LayerInfo, numbers: NDArray[np.int64]) -> dict[int, NDArray[np.int16]]:
    """Selections of some sequences by number, (tokens, k) each."""
    found = {}
    ordered = np.sort(numbers)
    for part in np.split(ordered, np.flatnonzero(np.diff(ordered) > _GAP) + 1):
        read = run.layer_selections(layer=layer.layer, step=layer.step, first=int(part[0]), last=int(part[-1]))
        for number, place in zip(part.tolist(), np.searchsorted(read.sequences, part).tolist(), strict=True):
            found[number] = read.ids[read.offsets[place] : read.offsets[place + 1]]
    return found


def _flipped(
    mine: NDArray[np.int16], theirs: NDArray[np.int16], names: tuple[NDArray[np.int16] | None, NDArray[np.int16] | None]
) -> NDArray[np.bool_]:
    first, second = renamed(mine, None, names[0])[0], renamed(theirs, None, names[1])[0]
    return token_agreement(first=first, second=second).flipped


_GAP = 16  # sequences that are read along rather than asked for apart
