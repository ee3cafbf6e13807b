"""Flow: pairs of experts of one layer, transitions between two layers, and how well experts can be foreseen."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
from numpy.typing import NDArray

import store
from app.frames.axes import layer_label, layer_labels, parse_layer, select, with_label
from app.frames.expert_trace import layer_info
from app.frames.stretches import stretches
from profiler.headline.flow import MOST_EXPERTS, lookahead_sums
from profiler.headline.similarity_kinds import SimilarityTables
from profiler.metrics import co_activation, lookahead
from profiler.metrics import transitions as formulas
from profiler.metrics.similarity_agreement import clustered_order

LEAST_EXPECTED = 10
"""Pairs that popularity alone would give fewer tokens stand in no table and no sentence: their ratios are noise."""

MEASURES = {
    "attraction": "attraction",
    "co_activation": "co-activation",
    "lift": "lift",
    "jaccard": "Jaccard index",
    "pointwise_information": "pointwise mutual information",
}
"""Measures of a pair, as pages name them; names as in the registry of metrics."""

Counts = NDArray[np.int64]


def pairs(run: store.Run, *, label: str, domain: str | None = None) -> pl.DataFrame:
    """One row per two experts of a layer, both ways round, in clustered order.

    Columns: expert, other, place, other_place; joint_tokens = tokens that use both; expected = as many as popularity
    alone gives; one column per measure; tokens of the text. Empty where the run cannot say it.
    """
    found = _pair_counts(run, label, domain)
    if found is None:
        return pl.DataFrame(schema=_PAIRS)
    counts, tokens = found
    size = len(counts)
    measures = {name: measure(counts, tokens) for name, measure in co_activation.MEASURES.items()}
    with np.errstate(divide="ignore"):
        order = clustered_order(similarity=np.clip(np.log2(measures["attraction"]), -4, 4))
    place = np.empty(size, np.int64)
    place[order] = np.arange(size)
    first, second = np.repeat(order, size), np.tile(order, size)
    columns = {"joint_tokens": counts, "expected": co_activation.expected(pairs=counts), **measures}
    frame = pl.DataFrame(
        {
            "expert": first, "other": second, "place": place[first], "other_place": place[second],
            **{name: matrix[first, second] for name, matrix in columns.items()},
            "tokens": np.full(len(first), tokens, np.int64),
        },
        schema=_PAIRS,
    )  # fmt: skip
    return frame.filter(pl.col("expert") != pl.col("other")).fill_nan(None)


def excess(run: store.Run) -> pl.DataFrame:
    """One row per MoE layer, from the stored metrics: layer, step, label, excess = share of pairs that popularity does
    not explain, with low, high and what only noise gives (noise_low, noise, noise_high)."""
    frame = with_label(run.metrics("pair_excess"))
    keys, band = ["layer", "step", "label"], ("low", "value", "high")
    seen = frame.filter(pl.col("control") == "observed").select(*keys, pl.col("value").alias("excess"), "low", "high")
    noise = frame.filter(pl.col("control") == "popularity").select(
        *keys, *(pl.col(name).alias(f"noise_{name}".removesuffix("_value")) for name in band)
    )
    return seen.join(noise, on=keys, how="left").sort("layer", "step")


def co_activations(run: store.Run) -> pl.DataFrame:
    """One row per MoE layer: how far its pairs of experts are more than popularity.

    Columns: layer, step, label, pairs; excess = share of pairs that popularity does not explain, with low, high and
    what only noise gives (noise_low, noise, noise_high); the pair of the largest attraction among those that popularity
    alone would give at least 10 tokens: expert, other, joint_tokens, attraction; chance = co-activation of a random
    router; tokens. Excess is null where metrics were not computed.
    """
    known = {(row["layer"], row["step"], row["control"]): row for row in run.metrics("pair_excess").to_dicts()}
    rows = []
    for layer in run.layers:
        key = (layer.layer, layer.step)
        seen, noise = (known.get((*key, control), {}) for control in ("observed", "popularity"))
        frame = (
            pairs(run, label=layer_label(*key)) if layer.num_experts <= MOST_EXPERTS else pl.DataFrame(schema=_PAIRS)
        )
        best = (
            frame.filter(pl.col("expected") >= LEAST_EXPECTED)
            .sort("attraction", descending=True, nulls_last=True)
            .head(1)
        )
        pair = best.select("expert", "other", "joint_tokens", "attraction").row(0) if len(best) else (None,) * 4
        if not seen and not len(best):
            continue
        excess = (seen.get("value"), seen.get("low"), seen.get("high"))
        band = (noise.get("low"), noise.get("value"), noise.get("high"))
        chance = co_activation.conditional_chance(num_experts=layer.num_experts, top_k=layer.top_k)
        tokens = frame["tokens"][0] if len(frame) else None
        rows.append((*key, layer_label(*key), frame["joint_tokens"].sum() // 2, *excess, *band, *pair, chance, tokens))
    return pl.DataFrame(rows, schema=_CO_ACTIVATIONS, orient="row")


def transitions(run: store.Run, *, label: str, source: str, domain: str | None = None) -> pl.DataFrame:
    """One row per expert of layer ``source`` and expert of layer ``label``, for the same tokens.

    Columns: expert, other (of the later layer), place, other_place: experts of the later layer stand in the order that
    puts the partners of the strongest lift on the diagonal; joint_tokens; share = of the later layer's choices by
    tokens that use expert; lift over independence; tokens of the text that was counted. Empty without a trace.
    """
    found = transition_counts(run, label=label, source=source, domain=domain)
    if found is None:
        return pl.DataFrame(schema=_TRANSITIONS)
    counts, tokens = found
    lift = formulas.transition_lift(counts=counts)
    order = _facing(np.nan_to_num(lift))
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    first, second = np.repeat(np.arange(len(counts)), counts.shape[1]), np.tile(order, len(counts))
    columns = {"joint_tokens": counts, "share": formulas.transition_shares(counts=counts), "lift": lift}
    return pl.DataFrame(
        {
            "expert": first, "other": second, "place": first, "other_place": place[second],
            **{name: matrix[first, second] for name, matrix in columns.items()},
            "tokens": np.full(len(first), tokens, np.int64),
        },
        schema=_TRANSITIONS,
    ).fill_nan(None)  # fmt: skip


def transition_counts(
    run: store.Run, *, label: str, source: str, domain: str | None = None
) -> tuple[Counts, int] | None:
    """(experts of ``source``, experts of ``label``) counts, and tokens; None without a trace of that text."""
    if not run.has_trace or _too_many(run, label, source):
        return None
    experts = [layer_info(run, name).num_experts for name in (source, label)]
    counts, tokens = np.zeros(experts, np.int64), 0
    for one in stretches(run, (source, label), domain=domain):
        first, second = one.layers
        counts += formulas.transition_counts(
            first=first, second=second, offsets=one.offsets, num_experts=experts, part=one.mine, num_parts=2
        )[1]
        tokens += int(np.diff(one.offsets)[one.mine == 1].sum())
    return (counts, tokens) if counts.any() else None


def information(run: store.Run) -> pl.DataFrame:
    """One row per MoE layer, distance and control: layer, step, label, distance, control, bits, low, high, tokens,
    sequences, from the stored metrics."""
    frame = _with_parameters(run.metrics("transition_information"), {"distance": pl.Int64})
    names = ["layer", "step", "label", "distance", "control"]
    return with_label(frame).select(*names, pl.col("value").alias("bits"), *_RESTS).sort(names)


def predictability(run: store.Run) -> pl.DataFrame:
    """One row per MoE layer, predictor, distance, control and experts fetched, from the stored metrics.

    Columns: layer, step, label ("all": the layers together); predictor = transition | popularity | previous (the
    experts of the token before: mean overlap); distance (0 for the latter two); control; extra = experts beyond k;
    fetched = k + extra (null for all layers together); value with low and high; chance; tokens, sequences.
    """
    parts = [run.metrics(metric).with_columns(pl.lit(name).alias("predictor")) for metric, name in _PREDICTORS.items()]
    frame = with_label(_with_parameters(pl.concat(parts), {"distance": pl.Int64}))
    overlap = pl.col("predictor") == "previous"
    frame = frame.filter(~overlap | ((pl.col("at") == 1) & (pl.col("control") == "observed"))).with_columns(
        pl.col("label").fill_null("all"),
        pl.col("distance").fill_null(0),
        pl.when(overlap).then(0).otherwise(pl.col("at")).cast(pl.Int64).alias("extra"),
    )
    names = ["layer", "step", "label", "predictor", "distance", "control", "extra"]
    frame = _with_chance(run, frame)
    return frame.select(*names, "fetched", "value", "low", "high", "chance", "tokens", "sequences").sort(names)


def lookaheads(run: store.Run, *, domain: str | None = None, phase: str | None = None) -> pl.DataFrame:
    """One row per MoE layer, distance, input and experts fetched: what the layer's router foresees when run early.

    Columns: layer, step, label, distance, input; extra, fetched; value = recall; exact = share of tokens whose whole
    choice was fetched; chance; first_choice, cosine; tokens, of which first positions are left out.
    """
    table = select(run.table("lookahead"), domain=domain, phase=phase).filter(~pl.col("first"))
    rows = []
    for one in lookahead_sums(table).iter_rows(named=True):
        recall = lookahead.lookahead_recall(hits=one["hits"], selections=one["selections"])
        exact = lookahead.lookahead_exact(exact=one["exact"], tokens=one["tokens"])
        first = lookahead.lookahead_first_choice(first_hits=one["first_hits"], tokens=one["tokens"])
        cosine = lookahead.lookahead_cosine(cosine_sum=one["cosine_sum"], tokens=one["tokens"])
        place = (one["layer"], one["step"], one["distance"], one["input"])
        rows += [
            (*place, extra, float(value), float(whole), float(first), float(cosine), one["tokens"])
            for extra, (value, whole) in enumerate(zip(recall, exact, strict=True))
        ]
    frame = with_label(pl.DataFrame(rows, schema=_LOOKAHEAD, orient="row"))
    names = ["layer", "step", "label", "distance", "input", "extra", "fetched", "value", "exact", "chance"]
    return _with_chance(run, frame).select(*names, "first_choice", "cosine", "tokens")


def lacks_pairs(run: store.Run) -> bool:
    """Whether the run has neither a trace nor recorded pairs, from which experts that meet could be counted."""
    if run.has_trace or run.live or not run.layers or len(run.metrics("pair_excess")):
        return False
    return run.table("expert_pair", layer=run.layers[0].layer).is_empty()


def strongest(frame: pl.DataFrame) -> pl.DataFrame:
    """Of the frame :func:`pairs`, each pair once, the one of the largest attraction first; rare ones are left out."""
    once = frame.filter((pl.col("expert") < pl.col("other")) & (pl.col("expected") >= LEAST_EXPECTED))
    return once.sort("attraction", descending=True, nulls_last=True).drop("place", "other_place", "tokens")


def sources(run: store.Run, label: str) -> list[str]:
    """The layers that transitions into a layer can come from, the nearest one first."""
    labels = layer_labels(run)
    return labels[: labels.index(label)][::-1] if label in labels else []


def _pair_counts(run: store.Run, label: str, domain: str | None) -> tuple[NDArray[np.float64], int] | None:
    """Pair counts and tokens of a layer: recorded ones for all text, else counted in the trace."""
    layer, step = parse_layer(label)
    recorded = None
    if domain is None:
        recorded = SimilarityTables(run, layer=layer).sums("expert_pair", "selections", (layer, step))
    if recorded is not None:
        load = run.table("router_load", layer=layer).filter(pl.col("step") == step)
        return np.nan_to_num(recorded), int(load["tokens"].sum())
    found = transition_counts(run, label=label, source=label, domain=domain)
    return None if found is None else (found[0].astype(np.float64), found[1])


def _too_many(run: store.Run, *labels: str) -> bool:
    return any(layer_info(run, label).num_experts > MOST_EXPERTS for label in labels)


def _facing(lift: NDArray[np.float64]) -> Counts:
    """Columns in the order that gives row i its best partner at place i, all rows together; the rest behind."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(-np.log1p(lift))
    chosen = columns[np.argsort(rows)]
    return np.concatenate([chosen, np.setdiff1d(np.arange(lift.shape[1]), chosen)]).astype(np.int64)


