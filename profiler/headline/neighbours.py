"""How alike the mean outputs of experts of neighbouring MoE layers are."""

from __future__ import annotations

import numpy as np
import polars as pl
from numpy.typing import NDArray

import store
from profiler.headline.subject import SEED, Rows, Subject
from profiler.metrics import neighbours


def neighbour_rows(subject: Subject) -> Rows:
    """Similarity to the layer before, of every MoE layer but the first, beside its own layer and exchanged channels."""
    rows: Rows = []
    before: NDArray[np.float64] | None = None
    for layer in subject.run.layers:
        means = mean_outputs(subject.run, layer)
        if means is None:
            before = None
            continue
        if before is not None and before.shape[1] == means.shape[1]:
            order = np.random.default_rng(SEED).permutation(before.shape[1])
            found = {
                "observed": neighbours.neighbour_similarity(first=before, second=means),
                "shuffled": neighbours.neighbour_similarity(first=before[:, order], second=means),
                "within": neighbours.own_similarity(vectors=means),
            }
            place = {"metric": "neighbour_similarity", "layer": layer.layer, "step": layer.step}
            rows += [
                {**place, "control": control, "value": float(np.nanmean(values))}
                for control, values in found.items()
                if np.isfinite(values).any()
            ]
        before = means
    return rows


def mean_outputs(run: store.Run, layer: store.LayerInfo) -> NDArray[np.float64] | None:
    """(experts, d) mean output of each expert over its own tokens, before the gate weight; 0 of an unused one. None
    where the run does not hold them."""
    table = run.table("expert_vector", layer=layer.layer, columns=["tokens", "output_sum"])
    table = table.filter((pl.col("kind") == "routed") & (pl.col("step") == layer.step)).drop_nulls("output_sum")
    if table.is_empty():
        return None
    sums = np.array(table["output_sum"].to_list(), dtype=np.float64)
    means, tokens = np.zeros((layer.num_experts, sums.shape[1])), np.zeros(layer.num_experts)
    expert = table["expert"].to_numpy()
    np.add.at(means, expert, sums)
    np.add.at(tokens, expert, table["tokens"].to_numpy())
    return means / np.maximum(tokens, 1)[:, None]
