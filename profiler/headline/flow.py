"""What flows through the experts: pairs of one layer, transitions between layers, and what can be foreseen of them.

Pairs are counted over all text. Transitions rest on a sample where the trace is long: its size stands in the rows.
Nothing of the size E x E is stored: pages count the two layers that they show.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

import store
from profiler.headline.layerwise import LayerPart, joined
from profiler.headline.similarity_kinds import SimilarityTables
from profiler.headline.subject import BLOCK_TOKENS, SEED, Groups, Rows, Sample, Subject, as_text
from profiler.metrics import co_activation, layer_memory, lookahead, transitions
from profiler.metrics._intervals import interval, jackknife, resample_weights

DISTANCES = (1, 2, 3)
"""MoE layers between the experts that predict and those that are predicted, as in table ``lookahead``."""

PARTS = 16
"""Parts of the sequences: each is left out in turn for intervals; even ones are predicted from odd ones and back."""

MOST_EXPERTS = 512
"""Experts of a layer up to which pairs are counted: a table of pairs per part takes 32 MiB there."""

SAMPLE_COST = 2.5e9
"""Bound on tokens x k x E over all layers: ten seconds of predicting on one core."""

NUM_RESAMPLES = 1000
CONFIDENCE = 0.95
CONTROLS = ("shuffled_in_sequence", "shuffled")
"""The later layer of another token of the same sequence, or of any: what topic, or popularity, alone gives."""

Place = dict[str, Any]
Ids = NDArray[np.int16]
Sums = NDArray[np.float64]


def parts_of(groups: Groups) -> NDArray[np.int64]:
    """(groups,) the part of each group: every domain is spread over all parts, in random order."""
    lot = np.random.default_rng(SEED).permutation(groups.count)
    part = np.empty(groups.count, np.int64)
    part[np.lexsort((lot, groups.domain))] = np.arange(groups.count) % PARTS
    return part


def pair_layer(subject: Subject, axis: int) -> Rows:
    """Pairs of experts of one layer beyond popularity, beside what popularity gives."""
    layer = subject.run.layers[axis]
    if layer.num_experts > MOST_EXPERTS:
        return []
    parts = _pairs(subject, axis)
    total = parts.sum(axis=0)
    value = co_activation.pair_excess(pairs=total)
    if np.isnan(value):
        return []
    place: Place = {"metric": "pair_excess", "layer": layer.layer, "step": layer.step}
    place["at"] = float((total.sum() - np.trace(total)) // 2)
    if subject.has_trace:
        place |= {"tokens": int(subject.lengths.sum()), "sequences": len(subject.lengths)}
    without = [co_activation.pair_excess(pairs=total - part) for part in parts if part.any()]
    low, middle, high = np.quantile(co_activation.chance_excess(pairs=total, seed=SEED), [0.025, 0.5, 0.975])
    return [
        {**place, "value": value, **_jackknifed(value, without)},
        {**place, "control": "popularity", "value": float(middle), "low": float(low), "high": float(high)},
    ]


PAIRS = LayerPart("pair", pair_layer, joined, needs_trace=False)
"""Pairs beyond popularity, layer by layer."""


def _pairs(subject: Subject, axis: int) -> NDArray[np.int64]:
    """(parts, experts, experts) pair counts of one layer; one part where only sums were recorded."""
    layer = subject.run.layers[axis]
    if not subject.has_trace:
        key = (layer.layer, layer.step)
        sums = SimilarityTables(subject.run, layer=layer.layer).sums("expert_pair", "selections", key)
        known = np.zeros((layer.num_experts,) * 2) if sums is None else np.nan_to_num(sums)
        return known[None].astype(np.int64)
    counts = np.zeros((PARTS, layer.num_experts, layer.num_experts), np.int64)
    part, text = parts_of(subject.groups), subject.everything
    for mine, block, ids in text.pieces(axis):
        counts += co_activation.pair_counts(
            ids=ids, offsets=block.offsets, num_experts=layer.num_experts, part=part[text.group[mine]],
            num_parts=PARTS,
        )  # fmt: skip
    return counts


@dataclass(frozen=True)
class _Text:
    """The sampled sequences as transitions need them: groups that are drawn anew, and the parts they belong to.

    group, part (sequences,); of_group (groups,) the part of each group; weights (resamples, groups).
    """

    offsets: NDArray[np.int64]
    group: NDArray[np.int64]
    part: NDArray[np.int64]
    of_group: NDArray[np.int64]
    weights: NDArray[np.float64]

    @classmethod
    def of(cls, subject: Subject, sample: Sample) -> _Text:
        present, group = np.unique(sample.group, return_inverse=True)
        of_group = parts_of(subject.groups)[present]
        weights = resample_weights(num_sequences=len(present), num_resamples=NUM_RESAMPLES, seed=SEED)
        return cls(sample.block.offsets, group, of_group[group], of_group, weights)

    @property
    def halves(self) -> bool:
        """Whether there is text to fit on and other text to try it on."""
        return len(np.unique(self.of_group % 2)) == 2


def transition_rows(subject: Subject) -> Rows:
    """Every MoE layer from the three before it, and, without a layer, all of them from the one before."""
    layers = subject.run.layers
    cost = sum(layer.num_experts * layer.top_k for layer in layers)
    if not subject.has_trace or not len(subject.lengths) or max(one.num_experts for one in layers) > MOST_EXPERTS:
        return []
    sample = subject.sample(min(int(SAMPLE_COST / cost), BLOCK_TOKENS))
    text = _Text.of(subject, sample)
    rows: Rows = []
    overall: dict[tuple[str, str], Sums] = {}
    earlier: deque[tuple[store.LayerInfo, Ids]] = deque(maxlen=max(DISTANCES))
    size: Place = {"tokens": sample.block.tokens, "sequences": len(sample.block.lengths)}
    for axis, layer in enumerate(layers):
        ids = sample.ids(axis)
        place = {**size, "layer": layer.layer, "step": layer.step}
        found = _popular_sums(text, ids, layer)
        rows += _recall_rows(text, found, layer, {**place, "metric": "popularity_recall"})
        for distance, (before, first) in enumerate(reversed(earlier), 1):
            near = distance == 1
            if near:
                _add(overall, ("popularity_recall", "observed"), found)
            for control in ("observed", *CONTROLS) if near else ("observed",):
                here = {**place, "parameters": as_text({"distance": distance}), "control": control}
                second = ids if control == "observed" else sample.ids(axis, control=control)
                counts = _counts(text, first, second, (before, layer))
                rows += _information_rows(text, counts, here)
                found = _foreseen_sums(text, first, second, counts, layer)
                rows += _recall_rows(text, found, layer, {**here, "metric": "transition_recall"})
                if near:
                    _add(overall, ("transition_recall", control), found)
        earlier.append((layer, ids))
    least = min(layers, key=lambda layer: layer.num_experts - layer.top_k)
    for (metric, control), sums in overall.items():
        named = {} if metric == "popularity_recall" else {"parameters": as_text({"distance": 1})}
        rows += _recall_rows(text, sums, least, {**size, **named, "metric": metric, "control": control})
    return rows


def _counts(text: _Text, first: Ids, second: Ids, layers: tuple[store.LayerInfo, store.LayerInfo]) -> NDArray[np.int64]:
    return transitions.transition_counts(
        first=first, second=second, offsets=text.offsets, num_experts=[layer.num_experts for layer in layers],
        part=text.part, num_parts=PARTS,
    )  # fmt: skip


def _information_rows(text: _Text, counts: NDArray[np.int64], place: Place) -> Rows:
    """What one layer says about the other; with an interval for the observed one."""
    total = counts.sum(axis=0)
    if not total.any():
        return []
    value = float(transitions.transition_information(counts=total))
    row = {**place, "metric": "transition_information", "value": value}
    left = total - counts[np.unique(text.part)]
    if place["control"] == "observed":
        row |= _jackknifed(value, transitions.transition_information(counts=left).tolist(), high=np.inf)
    return [row, *_entropy_rows(total, left, place)]


def _entropy_rows(total: NDArray[np.int64], left: NDArray[np.int64], place: Place) -> Iterator[Place]:
    """What is open of the later layer's choice when the earlier one is known; at distance 0, when nothing is."""
    named: Place = {**place, "metric": "conditional_entropy"}
    found: list[tuple[Place, Any, Any]] = [
        (named, layer_memory.conditional_entropy(counts=total), layer_memory.conditional_entropy(counts=left))
    ]
    if place["control"] == "observed" and place["parameters"] == as_text({"distance": 1}):
        whole, less = (layer_memory.choice_entropy(counts=counts.sum(axis=-2)) for counts in (total, left))
        found.append(({**named, "parameters": as_text({"distance": 0})}, whole, less))
    for row, value, without in found:
        ends = _jackknifed(float(value), without.tolist(), high=np.inf) if place["control"] == "observed" else {}
        yield {**row, "value": float(value), **ends}