def _with_parameters(frame: pl.DataFrame, names: dict[str, type[pl.DataType]]) -> pl.DataFrame:
    """The frame with columns for some of the parameters."""
    parsed = [json.loads(text or "{}") for text in frame["parameters"].to_list()]
    return frame.with_columns(
        pl.Series(name, [one.get(name) for one in parsed], dtype=kind) for name, kind in names.items()
    )


def _with_chance(run: store.Run, frame: pl.DataFrame) -> pl.DataFrame:
    """The frame with fetched = k + extra, and chance; for all layers together, the mean of their chances. Rows that
    would fetch more experts than there are go."""
    layers = pl.DataFrame(
        [(one.layer, one.step, one.top_k, one.num_experts) for one in run.layers],
        schema={"layer": frame.schema["layer"], "step": frame.schema["step"], "top_k": pl.Int64, "experts": pl.Int64},
        orient="row",
    )
    joined = frame.join(layers, on=["layer", "step"], how="left", maintain_order="left")
    fetched = pl.col("top_k") + pl.col("extra")
    mean_chance = sum(one.top_k / one.num_experts for one in run.layers[1:]) / max(len(run.layers) - 1, 1)
    step = sum(1 / one.num_experts for one in run.layers[1:]) / max(len(run.layers) - 1, 1)
    chance = (fetched / pl.col("experts")).fill_null(mean_chance + step * pl.col("extra"))
    return joined.with_columns(fetched.alias("fetched"), chance.clip(0, 1).alias("chance")).filter(
        pl.col("fetched").is_null() | (pl.col("fetched") <= pl.col("experts"))
    )


