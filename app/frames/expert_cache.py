"""One expert in a cache: SRP, how soon it is used again, and how often an LRU cache of its layer holds it."""

from __future__ import annotations

import numpy as np
import polars as pl
from numpy.typing import NDArray

import store
from app.frames.expert_trace import expert_blocks, layer_info

GAPS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Tokens within which an expert may be used again."""

LEAST_USES = 10
"""Uses that a share needs."""

_REUSE = {"tokens": pl.Int64, "share": pl.Float64, "in_sequence": pl.Float64, "shuffled": pl.Float64, "uses": pl.Int64}
_BURSTS = {"bursts": pl.Int64, "mean": pl.Float64, "longest": pl.Int64, "shuffled": pl.Float64, "uses": pl.Int64}
_DEPTHS = {"expert": pl.Int64, "depth": pl.Int64, "requests": pl.Int64}
_HITS = {"slots": pl.Int64, "value": pl.Float64, "layer": pl.Float64, "uses": pl.Int64}


def consistency(frame: pl.DataFrame, *, label: str, expert: int) -> pl.DataFrame:
    """SRP of one expert, one row per segment length: segment_length, value, layer = mean of the layer's experts,
    lower_bound = what always keeping it would give, frequency = part of the tokens that use it.

    frame: ``app.frames.consistency.srp_experts``.
    """
    return (
        frame.filter(pl.col("label") == label)
        .with_columns(pl.col("value").mean().over("segment_length").alias("mean"))
        .filter(pl.col("expert") == expert)
        .select("segment_length", "value", pl.col("mean").alias("layer"), "lower_bound", "frequency")
        .sort("segment_length")
    )


def reuse(run: store.Run, *, label: str, expert: int) -> pl.DataFrame:
    """How soon the expert is used again, one row per number of tokens up to the longest with ``LEAST_USES`` uses.

    Columns: tokens; share = of its uses with so many tokens of the sequence behind them, those that are followed by
    another use within them; in_sequence = the same in the mean over all orders of each sequence's tokens; shuffled =
    over all orders of the text (independent tokens at its frequency); uses that could be followed.
    """
    followed, possible = np.zeros(len(GAPS), np.int64), np.zeros(len(GAPS), np.int64)
    expected = np.zeros(len(GAPS))
    used = tokens = 0
    for block in expert_blocks(run, label=label, expert=expert):
        used, tokens = used + int(block.hit.sum()), tokens + len(block.hit)
        for low, high in zip(block.offsets[:-1].tolist(), block.offsets[1:].tolist(), strict=True):
            at = np.flatnonzero(block.hit[low:high])
            if len(at):
                ahead = np.append(np.diff(at), np.iinfo(np.int64).max)
                for index, gap in enumerate(GAPS):
                    inside = at + gap < high - low
                    followed[index] += int((ahead[inside] <= gap).sum())
                    possible[index] += int(inside.sum())
                    expected[index] += inside.sum() * _again(len(at), high - low, gap)
    known = np.flatnonzero(possible >= LEAST_USES)
    rate = used / max(tokens, 1)
    gaps = np.array(GAPS)[known]
    return pl.DataFrame(
        {
            "tokens": gaps,
            "share": followed[known] / possible[known],
            "in_sequence": expected[known] / possible[known],
            "shuffled": 1 - (1 - rate) ** gaps,
            "uses": possible[known],
        },
        schema=_REUSE,
    )


def bursts(run: store.Run, *, label: str, expert: int) -> pl.DataFrame:
    """Runs of successive tokens that use the expert, one row: bursts = their number, mean and longest length in tokens,
    shuffled = the mean length of independent tokens at its frequency, uses. Empty for an expert without uses.
    """
    lengths: list[NDArray[np.int64]] = []
    used = tokens = 0
    for block in expert_blocks(run, label=label, expert=expert):
        used, tokens = used + int(block.hit.sum()), tokens + len(block.hit)
        hit = block.hit.astype(np.int8)
        begins = np.diff(hit, prepend=0) > 0
        ends = np.diff(hit, append=0) < 0
        for border in block.offsets[1:-1]:  # a run ends with its sequence
            if 0 < border < len(hit) and hit[border - 1] and hit[border]:
                begins[border], ends[border - 1] = True, True
        lengths.append(np.flatnonzero(ends) - np.flatnonzero(begins) + 1)
    found = np.concatenate(lengths) if lengths else np.zeros(0, np.int64)
    if not len(found):
        return pl.DataFrame(schema=_BURSTS)
    rate = used / tokens
    alone = 1 / (1 - rate) if rate < 1 else None
    return pl.DataFrame(
        [(len(found), float(found.mean()), int(found.max()), alone, used)], schema=_BURSTS, orient="row"
    )


def depths(run: store.Run, *, label: str) -> pl.DataFrame:
    """Uses of every expert of a layer by LRU stack depth: expert, depth = other experts of the layer that were used
    since its last use (-1 = its first use in the sequence), requests.

    A cache of so many slots plus one, or more, answers them; every sequence starts with an empty cache, and what a
    token needs is not evicted before the token is over. Of long traces a part is read.
    """
    from profiler.metrics._stack import Policy, request_depths

    experts = layer_info(run, label).num_experts
    counts = np.zeros((experts, experts + 1), np.int64)
    for block in expert_blocks(run, label=label, expert=0):
        ids = block.ids.astype(np.int32)
        found = np.empty(ids.shape, np.int32)
        offsets = block.offsets.astype(np.int64)
        request_depths(ids, offsets, experts, int(Policy.LRU), 0, True, found)
        asked = ids >= 0
        column = np.where(found[asked] < experts, found[asked] + 1, 0)
        np.add.at(counts, (ids[asked], column), 1)
    expert, column = np.nonzero(counts)
    columns = {"expert": expert, "depth": column - 1, "requests": counts[expert, column]}
    return pl.DataFrame(columns, schema=_DEPTHS)


def hit_rates(frame: pl.DataFrame, *, expert: int, experts: int) -> pl.DataFrame:
    """One row per number of slots, 1 to ``experts``: slots, value = part of the expert's uses that find it, layer = of
    all uses, uses = of the expert. A first use finds nothing. Empty for an expert without uses.

    frame: :func:`depths`.
    """
    mine = frame.filter(pl.col("expert") == expert)
    uses = int(mine["requests"].sum())
    if not uses:
        return pl.DataFrame(schema=_HITS)
    rates = [_cumulated(part, experts) for part in (mine, frame)]
    columns = {"slots": np.arange(1, experts + 1), "value": rates[0], "layer": rates[1]}
    return pl.DataFrame(columns).with_columns(pl.lit(uses).alias("uses")).cast(_HITS)  # type: ignore[arg-type]


def _cumulated(frame: pl.DataFrame, experts: int) -> NDArray[np.float64]:
    found = frame.filter(pl.col("depth") >= 0)
    counts = np.bincount(found["depth"].to_numpy(), weights=found["requests"].to_numpy(), minlength=experts)
    rates: NDArray[np.float64] = np.cumsum(counts) / float(frame["requests"].sum())
    return rates


def _again(uses: int, length: int, gap: int) -> float:
    """Chance that one of the other ``uses`` - 1 stands in the ``gap`` tokens behind one of them, in any order of
    ``length`` tokens: 1 - C(length - 1 - gap, uses - 1) / C(length - 1, uses - 1).
    """
    others, places = uses - 1, length - 1
    if others > places - gap:
        return 1.0
    # The product over the gap has few factors, unlike that over the uses.
    steps = np.arange(gap)
    return float(1 - np.prod((places - others - steps) / (places - steps)))
