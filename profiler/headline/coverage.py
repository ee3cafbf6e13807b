"""Is the text enough? Starved experts, errors of scores, and how alike parts of the text rank the experts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

import store
from profiler.headline.load import layer_counts
from profiler.headline.subject import SEED, Rows, Subject, as_text
from profiler.metrics import coverage
from profiler.metrics.agreement import SHARES, chance_band, cut_correlation
from store import NUM_PARTS, part_of_sequence

NUM_DRAWS = 100
"""Random pairs of texts for each length."""

PREFIXES = (1, 2, 4, 8)
"""Lengths of the shorter texts, in parts."""

Parts = dict[str, NDArray[np.generic]]
"""(experts, parts) sums of one layer, by column of table ``expert_part``."""

_MEASURES = [("spearman", None), ("kendall", None), *(("overlap", share) for share in SHARES)]


def coverage_rows(subject: Subject) -> Rows:
    """Starved experts, agreement of halves and of prefixes, tokens needed, and the errors of scores as vectors."""
    rows = _starved_rows(subject.run)
    layers = part_sums(subject)
    if not layers:
        return rows
    tokens, sequences = subject.run.info.tokens, subject.run.info.sequences
    place: dict[str, Any] = {"tokens": tokens, "sequences": sequences}
    for layer, parts in layers.items():
        rows += _error_rows(subject.run, layer, parts, place)
    used = _used_parts(layers)
    if used.sum() < 2:
        return rows
    filled = {layer: {name: sums[:, used] for name, sums in parts.items()} for layer, parts in layers.items()}
    held = [coverage.available(parts) for parts in filled.values()]
    for name in [name for name in coverage.SCORES if all(name in names for names in held)]:
        rows += _half_rows(filled, name, place) + _prefix_rows(filled, name, place)
    return rows + _chance_rows(filled, place)


def part_sums(subject: Subject) -> dict[tuple[int, int], Parts]:
    """Sums per part of every layer: from table ``expert_part``, else counted in the trace or in the source's passes.

    Empty where the run has none of them, or no selection.
    """
    frame = subject.run.table("expert_part").filter(pl.col("kind") == "routed")
    if not frame.is_empty():
        return _from_table(subject.run, frame)
    if subject.has_trace:
        return _from_trace(subject)
    return _from_spans(subject.run)


def _from_table(run: store.Run, frame: pl.DataFrame) -> dict[tuple[int, int], Parts]:
    layers = {}
    for layer in run.layers:
        rows = frame.filter((pl.col("layer") == layer.layer) & (pl.col("step") == layer.step))
        parts: Parts = {}
        for column in ("tokens", "gate_sum", "norm_sum", "gated_norm_sum"):
            known = rows.filter(pl.col(column).is_not_null())
            if known.is_empty():
                continue
            sums = np.zeros((layer.num_experts, NUM_PARTS), np.int64 if column == "tokens" else np.float64)
            sums[known["expert"].to_numpy()] = known[column].list.to_array(NUM_PARTS).to_numpy()
            parts[column] = sums
        if "tokens" in parts and parts["tokens"].any():
            layers[layer.layer, layer.step] = parts
    return layers


def _from_trace(subject: Subject) -> dict[tuple[int, int], Parts]:
    from profiler.metrics._counts import counts_of

    layers: dict[tuple[int, int], Parts] = {}
    for axis, layer in enumerate(subject.run.layers):
        sums = np.zeros((layer.num_experts, NUM_PARTS), np.int64)
        for block in subject.blocks:
            counts = counts_of(subject.ids(axis, block), block.offsets, layer.num_experts)
            sums += coverage.parts_of_counts(counts=counts, part=part_of_sequence(block.sequences), num_parts=NUM_PARTS)
        if sums.any():
            layers[layer.layer, layer.step] = {"tokens": sums}
    return layers


def _from_spans(run: store.Run) -> dict[tuple[int, int], Parts]:
    """Forward passes take the place of sequences, in sixteen stretches of time: neighbours serve the same requests."""
    frame = run.table("load_span")
    layers: dict[tuple[int, int], Parts] = {}
    for layer in run.layers:
        rows = frame.filter((pl.col("layer") == layer.layer) & (pl.col("step") == layer.step)).sort("span")
        if rows.is_empty():
            continue
        counts = rows["tokens"].list.to_array(layer.num_experts).to_numpy().astype(np.int64)
        part = np.arange(len(counts)) * NUM_PARTS // len(counts)
        sums = coverage.parts_of_counts(counts=counts, part=part, num_parts=NUM_PARTS)
        layers[layer.layer, layer.step] = {"tokens": sums}
    return layers


def _used_parts(layers: dict[tuple[int, int], Parts]) -> NDArray[np.bool_]:
    """(parts,) whether a part holds text: short runs leave some empty."""
    return np.any([parts["tokens"].any(axis=0) for parts in layers.values()], axis=0)


def layer_reach(run: store.Run) -> Iterator[tuple[store.LayerInfo, NDArray[np.int64], coverage.Reach]]:
    """Every layer with load, the selections of its experts, and how far the text reaches them.

    Where an import does not say how many experts a token takes, each selection counts as a token.
    """
    frame = run.table("expert_load").filter(pl.col("kind") == "routed")
    for layer in run.layers:
        rows = frame.filter((pl.col("layer") == layer.layer) & (pl.col("step") == layer.step))
        counts, k = layer_counts(rows, layer), max(layer.top_k, 1)
        if counts.any():
            yield layer, counts, coverage.reach(counts=counts, top_k=k, tokens=float(counts.sum()) / k)


def _starved_rows(run: store.Run) -> Rows:
    rows: Rows = []
    for layer, counts, reach in layer_reach(run):
        place = {"layer": layer.layer, "step": layer.step, "at": coverage.STARVED}
        place["tokens"] = round(int(counts.sum()) / max(layer.top_k, 1))
        rows.append({"metric": "starved_experts", "value": float(reach.starved.sum()), **place})
    if rows:
        total = sum(row["value"] for row in rows)
        rows.append({"metric": "starved_experts", "value": total, "at": coverage.STARVED})
    return rows


def _error_rows(run: store.Run, layer: tuple[int, int], parts: Parts, place: dict[str, Any]) -> Rows:
    """Relative standard error of every expert's score, by parts, and token by token where squares were summed."""
    where = {"metric": "relative_error", "layer": layer[0], "step": layer[1], **place}
    rows: Rows = []

    def add(score: str, by: str, values: NDArray[np.float64]) -> None:
        rows.append({**where, "parameters": as_text({"score": score, "by": by}), "values": values.tolist()})

    filled = parts["tokens"].any(axis=0)
    for score in coverage.available(parts):
        above, below = coverage.SCORES[score]
        counts = None if below is None else parts[below][:, filled]
        add(score, "parts", coverage.part_error(sums=parts[above][:, filled], counts=counts))
    output = run.table("expert_output").filter(
        (pl.col("kind") == "routed") & (pl.col("layer") == layer[0]) & (pl.col("step") == layer[1])
    )
    columns = ["tokens", "norm_sum", "norm_square_sum", "gated_norm_sum", "gated_norm_square_sum"]
    summed = output.group_by("expert").agg(pl.col(columns).sum())
    if not summed.is_empty():
        table = np.zeros((len(parts["tokens"]), len(columns)))
        table[summed["expert"].to_numpy()] = summed.select(columns).to_numpy()
        counts, norm, norm_square, gated, gated_square = table.T
        add("man", "tokens", coverage.token_error(counts=counts, sums=norm, square_sums=norm_square))
        add("reap", "tokens", coverage.token_error(counts=counts, sums=gated, square_sums=gated_square))
    return rows