def _foreseen_sums(text: _Text, first: Ids, second: Ids, counts: NDArray[np.int64], layer: store.LayerInfo) -> Sums:
    """By group: sequences of even parts are predicted with what odd parts show, and the other way round."""
    tables = transitions.prediction_table(counts=np.stack([counts[1::2].sum(axis=0), counts[::2].sum(axis=0)]))
    return transitions.foreseen_sums(
        first=first, second=second, offsets=text.offsets, tables=tables, fold=text.part % 2, top_k=layer.top_k,
        group=text.group, num_groups=len(text.of_group),
    )  # fmt: skip


def _popular_sums(text: _Text, ids: Ids, layer: store.LayerInfo) -> Sums:
    """By group: what the experts hold that the other half of the text uses most."""
    from profiler.metrics._counts import counts_of, summed_by  # imports numba

    counts = summed_by(counts_of(ids, text.offsets, layer.num_experts), text.group, len(text.of_group))
    fold = text.of_group % 2
    popularity = np.stack([counts[fold == 1].sum(axis=0), counts[fold == 0].sum(axis=0)])
    return transitions.popular_sums(counts=counts, popularity=popularity, fold=fold, top_k=layer.top_k)


def _recall_rows(text: _Text, sums: Sums, layer: store.LayerInfo, place: Place) -> Iterator[Place]:
    """Rows of recall by experts fetched beyond k, with intervals over sequences; none without a half to fit on."""
    if not text.halves or not sums[:, 0].any():
        return
    values = transitions.recall(sums=sums.sum(axis=0))
    drawn = transitions.recall(sums=text.weights @ sums)
    low, high = interval(estimate=values, resampled=drawn, confidence=CONFIDENCE, rule="percentile")
    for extra in range(min(len(values), layer.num_experts - layer.top_k + 1)):
        ends = {"low": float(low[extra]), "high": float(high[extra])} if np.isfinite(low[extra]) else {}
        yield {**place, "at": float(extra), "value": float(values[extra]), **ends}


