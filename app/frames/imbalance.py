"""Load against the router's probability: does the balance loss see what is uneven?"""

from __future__ import annotations

import numpy as np
import polars as pl

import store
from app.frames.axes import LAYER_COLUMNS, layer_label
from app.frames.timeline_measures import run_sums
from profiler.metrics import imbalance as formulas
from profiler.metrics import load

UNEVEN = 1.0
"""A layer is unbalanced where its busiest expert takes more than twice the mean load ..."""

BEYOND_NOISE = 3.0
"""... and the load varies so many times as much as chance explains."""

UNSEEN = 0.25
"""The loss does not see an imbalance of which the probabilities share less than this part."""

_SCHEMA = {
    **LAYER_COLUMNS, "num_experts": pl.Int32, "top_k": pl.Int32, "load_cv": pl.Float64, "noise_cv": pl.Float64,
    "probability_cv": pl.Float64, "max_violation": pl.Float64, "loss": pl.Float64, "seen": pl.Float64,
    "unseen_imbalance": pl.Boolean, "tokens": pl.Float64,
}  # fmt: skip
_EXPERTS = {**LAYER_COLUMNS, "expert": pl.Int32, "load": pl.Float64, "probability": pl.Float64}


def experts(run: store.Run) -> pl.DataFrame:
    """One row per expert of every layer whose router probabilities were seen.

    Columns: layer, step, label, expert; load = E f / k and probability = E P, both 1 on average.
    """
    sums = run_sums(run)
    parts = [pl.DataFrame(schema=_EXPERTS)]
    for layer, used, probability in zip(run.layers, sums["tokens"], sums["probability"], strict=True):
        if not used.sum() or not np.isfinite(probability).all() or not probability.sum():
            continue
        place = {"layer": layer.layer, "step": layer.step, "label": layer_label(layer.layer, layer.step)}
        columns = {
            "expert": range(layer.num_experts),
            "load": used / used.mean(),
            "probability": probability / probability.mean(),
        }
        frame = pl.DataFrame(columns).with_columns(**{name: pl.lit(value) for name, value in place.items()})
        parts.append(frame.select([pl.col(name).cast(kind) for name, kind in _EXPERTS.items()]))
    return pl.concat(parts)


def spreads(run: store.Run) -> pl.DataFrame:
    """One row per MoE layer whose router probabilities were seen: how uneven load f and probability P are.

    Columns: layer, step, label, num_experts, top_k; load_cv, probability_cv = coefficients of variation over the
    experts; noise_cv = of a balanced router on as few tokens; max_violation; loss = load-balance loss, mean form, 1 =
    satisfied; seen = part of the imbalance that the probabilities share; unseen_imbalance = the load is uneven and
    the loss hardly sees it; tokens.
    """
    sums = run_sums(run)
    rows = []
    for layer, used, probability, (tokens, logits, *_) in zip(
        run.layers, sums["tokens"], sums["probability"], sums["routed"], strict=True
    ):
        if not used.sum() or not logits or not np.isfinite(probability).all() or layer.num_experts < 2:
            continue
        even = load.balance(load=used[None])
        noise = load.noise_cv(num_experts=layer.num_experts, top_k=max(layer.top_k, 1), tokens=max(tokens, 1.0))
        found = load.load_balance_loss(
            counts=used[None], probability_sums=probability[None] * (tokens / logits), tokens=tokens,
            top_k=max(layer.top_k, 1),
        )  # fmt: skip
        spread = float(formulas.probability_cv(probability_sums=probability[None])[0])
        seen = float(formulas.seen_imbalance(counts=used[None], probability_sums=probability[None])[0])
        cv, violation = float(even.cv[0]), float(even.max_violation[0])
        hidden = violation > UNEVEN and cv > BEYOND_NOISE * float(noise) and seen < UNSEEN
        rows.append(
            (layer.layer, layer.step, layer_label(layer.layer, layer.step), layer.num_experts, layer.top_k, cv,
             float(noise), spread, violation, float(found.mean_form[0]), seen, hidden, float(tokens))
        )  # fmt: skip
    return pl.DataFrame(rows, schema=_SCHEMA, orient="row").fill_nan(None)