_PREDICTORS = {"transition_recall": "transition", "popularity_recall": "popularity", "mean_overlap": "previous"}
_RESTS = ("low", "high", "tokens", "sequences")
_CELL = {"expert": pl.Int64, "other": pl.Int64, "place": pl.Int64, "other_place": pl.Int64, "joint_tokens": pl.Int64}
_PAIRS = {**_CELL, "expected": pl.Float64, **dict.fromkeys(MEASURES, pl.Float64), "tokens": pl.Int64}
_TRANSITIONS = {**_CELL, "share": pl.Float64, "lift": pl.Float64, "tokens": pl.Int64}
_CO_ACTIVATIONS = {
    "layer": pl.Int32, "step": pl.Int32, "label": pl.String, "pairs": pl.Int64,
    **dict.fromkeys(("excess", "low", "high", "noise_low", "noise", "noise_high"), pl.Float64),
    "expert": pl.Int64, "other": pl.Int64, "joint_tokens": pl.Int64, "attraction": pl.Float64, "chance": pl.Float64,
    "tokens": pl.Int64,
}  # fmt: skip
_LOOKAHEAD = {
    "layer": pl.Int32, "step": pl.Int32, "distance": pl.Int64, "input": pl.String, "extra": pl.Int64,
    "value": pl.Float64, "exact": pl.Float64, "first_choice": pl.Float64, "cosine": pl.Float64, "tokens": pl.Int64,
}  # fmt: skip
