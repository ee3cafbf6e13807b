"""Super experts, by both published rules and over both populations of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

import store
from profiler.headline.subject import Rows, Subject, as_text
from profiler.metrics import super_experts


def super_expert_rows(subject: Subject) -> Rows:
    """Super experts by the paper's rule and by its code's, over all tokens and over first routed tokens.

    Rows with an expert are super experts; the row without one holds the larger threshold, which a value must exceed.
    """
    output = subject.run.table("expert_output")
    if output.is_empty():
        return []
    layers = sorted({layer.layer for layer in subject.run.layers})
    massive = _forming_layers(subject.run)
    rows: Rows = []
    for tokens, column in (("all", "output_max"), ("first_routed", "first_routed_output_max")):
        routed, shared = _maxima(output, layers, column, "routed"), _maxima(output, layers, column, "shared")
        common: dict[str, Any] = {"output_max": routed, "shared_output_max": shared, "layers": layers}
        if not np.isfinite(routed).any():
            continue
        verdicts = [super_experts.super_experts(**common, massive_layers=massive)]
        verdicts.append(super_experts.super_experts_code(**common, num_hidden_layers=subject.run.info.num_layers))
        for verdict in verdicts:
            place = {"metric": "super_experts", "parameters": as_text({"rule": verdict.rule, "tokens": tokens})}
            rows.append({**place, "value": max(verdict.percentile_threshold, verdict.max_threshold)})
            rows += [
                {**place, "layer": found.layer, "expert": found.expert, "value": found.value}
                if found.kind == "routed"
                else {**place, "layer": found.layer, "expert": -1 - found.expert, "value": found.value}
                for found in verdict.experts
            ]
    return rows


def _maxima(output: pl.DataFrame, layers: Sequence[int], column: str, kind: str) -> NDArray[np.float64]:
    """(layers, experts) largest value over domains and phases; NaN where an expert was never used."""
    part = output.filter((pl.col("kind") == kind) & pl.col(column).is_not_null())
    return super_experts.maxima_by_layer(
        layer=part["layer"].to_numpy(), expert=part["expert"].to_numpy(), value=part[column].to_numpy(), layers=layers
    )


def _forming_layers(run: store.Run) -> list[int] | None:
    """Decoder layers in which massive activations form; None where the residual stream was not watched."""
    frame = run.table("residual").filter(pl.col("absolute_max").is_not_null())
    if frame.is_empty():
        return None
    peaks = super_experts.residual_peaks(
        layer=frame["layer"], absolute_max=frame["absolute_max"], median_there=frame["median_there"]
    )
    return super_experts.forming_layers(**peaks)
