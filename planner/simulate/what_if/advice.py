"""Which statistic of a run recommends what, as plain rows; only where the run has the data.

Where a threshold is not published, it is a choice of this project; it stands in the row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import polars as pl

import store
from moescope.errors import InputError
from planner.importance.camera import camera
from planner.importance.statistics import NEURON, Statistics
from planner.simulate.what_if import fitting
from planner.simulate.what_if.blocks import Subject
from planner.simulate.what_if.trial import what_if
from profiler.metrics._arrays import FloatArray

READ_TOKENS = 16_384
"""Tokens of the trace that are read at most, evenly spread."""

_KEY = ("layer", "step")


@dataclass(frozen=True)
class Advice:
    """One statistic and what follows from it.

    Attributes:
        name: of the statistic, as a word.
        statistic: what was looked at, in words; over layers it is a mean, if nothing else is said.
        observed: its value.
        text: the value with its unit, as people read it.
        threshold: where it turns.
        holds: whether the value is on the side on which the rest follows.
        suggest: what is then worth trying.
        avoid: what is then not; empty where nothing is.
    """

    name: str
    statistic: str
    observed: float
    text: str
    threshold: str
    holds: bool
    suggest: str
    avoid: str


def advice(run: store.Run) -> list[Advice]:
    """The rows for which the run holds the data, in the order of the table in ``docs/what-if.md``."""
    found = []
    for row in _ROWS:
        try:
            one = row(run)
        except InputError:  # the run lacks the data
            continue
        if one is not None and np.isfinite(one.observed):
            found.append(one)
    return found


def _one_expert(run: store.Run) -> Advice | None:
    most = max((layer.top_k for layer in run.layers), default=0)
    if not most:
        return None
    return Advice(
        "top_k", "experts per token, in the layer with most", most, f"{most}", "1", most == 1,
        "width allocation, expert pruning", "any skipping, top-p, tiers",
    )  # fmt: skip


def _second_weight(run: store.Run) -> Advice | None:
    if "weights" in run.omissions or not _several(run):
        return None
    subject = Subject.of(run, scored=False, domain=None, layers=None, limit_tokens=READ_TOKENS)
    medians = [fitting.median_ratio(subject, layer) for layer in subject.layers if layer.info.top_k > 1]
    known = [one for one in medians if np.isfinite(one)]
    if not known:  # all gate weights are 0, or no token has a second expert
        return None
    value = float(np.mean(known))
    return Advice(
        "weight_ratio", "median of second over first gate weight", value, f"{value:.2f}", "below 0.5", value < 0.5,
        "ratio skipping (ODP, NAEE), HOBBIT tiers", "",
    )  # fmt: skip


def _needed_mass(run: store.Run) -> Advice | None:
    if not run.has_scores or not _several(run):
        return None
    tried = what_if(run, "top_p", values=[0.95], limit_tokens=READ_TOKENS)
    value, own = (
        float(tried.pooled("mean_active")[0]),
        float(np.average(tried.mean_active_before, weights=tried.tokens)),
    )
    at_least = "at least " if tried.certainty == "needs a live run" else ""
    return Advice(
        "mass_95", "experts that hold 95 % of the router's probability", value, f"{at_least}{value:.1f}",
        f"below k = {own:.1f}", value < own, "top-p routing, null experts (AdaMoE, MoE++)", "",
    )  # fmt: skip


def _flat(run: store.Run) -> Advice | None:
    share = _router(run, "entropy_sum", per=lambda layer: float(np.log(max(layer.num_experts, 2))))
    if share is None:
        return None
    return Advice(
        "entropy", "entropy of the router's probability over log E", share, f"{share:.2f}", "above 0.9", share > 0.9,
        "", "top-p routing: on a flat router it takes nearly all experts",
    )  # fmt: skip


def _outside(run: store.Run) -> Advice | None:
    inside = _router(run, "selected_probability_sum")
    if inside is None:
        return None
    return Advice(
        "outside_mass", "router probability outside of the choice", 1 - inside, f"{1 - inside:.0%}", "above 40 %",
        inside < 0.6, "a larger k, self-contrast (SCMoE), search over k (DES)", "skipping",
    )  # fmt: skip


def _margin(run: store.Run) -> Advice | None:
    bins = run.table("router_histogram").filter(pl.col("quantity") == "boundary_margin")
    total = int(bins["tokens"].to_numpy().sum())
    if not total:
        return None
    share = float(bins.filter(pl.col("upper") <= 0.1)["tokens"].to_numpy().sum() / total)
    return Advice(
        "margin", "tokens whose last expert leads the next by less than 0.1 logits", share, f"{share:.0%}",
        "above 25 %", share > 0.25, "additive rerouting; a router kept at 8 bits or more",
        "a quantized router",
    )  # fmt: skip


def _loads(run: store.Run) -> tuple[float, float]:
    """Coefficients of variation of load and of mean router probability over experts, means over layers."""
    frame = run.table("expert_load").filter(pl.col("kind") == "routed")
    load, mass = [], []
    for layer in run.layers:
        part = frame.filter((pl.col("layer") == layer.layer) & (pl.col("step") == layer.step))
        if part.is_empty():
            continue
        load.append(_variation(_by_expert(part, "tokens", layer.num_experts)))
        if part["probability_sum"].null_count() == 0:
            mass.append(_variation(_by_expert(part, "probability_sum", layer.num_experts)))
    return float(np.mean(load)) if load else float("nan"), float(np.mean(mass)) if mass else float("nan")


def _skewed(run: store.Run) -> Advice | None:
    load, mass = _loads(run)
    if not np.isfinite(mass):
        return None
    return Advice(
        "skew", "coefficient of variation of the load, beside that of the mean router probability", load,
        f"{load:.2f} beside {mass:.2f}", "load above 0.5, probability below half of it", load > 0.5 and mass < load / 2,
        "the Sinkhorn view, replicas, placement", "widths by frequency alone",
    )  # fmt: skip


def _even(run: store.Run) -> Advice | None:
    load, _ = _loads(run)
    return Advice(
        "load", "coefficient of variation of the load", load, f"{load:.2f}", "below 0.25", load < 0.25,
        "widths by measured error (PMQ without frequency)", "widths by frequency alone",
    )  # fmt: skip


def _coverage(run: store.Run) -> Advice | None:
    frame = run.table("expert_load").filter(pl.col("kind") == "routed")
    least, experts = 0, 0
    for layer in run.layers:
        part = frame.filter((pl.col("layer") == layer.layer) & (pl.col("step") == layer.step))
        counts = _by_expert(part, "tokens", layer.num_experts)
        least += int((counts < 0.5 * counts.mean()).sum()) if counts.sum() else 0
        experts += len(counts) if counts.sum() else 0
    if not experts:
        return None
    return Advice(
        "coverage", "experts with less than half of an even share of the tokens", least / experts,
        f"{least} of {experts}", "any", least > 0, "more or targeted calibration text before GPTQ or AutoRound;"
        " rounding to nearest for those experts", "trusting the measured error of those experts",
    )  # fmt: skip


def _memory(run: store.Run) -> Advice | None:
    every = run.metrics("transition_information").filter(
        (pl.col("parameters") == '{"distance": 1}') & pl.col("domain").is_null()
    )
    # What shuffled tokens tell is what few tokens make of nothing.
    chance = every.filter(pl.col("control") == "shuffled").select(*_KEY, pl.col("value").alias("chance"))
    rows = every.filter(pl.col("control") == "observed").join(chance, on=_KEY, how="left")
    frame = run.table("expert_load").filter(pl.col("kind") == "routed")
    shares = []
    for row in rows.iter_rows(named=True):
        part = frame.filter((pl.col("layer") == row["layer"]) & (pl.col("step") == row["step"]))
        counts = part.group_by("expert").agg(pl.col("tokens").sum())["tokens"].to_numpy().astype(np.float64)
        share = counts[counts > 0] / max(counts.sum(), 1.0)
        entropy = float(-(share * np.log2(share)).sum())
        if entropy > 0:
            shares.append(max(row["value"] - (row["chance"] or 0.0), 0.0) / entropy)
    value = float(np.mean(shares)) if shares else float("nan")
    return Advice(
        "memory", "share of a layer's bits that the MoE layer before tells, beyond chance", value, f"{value:.0%}",
        "above 25 %", value > 0.25, "prefetching by a transition table; a recurrent router", "",
    )  # fmt: skip


def _channels(run: store.Run) -> Advice | None:
    energy = camera(Statistics(run, level="activations"), alpha=0.0)
    keys = [key for key in NEURON if key != "neuron"]
    ranked = energy.with_columns(
        rank=pl.col("value").rank("ordinal", descending=True).over(keys), width=pl.len().over(keys)
    )
    top = float(ranked.filter(pl.col("rank") <= (pl.col("width") / 4).ceil())["value"].to_numpy().sum())
    total = float(energy["value"].to_numpy().sum())
    value = float(top / total) if total else float("nan")
    return Advice(
        "channels", "energy on the quarter of each expert's channels that has most", value, f"{value:.0%}",
        "above 75 %", value > 0.75, "pruning of channels (CAMERA-P)", "dropping whole experts",
    )  # fmt: skip


_ROWS: tuple[Callable[[store.Run], Advice | None], ...] = (
    _one_expert, _second_weight, _needed_mass, _flat, _outside, _margin, _skewed, _even, _coverage, _memory, _channels,
)  # fmt: skip


def _several(run: store.Run) -> bool:
    return any(layer.top_k > 1 for layer in run.layers)


def _router(run: store.Run, column: str, *, per: Callable[[store.LayerInfo], float] | None = None) -> float | None:
    """Mean over tokens of a sum of ``router_load``, mean over layers, over what ``per`` says of the layer."""
    table = run.table("router_load").group_by(_KEY).agg(pl.col("logit_tokens", column).sum())
    layers = {(layer.layer, layer.step): layer for layer in run.layers}
    values = [
        total / tokens / (per(layers[layer, step]) if per is not None else 1.0)
        for layer, step, tokens, total in table.iter_rows()
        if tokens and total is not None and (layer, step) in layers
    ]
    return float(np.mean(values)) if values else None


def _by_expert(part: pl.DataFrame, column: str, experts: int) -> FloatArray:
    """(E,) sums over domains and phases."""
    ids, values = part["expert"].to_numpy(), part[column].cast(pl.Float64).to_numpy()
    return np.bincount(ids, values, minlength=experts)[:experts].astype(np.float64)


def _variation(values: FloatArray) -> float:
    mean = float(values.mean())
    return float(values.std() / mean) if mean else float("nan")