def _half_rows(layers: dict[tuple[int, int], Parts], name: str, place: dict[str, Any]) -> Rows:
    """Agreement of random halves, the same for all text (Spearman-Brown), and the tokens that the target takes."""
    num_parts = _num_parts(layers)
    half = num_parts // 2
    pairs = coverage.draw_pairs(num_parts=num_parts, size=half, other=half, num_draws=NUM_DRAWS, seed=SEED)
    halves = _agreement(layers, name, *pairs)
    rows: Rows = []
    for layer, values in _by_place(halves).items():
        where: dict[str, Any] = {**place, **({} if layer is None else {"layer": layer[0], "step": layer[1]})}
        for (measure, share), draws in values.items():
            rows += _measure_rows(name, measure, share, draws, num_parts / half, where)
    return rows


def _measure_rows(
    name: str, measure: str, share: float | None, draws: NDArray[np.float64], factor: float, where: dict[str, Any]
) -> Rows:
    """Rows of one measure; the whole text is ``factor`` times as long as what was drawn."""
    if np.isnan(draws).all():
        return []
    mean, (low, high) = float(np.nanmean(draws)), np.nanquantile(draws, [0.025, 0.975])
    text = {"score": name, "measure": measure}
    half = {**where, "metric": "split_half_agreement", "at": share}
    rows = [{**half, "parameters": as_text(text), "value": mean, "low": float(low), "high": float(high)}]
    if measure == "kendall":
        return rows
    agreement = mean if share is None else float(cut_correlation(overlap=mean, share=share))
    whole = float(coverage.lengthened(agreement=agreement, factor=factor))
    length = float(coverage.length_for(agreement=whole))
    goal = "ranking" if share is None else "cut"
    rows.append({**half, "parameters": as_text({**text, "length": "whole"}), "value": whole})
    needed = {**where, "metric": "tokens_needed", "parameters": as_text({"score": name, "goal": goal}), "at": share}
    rows.append({**needed, "value": length * where["tokens"]})
    return rows


