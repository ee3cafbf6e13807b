"""Two runs compared on the same tokens: agreement, margins, load and tokens; and checkpoints against the last one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

import store
from app.frames import comparison_made, comparison_tokens
from app.frames.axes import layer_label
from app.frames.load import balance, expert_load
from profiler.alignment import align
from profiler.comparison import Comparison, LayerComparison, compare
from profiler.metrics import comparison as metrics
from profiler.metrics._arrays import ratio
from profiler.metrics.comparison import AGREEMENTS

Tables = dict[str, pl.DataFrame]

SELECTIONS = 20_000_000
"""Of either run that a page compares; the command takes all."""


def tables(
    run: store.Run, other: store.Run, *, by_position: bool = False, link: comparison_made.Link | None = None,
    whole: bool = True,
) -> Tables:  # fmt: skip
    """All frames of a comparison by the names of :data:`SECTIONS`.

    link: the plan by which the model of one was made of the other's; it says which experts are which.
    whole: all common text; False = of long runs a part, so that a page stays quick.

    Raises:
        InputError: the runs cannot be aligned.
    """
    aligned = align(run, other, by_position=by_position, made=comparison_made.made_by(link))
    if not whole:
        each = sum(layer.top_k for layer in run.layers)
        aligned = aligned.part(max(SELECTIONS // max(each, 1), 1))
    compared = compare(aligned)
    return {name: make(compared) for name, make in SECTIONS.items()}


def tables_with(run: store.Run, *, other: str, version: object, by_position: bool, link: object) -> Tables:
    """As :func:`tables`, of a part of long runs, with the run at a path; ``version``, of the file, is for caches."""
    found = link if isinstance(link, comparison_made.Link) else None
    with store.open_run(other) as second:
        return tables(run, second, by_position=by_position, link=found, whole=False)


def alignment(compared: Comparison) -> pl.DataFrame:
    """One row per run: run, model, dtype, sequences, compared, left_out, tokens compared, aligned_by, of_tokens =
    tokens that both have, where a part of them was compared."""
    found = compared.alignment
    rows = [
        (
            run.name,
            run.info.model,
            run.info.dtype,
            run.info.sequences,
            len(found.pairs),
            left,
            found.tokens,
            found.by,
            found.of_tokens,
        )
        for run, left in zip((found.first, found.second), found.left_out, strict=True)
    ]
    return pl.DataFrame(rows, schema=_ALIGNMENT, orient="row")


def agreement(compared: Comparison) -> pl.DataFrame:
    """One row per measure over all layers: measure, value, low, high, chance, popularity, token_layers.

    chance: of uniformly random selections; popularity: of tokens that are shuffled, every expert as often as it is;
    null where neither is known.
    """
    sums = sum(layer.sums for layer in compared.layers)
    found = metrics.agreement(sums=np.asarray(sums))
    by_layer = layers(compared).select("tokens", "chance", "popularity", "first_chance", "first_popularity")
    count = int(by_layer["tokens"].sum())
    baselines: list[float | None] = [
        float((by_layer[name] * by_layer["tokens"]).sum()) / max(count, 1) for name in by_layer.columns[1:]
    ]
    chance = {"overlap": baselines[:2], "first_choice": baselines[2:]}
    rows = [
        (name, *_ends(found[name]), *chance.get(name, (None, None)), count) for name in AGREEMENTS
    ]  # fmt: skip
    return pl.DataFrame(rows, schema=_AGREEMENT, orient="row")


def layers(compared: Comparison) -> pl.DataFrame:
    """One row per MoE layer: layer, step, label, tokens; the measures of agreement with low and high (95 %, sequences
    drawn anew); chance and popularity = overlap, first_chance and first_popularity = first choice, of random and of
    shuffled selections; total_variation of the loads with low and high (jackknife)."""
    sums = np.stack([layer.sums for layer in compared.layers], axis=1)
    found = metrics.agreement(sums=sums)
    rows = []
    for axis, layer in enumerate(compared.layers):
        at = layer.pair.first
        moved = metrics.load_difference(first=layer.loads[0], second=layer.loads[1]).total_variation
        rows.append(
            (
                at.layer,
                at.step,
                layer_label(at.layer, at.step),
                int(layer.sums[:, -1].sum()),
                *(value for name in AGREEMENTS for value in _ends(found[name], axis)),
                *_baselines(layer),
                *_ends(moved),
            )
        )
    return pl.DataFrame(rows, schema=_LAYERS, orient="row").fill_nan(None)


def domains(compared: Comparison) -> pl.DataFrame:
    """One row per domain, over all layers: domain, token_layers, the measures of agreement with low and high."""
    sums = np.asarray(sum(layer.sums for layer in compared.layers))
    rows = []
    for domain in np.unique(compared.groups.domain).tolist():
        mine = sums[compared.groups.domain == domain]
        found = metrics.agreement(sums=mine)
        rows.append((domain, int(mine[:, -1].sum()), *(value for name in AGREEMENTS for value in _ends(found[name]))))
    return pl.DataFrame(rows, schema=_DOMAINS, orient="row").fill_nan(None)


def margins(compared: Comparison) -> pl.DataFrame:
    """One row per margin, layer ("all" = all of them) and part of its range: margin, label, low, high (null = no
    bound), flipped and unchanged = tokens there, flip_share of both.

    boundary_margin: logit of the last expert taken minus the next one's, in the first run. Of tokens that flip alone:
    left_weight, share of the first run's gate weight on experts that left, and weight_gap, its difference from the
    share that came in the second. Only what the runs hold.
    """
    parts = []
    for name, edges in metrics.MARGINS.items():
        histograms = {
            layer_label(one.pair.first.layer, one.pair.first.step): one.margins[name] for one in compared.layers
        }
        pooled = np.asarray(sum(histograms.values()))
        if pooled.any():
            parts += [_histogram(name, label, edges, one) for label, one in {"all": pooled, **histograms}.items()]
    return pl.concat(parts) if parts else pl.DataFrame(schema=_MARGINS)


def load(compared: Comparison) -> pl.DataFrame:
    """One row per MoE layer and expert: layer, step, label, expert, selections in both runs, share of the layer's
    selections in each, difference = second minus first. A share is null where a plan has left no such expert."""
    parts = []
    for layer in compared.layers:
        at, (first, second) = layer.pair.first, (load.sum(0) for load in layer.loads)
        size = len(first)
        shares = [load / max(load.sum(), 1) for load in (first, second)]
        there = [_has(size, names) for names in layer.pair.names]
        moved = np.where(there[0] | there[1], shares[1] - shares[0], np.nan)
        parts.append(
            pl.DataFrame(
                {
                    "layer": np.full(size, at.layer),
                    "step": np.full(size, at.step),
                    "label": [layer_label(at.layer, at.step)] * size,
                    "expert": np.arange(size),
                    "selections": first,
                    "other_selections": second,
                    "share": np.where(there[0], shares[0], np.nan),
                    "other_share": np.where(there[1], shares[1], np.nan),
                    "difference": moved,
                },
                schema=_LOAD,
            )
        )
    return pl.concat(parts).fill_nan(None)


def evenness(run: store.Run, *, other: str, version: object) -> pl.DataFrame:
    """How evenly both runs load their experts, whatever their shapes: the columns of ``app.frames.load.balance`` behind
    side (0 = this run, 1 = the one at a path, whose ``version`` is for caches)."""
    with store.open_run(other) as second:
        parts = [balance(one).with_columns(side=pl.lit(side)) for side, one in enumerate((run, second))]
    return pl.concat(parts)


def ranks(run: store.Run, *, other: str, version: object, label: str) -> pl.DataFrame:
    """Experts of one layer of both runs, the busiest first: side, label, expert, tokens, relative = load over the
    uniform share, part = share of the experts that are at least as busy, 0..1."""
    parts = []
    with store.open_run(other) as second:
        for side, one in enumerate((run, second)):
            frame = expert_load(one).filter(label=label).sort("tokens", "expert", descending=[True, False])
            part = pl.int_range(1, pl.len() + 1) / pl.len()
            parts.append(frame.select(pl.lit(side).alias("side"), "label", "expert", "tokens", "relative", part=part))
    return pl.concat(parts)


SECTIONS: dict[str, Callable[[Comparison], pl.DataFrame]] = {
    "alignment": alignment,
    "agreement": agreement,
    "layers": layers,
    "domains": domains,
    "margins": margins,
    "load": load,
    "changed": comparison_tokens.changed,
    "sequences": comparison_tokens.sequences,
    "flips": comparison_tokens.flips,
}
"""The frames of a comparison by name, in the order in which the command prints them."""


def saturation(runs: Sequence[store.Run], *, by_position: bool = False) -> pl.DataFrame:
    """Router saturation of every run but the last against the last one, one row per run and MoE layer.

    Columns: run, layer, step, label, tokens, sequences, saturation and first_choice with low and high, chance and
    popularity of the saturation.
    """
    parts = []
    for run in runs[:-1]:
        compared = compare(align(run, runs[-1], by_position=by_position), margins=False)
        names = {"overlap": "saturation", "overlap_low": "saturation_low", "overlap_high": "saturation_high"}
        frame = layers(compared).rename(names).select(*_SATURATION)
        frame.insert_column(0, pl.Series("run", [run.name] * len(frame)))
        parts.append(frame.with_columns(sequences=pl.lit(len(compared.alignment.pairs), pl.Int64)))
    return pl.concat(parts)


def _has(experts: int, names: NDArray[np.int16] | None) -> NDArray[np.bool_]:
    """(experts,) which numbers of the original stand for an expert of a run."""
    return np.ones(experts, bool) if names is None else np.isin(np.arange(experts), names)


def _sizes(experts: int, names: NDArray[np.int16] | None) -> NDArray[np.int64]:
    """(experts,) how many experts of a run go by each number of the original."""
    named = np.arange(experts) if names is None else names[names >= 0]
    return np.bincount(named, minlength=experts).astype(np.int64)


def _baselines(layer: LayerComparison) -> tuple[float, float, float, float]:
    """Overlap by chance and by popularity, first choice by chance and by popularity."""
    experts, tokens = layer.pair.num_experts, int(layer.sums[:, -1].sum())
    first, second = (load.sum(0) for load in layer.loads)
    one, other = (_sizes(experts, names) for names in layer.pair.names)
    chance, first_chance = metrics.chance_agreement(top_k=layer.top_k, sizes=(one, other))
    return (
        chance,
        metrics.popularity_overlap(first=first, second=second, tokens=tokens),
        first_chance,
        metrics.popularity_overlap(first=layer.firsts[0], second=layer.firsts[1], tokens=tokens),
    )


def _histogram(name: str, label: str, edges: NDArray[np.float64], counts: NDArray[np.int64]) -> pl.DataFrame:
    flipped, unchanged = counts
    known = unchanged.any()
    columns = {
        "margin": [name] * len(flipped),
        "label": [label] * len(flipped),
        "low": edges[:-1],
        "high": np.where(np.isfinite(edges[1:]), edges[1:], np.nan),
        "flipped": flipped,
        "unchanged": unchanged if known else [None] * len(flipped),
        "flip_share": ratio(flipped, flipped + unchanged) if known else [None] * len(flipped),
    }
    return pl.DataFrame(columns, schema=_MARGINS).fill_nan(None)


def _ends(found: metrics.Intervals, axis: int | None = None) -> tuple[float | None, ...]:
    """Value, low and high of one layer, or of the only one; None for what is not known."""
    values = (found.value, found.low, found.high)
    picked = [float(one if axis is None else one[axis]) for one in values]
    return tuple(None if np.isnan(value) else value for value in picked)


_KEYS = {"layer": pl.Int32, "step": pl.Int32, "label": pl.String}
_MEASURES = {f"{name}{end}": pl.Float64 for name in AGREEMENTS for end in ("", "_low", "_high")}
_ALIGNMENT = {"run": pl.String, "model": pl.String, "dtype": pl.String, "sequences": pl.Int64, "compared": pl.Int64,
              "left_out": pl.Int64, "tokens": pl.Int64, "aligned_by": pl.String, "of_tokens": pl.Int64}  # fmt: skip
_AGREEMENT = {"measure": pl.String, "value": pl.Float64, "low": pl.Float64, "high": pl.Float64, "chance": pl.Float64,
              "popularity": pl.Float64, "token_layers": pl.Int64}  # fmt: skip
_LAYERS = {
    **_KEYS, "tokens": pl.Int64, **_MEASURES, "chance": pl.Float64, "popularity": pl.Float64,
    "first_chance": pl.Float64, "first_popularity": pl.Float64, "total_variation": pl.Float64,
    "total_variation_low": pl.Float64, "total_variation_high": pl.Float64,
}  # fmt: skip
_DOMAINS = {"domain": pl.String, "token_layers": pl.Int64, **_MEASURES}
_MARGINS = {"margin": pl.String, "label": pl.String, "low": pl.Float64, "high": pl.Float64, "flipped": pl.Int64,
            "unchanged": pl.Int64, "flip_share": pl.Float64}  # fmt: skip
_LOAD = {**_KEYS, "expert": pl.Int32, "selections": pl.Int64, "other_selections": pl.Int64, "share": pl.Float64,
         "other_share": pl.Float64, "difference": pl.Float64}  # fmt: skip
_SATURATION = [*_KEYS, "tokens", "saturation", "saturation_low", "saturation_high", "first_choice", "first_choice_low",
               "first_choice_high", "chance", "popularity"]  # fmt: skip
