"""What an ablation says: a verdict in one sentence, and the JSON document that is kept of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

from profiler import evaluate
from profiler.ablation.experts import Expert
from profiler.ablation.measure import Ablation, Pass
from profiler.metrics.perplexity import Estimate, sink_decay
from profiler.metrics.super_experts import massive_activation_layers
from store.evaluations import VERSION, Document, number_or_none


@dataclass(frozen=True)
class Verdict:
    """Whether the chosen experts matter more than others.

    Attributes:
        more_than_controls: True or False; None where it cannot be said.
        against_worst: perplexity over that of the control that did the most harm, with the interval of the pairs.
        sentence: the verdict in words.
    """

    more_than_controls: bool | None
    against_worst: Estimate | None
    sentence: str


def verdict(ablation: Ablation) -> Verdict:
    """Yes where the perplexity is above that of every control, by the whole interval of the paired ratio."""
    count, change = len(ablation.experts), ablation.ablated.ratio
    what = f"switching off {count} expert{'s' if count > 1 else ''} multiplies the perplexity by {_interval(change)}"
    if not ablation.controls:
        return Verdict(None, None, f"Not judged: {what}, and there is no control to compare with.")
    worst = max(ablation.controls, key=lambda control: control.perplexity.value)
    against = evaluate.ratio(ablation.ablated.perplexity, worst.perplexity)
    others = f"{len(ablation.controls)} controls (at most x {worst.ratio.value:.4g})"
    if math.isnan(against.low):
        return Verdict(None, against, f"Not judged: {what}, but one sequence has no interval; give more text.")
    if against.low > 1.0:
        return Verdict(True, against, f"Yes: {what}, more than any of the {others}.")
    return Verdict(False, against, f"No: {what}, not clearly more than the {others}.")


def layer_table(ablation: Ablation) -> pl.DataFrame:
    """One row per decoder layer: sinks and residual stream, as they are and with the chosen experts switched off.

    Columns: layer; sink, sink_ablated: mean attention on position 0 over heads and queries; sink_decay: D_sink;
    control_sink_decay: the largest D_sink of any control (all four null without softmax attention); residual_max,
    residual_max_ablated: largest |hidden state| after the layer; massive, massive_ablated: whether that is a massive
    activation; channel: where the largest stands as the model is.
    """
    residual = _residual(ablation.base.outliers.residual).join(
        _residual(ablation.ablated.outliers.residual).drop("channel"), on="layer", how="left", suffix="_ablated"
    )
    decay = sink_decays(ablation, ablation.ablated).join(_sinks(ablation.base).rename({"mean": "sink"}), on="layer")
    decay = decay.join(_sinks(ablation.ablated).rename({"mean": "sink_ablated"}), on="layer")
    of_controls = [sink_decays(ablation, control) for control in ablation.controls]
    largest = (
        pl.concat([*of_controls, decay.select("layer", "sink_decay").clear()])
        .group_by("layer")
        .agg(pl.max("sink_decay"))
    )
    decay = decay.join(largest.rename({"sink_decay": "control_sink_decay"}), on="layer", how="left")
    columns = ["layer", "sink", "sink_ablated", "sink_decay", "control_sink_decay"]
    return residual.join(decay.select(columns), on="layer", how="left").sort("layer")


def sink_decays(ablation: Ablation, one: Pass) -> pl.DataFrame:
    """(layers with softmax attention,) layer and sink_decay of one pass against the model as it is."""
    pairs = ablation.base.outliers.attention.join(one.outliers.attention, on="layer", suffix="_after")
    rows = [
        (row["layer"], sink_decay(sink_sum=row["sink_sum_after"], base_sink_sum=row["sink_sum"]))
        for row in pairs.iter_rows(named=True)
    ]
    return pl.DataFrame(rows, schema={"layer": pl.Int64, "sink_decay": pl.Float64}, orient="row")


def document(ablation: Ablation, *, model: Mapping[str, Any], data: Mapping[str, Any]) -> Document:
    """The ablation as a JSON document of kind ``ablation``; intervals and sinks that do not exist are null.

    Args:
        ablation: what was measured.
        model: what names the model, such as its name and fingerprint.
        data: what describes the text.
    """
    found = verdict(ablation)
    against = None if found.against_worst is None else _estimate(found.against_worst)
    layers = [{name: _plain(value) for name, value in row.items()} for row in layer_table(ablation).to_dicts()]
    return {
        "kind": "ablation",
        "version": VERSION,
        "model": dict(model),
        "experts": [_expert(expert) for expert in ablation.experts],
        "data": dict(data),
        "base": _pass(ablation, ablation.base),
        "ablated": _pass(ablation, ablation.ablated),
        "controls": [_pass(ablation, control) for control in ablation.controls],
        "layers": layers,
        "verdict": {
            "more_than_controls": found.more_than_controls,
            "against_worst": against,
            "sentence": found.sentence,
        },
        "notes": list(ablation.notes),
    }


def _pass(ablation: Ablation, one: Pass) -> Document:
    found, decay = one.perplexity, sink_decays(ablation, one)["sink_decay"]
    return {
        "name": one.name,
        "seed": one.seed,
        "experts": [_expert(expert) for expert in one.experts],
        "perplexity": {**_estimate(found), "tokens": found.tokens, "sequences": len(found.sequences)},
        "ratio": _estimate(one.ratio),
        "sink_decay": _plain(decay.fill_nan(None).mean()),
        "residual_max": _plain(one.outliers.residual["absolute_max"].max()),
        "per_domain": {name: {**_estimate(part), "tokens": part.tokens} for name, part in found.per_domain.items()},
    }


def _estimate(found: Estimate | evaluate.Perplexity) -> Document:
    return {name: number_or_none(getattr(found, name)) for name in ("value", "low", "high")}


def _expert(expert: Expert) -> Document:
    return {"layer": expert.layer, "step": expert.step, "kind": expert.kind, "expert": expert.expert}


def _plain(value: Any) -> Any:
    return number_or_none(value) if isinstance(value, float) else value


def _residual(table: pl.DataFrame) -> pl.DataFrame:
    """(decoder layers,) the largest hidden state after each layer, and whether it is massive."""
    massive = massive_activation_layers(
        residual_max=table["absolute_max"].to_numpy(),
        residual_median=table["median_there"].to_numpy(),
        layers=table["layer"].to_list(),
    )
    return table.select(
        pl.col("layer").cast(pl.Int64),
        pl.col("absolute_max").alias("residual_max"),
        pl.col("layer").is_in(massive).alias("massive"),
        pl.col("channel").cast(pl.Int64),
    )


def _sinks(one: Pass) -> pl.DataFrame:
    """(layers with softmax attention,) mean attention on position 0 over heads and queries."""
    sink = pl.col("sink_sum").list.mean() / pl.col("queries")
    return one.outliers.attention.select(pl.col("layer").cast(pl.Int64), sink.alias("mean"))


def _interval(found: Estimate) -> str:
    ends = "" if math.isnan(found.low) else f" (95 % interval {found.low:.4g} to {found.high:.4g})"
    return f"{found.value:.4g}{ends}"