def _prefix_rows(layers: dict[tuple[int, int], Parts], name: str, place: dict[str, Any]) -> Rows:
    """Agreement of texts of 1, 2, 4 and 8 parts with all, with the rest, and with other texts of their length."""
    num_parts = _num_parts(layers)
    rows: Rows = []
    for size in [one for one in PREFIXES if one < num_parts]:
        for against in ("all", "rest", "equal"):
            if against == "equal" and 2 * size > num_parts:
                continue
            other = size if against == "equal" else num_parts - size
            first, second = coverage.draw_pairs(
                num_parts=num_parts, size=size, other=other, num_draws=NUM_DRAWS, seed=SEED
            )
            if against == "all":
                second = np.ones_like(first)
            pooled = _by_place(_agreement(layers, name, first, second, pairwise=False))[None]
            for measure, share in _MEASURES:
                draws = pooled[measure, share]
                if np.isnan(draws).all():
                    continue
                low, high = np.nanquantile(draws, [0.025, 0.975])
                text: dict[str, Any] = {"score": name, "against": against, "measure": measure}
                text |= {} if share is None else {"share": share}
                row = {**place, "metric": "prefix_agreement", "parameters": as_text(text), "at": size / num_parts}
                rows.append(row | {"value": float(np.nanmean(draws)), "low": float(low), "high": float(high)})
    return rows


def _chance_rows(layers: dict[tuple[int, int], Parts], place: dict[str, Any]) -> Rows:
    """What random rankings of as many experts give, averaged over as many layers."""
    experts = [len(parts["tokens"]) for parts in layers.values()]
    rows: Rows = []
    if min(experts) < 2:
        return rows
    for measure, share in _MEASURES:
        if measure == "kendall":
            continue
        band = chance_band(num_experts=experts, measure=measure if share is None else str(share), num_draws=400)
        row = {**place, "metric": "split_half_agreement", "control": "chance", "at": share}
        row |= {"parameters": as_text({"measure": measure}), "value": band.mean}
        rows.append(row | {"low": band.low, "high": band.high})
    return rows


def _num_parts(layers: dict[tuple[int, int], Parts]) -> int:
    return int(next(iter(layers.values()))["tokens"].shape[1])


_Values = dict[tuple[str, float | None], NDArray[np.float64]]


def _agreement(
    layers: dict[tuple[int, int], Parts],
    name: str,
    first: NDArray[np.bool_],
    second: NDArray[np.bool_],
    *,
    pairwise: bool = True,
) -> dict[tuple[int, int], _Values]:
    """Per layer, the (draws,) agreement by measure and share."""
    found = {}
    for layer, parts in layers.items():
        one = coverage.part_agreement(parts=parts, name=name, first=first, second=second, pairwise=pairwise)
        values: _Values = {("spearman", None): one.spearman, ("kendall", None): one.kendall}
        values |= {("overlap", share): one.overlap[:, index] for index, share in enumerate(SHARES)}
        found[layer] = values
    return found


def _by_place(layers: dict[tuple[int, int], _Values]) -> dict[tuple[int, int] | None, _Values]:
    """The same with the mean over layers under None; the draws are the same in all layers."""
    stacked: dict[tuple[str, float | None], list[NDArray[np.float64]]] = defaultdict(list)
    for values in layers.values():
        for key, draws in values.items():
            if not np.isnan(draws).all():
                stacked[key].append(draws)
    empty = [np.array([np.nan])]
    found: dict[tuple[int, int] | None, _Values] = {
        None: {key: np.mean(stacked.get(key, empty), axis=0) for key in _MEASURES}
    }
    found.update(layers.items())
    return found