def _add(totals: dict[tuple[str, str], Sums], key: tuple[str, str], sums: Sums) -> None:
    totals[key] = totals.get(key, 0) + sums


def lookahead_rows(subject: Subject) -> Rows:
    """Recall of routers that were run early, all text but first positions; recorded sums have no interval."""
    rows: Rows = []
    run = subject.run
    experts = {(layer.layer, layer.step): layer.num_experts - layer.top_k for layer in run.layers}
    for one in lookahead_sums(run.table("lookahead").filter(~pl.col("first"))).iter_rows(named=True):
        place: Place = {"layer": one["layer"], "step": one["step"], "tokens": one["tokens"]}
        place["parameters"] = as_text({"distance": one["distance"], "input": one["input"]})
        curves = {
            "lookahead_recall": lookahead.lookahead_recall(hits=one["hits"], selections=one["selections"]),
            "lookahead_exact": lookahead.lookahead_exact(exact=one["exact"], tokens=one["tokens"]),
        }
        for metric, values in curves.items():
            reachable = values[: experts[one["layer"], one["step"]] + 1]
            rows += [
                {**place, "metric": metric, "at": float(at), "value": float(value)}
                for at, value in enumerate(reachable)
            ]
        first = lookahead.lookahead_first_choice(first_hits=one["first_hits"], tokens=one["tokens"])
        cosine = lookahead.lookahead_cosine(cosine_sum=one["cosine_sum"], tokens=one["tokens"])
        rows.append({**place, "metric": "lookahead_first_choice", "value": float(first)})
        rows.append({**place, "metric": "lookahead_cosine", "value": float(cosine)})
    return rows


def lookahead_sums(table: pl.DataFrame) -> pl.DataFrame:
    """Rows of table ``lookahead`` added up over domains, phases and positions, in order of layer and distance."""
    keys = ["layer", "step", "distance", "input"]
    widths = int(table["hits"].list.len().max() or 0)  # type: ignore[arg-type]
    lists = [
        pl.concat_list([pl.col(name).list.get(place).sum() for place in range(widths)] or [pl.lit(0)]).alias(name)
        for name in ("hits", "exact")
    ]
    scalars = pl.col("tokens", "selections", "first_hits", "cosine_sum").sum()
    return table.group_by(keys).agg(scalars, *lists).sort(keys)


def _jackknifed(value: float, without: list[Any], *, high: float = 1.0) -> Place:
    """Ends of an interval from the values without each part in turn; none with one part."""
    lower, upper = jackknife(estimate=np.array(value), without=np.array(without), confidence=CONFIDENCE)
    if not np.isfinite(lower):
        return {}
    return {"low": max(float(lower), 0.0), "high": min(float(upper), high)}
