"""How far the importance scores of a run agree: would two of them cut the same experts?

Scores that agree need not both be computed; where they disagree, the choice of a score is a decision, and the damage
measured after the cut has to make it.
"""

from __future__ import annotations

import numpy as np
import polars as pl

import store
from moescope.errors import PlanError
from planner.importance.entry import score
from planner.importance.registry import SCORES
from profiler.metrics.agreement import SHARES, Band, chance_band, score_agreement

_SCHEMA = {
    "layer": pl.Int32, "step": pl.Int32, "first": pl.String, "second": pl.String, "spearman": pl.Float64,
    "kendall": pl.Float64, "overlap_25": pl.Float64, "overlap_50": pl.Float64, "low": pl.Float64, "high": pl.Float64,
    "experts": pl.Int64,
}  # fmt: skip


def expert_scores(run: store.Run, *, domain: str | None = None) -> pl.DataFrame:
    """Every score of whole experts that the run can give: layer, step, expert, and a column per score.

    Routed experts that hold weights; those that no token used count as 0. Scores whose level was not recorded are left
    out.
    """
    frames: list[pl.DataFrame] = []
    for one in SCORES:
        if one.granularity != "expert":
            continue
        try:
            values = score(run, one.name, domain=domain)
        except PlanError:
            continue
        routed = values.filter(pl.col("kind") == "routed").select("layer", "step", "expert", "value")
        frames.append(routed.rename({"value": one.name}))
    if not frames:
        return pl.DataFrame(schema={"layer": pl.Int32, "step": pl.Int32, "expert": pl.Int32})
    result = frames[0]
    for frame in frames[1:]:
        result = result.join(frame, on=["layer", "step", "expert"], how="left")
    return result.sort("layer", "step", "expert")


def agreement(run: store.Run, *, domain: str | None = None) -> pl.DataFrame:
    """Agreement of all pairs of scores: with layer null, averaged over the layers; then layer by layer.

    Columns: layer, step, first, second; spearman, kendall (tau-b), -1..1; overlap_25, overlap_50 = part of the experts
    in the lowest quarter and half that both would cut, 0..1, by chance 0.25 and 0.5; low, high = what 95 % of random
    rankings give for spearman; experts. Null where a score is the same for all experts of a layer, or not a number.
    """
    scores = expert_scores(run, domain=domain)
    names = scores.columns[3:]
    pairs = [(i, j) for i in range(len(names)) for j in range(i + 1, len(names))]
    rows: list[tuple[object, ...]] = []
    layers: list[np.ndarray] = []
    sizes: list[int] = []
    bands: dict[int, Band] = {}  # by the number of experts
    for (layer, step), part in scores.group_by("layer", "step", maintain_order=True):
        if len(part) < 2 or not pairs:
            continue
        values = part.select(names).to_numpy().T
        unknown = np.isnan(values).any(axis=1)  # a sum that ran over in the model's type
        measured = score_agreement(scores=np.where(unknown[:, None], 0.0, values), shares=SHARES)
        table = np.stack([measured.spearman, measured.kendall, *measured.overlap])
        table[:, unknown] = table[:, :, unknown] = np.nan
        if len(part) not in bands:
            bands[len(part)] = chance_band(num_experts=[len(part)], measure="spearman", num_draws=400)
        band = bands[len(part)]
        layers.append(table)
        sizes.append(len(part))
        rows += [
            (layer, step, names[i], names[j], *table[:, i, j].tolist(), band.low, band.high, len(part))
            for i, j in pairs
        ]
    if layers:
        band = chance_band(num_experts=sizes, measure="spearman", num_draws=400)
        known = np.isfinite(layers)
        with np.errstate(invalid="ignore"):
            mean = np.where(known, layers, 0.0).sum(0) / known.sum(0)
        rows = [
            (None, None, names[i], names[j], *mean[:, i, j].tolist(), band.low, band.high, sum(sizes)) for i, j in pairs
        ] + rows
    return pl.DataFrame(rows, schema=_SCHEMA, orient="row").fill_nan(None)
