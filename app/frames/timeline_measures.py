"""What is followed over checkpoints: measures of collapse per layer of a run, each with its threshold and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.special import bdtr

import store
from app.frames.alerts import ACCIDENT, COLLAPSE, MAX_VIOLATION
from app.frames.axes import layer_label
from app.frames.load import NEARLY_DEAD
from profiler.metrics import load as formulas

SHARED_LOSS = 2.0
"""Load-balance loss, mean form, of a layer that uses half of its experts, evenly."""

UNDECIDED, CERTAIN = 0.98, 0.98
"""Entropy of the router over ln E above which it hardly prefers any expert; largest probability, mean over tokens,
above which it has no second choice."""


@dataclass(frozen=True)
class Measure:
    """What is followed over checkpoints.

    Attributes:
        title: its name.
        unit: with its range.
        worst: which end is the bad one.
        reason: where its threshold comes from, as a sentence.
        digits: as a format for one value.
    """

    title: str
    unit: str
    worst: Literal["high", "low"]
    reason: str
    digits: str = ".3f"

    @property
    def short(self) -> str:
        """Its name within a sentence."""
        name = self.title.partition(",")[0]
        return name if name == "MaxVio" else name[0].lower() + name[1:]


MEASURES = {
    "dead": Measure(
        "Dead experts", "experts without a token", "high",
        "One dead expert is over, where a balanced router leaves fewer than 0.05 unused by chance, E (1 - k/E)^N.",
        ".0f",
    ),
    "nearly_dead": Measure(
        "Nearly dead experts", f"experts below {NEARLY_DEAD:.0%} of the balanced load", "high",
        "One is over, where a balanced router has fewer than 0.05 such experts by chance (binomial).", ".0f",
    ),
    "max_violation": Measure(
        "MaxVio", "busiest expert over the mean, minus 1", "high",
        f"{MAX_VIOLATION:g}, as on Overview: the busiest expert takes more than {MAX_VIOLATION + 1:g} times the mean "
        "load. Ours; the measure is Wang et al.'s (arXiv 2408.15664).",
    ),
    "normalised_entropy": Measure(
        "Entropy of the load", "over ln E, 1 = even", "low",
        f"ln({COLLAPSE:g} k) / ln E, as on Overview: a layer below it uses fewer effective experts than {COLLAPSE:g} "
        "times what one token takes.",
    ),
    "balance_loss": Measure(
        "Load-balance loss, f against P", "E sum of f P over k, 1 = balanced", "high",
        f"{SHARED_LOSS:g}: what a layer has that uses half of its experts evenly. The loss is the Switch Transformer's "
        "(arXiv 2101.03961), per layer.",
    ),
    "correlation": Measure(
        "Correlation of f and P", "Pearson over the experts of a layer, -1 to 1", "high",
        "It has no threshold: experts that get more probability should get more tokens. With a large load-balance loss "
        "it says that probability and load concentrate on the same experts.",
    ),
    "router_entropy": Measure(
        "Entropy of the router", "mean over tokens, over ln E, 1 = undecided", "high",
        f"{UNDECIDED:g}: a router above it hardly prefers any expert, so that rounding decides. Ours.",
    ),
    "top_probability": Measure(
        "Largest router probability", "mean over tokens, 0 to 1, 1 = certain", "high",
        f"{CERTAIN:g}: a router above it is certain of one expert for nearly every token, and others get hardly any "
        "gradient. Ours.",
    ),
    "agreement": Measure(
        "Agreement with the last checkpoint", "share of experts in common (router saturation)", "low",
        "What shuffled tokens have in common, which use popular experts alone: at or below it a checkpoint routes as "
        "if it had never seen the last one's text.",
    ),
}  # fmt: skip
"""The measures in the order of the page."""

COLLAPSE_MEASURES = tuple(name for name in MEASURES if name != "agreement")
"""Those that a run has by itself; the runs need no common text."""

COUNTS = ("dead", "nearly_dead")
"""Measures that count experts."""

KEYS = {"layer": pl.Int32, "step": pl.Int32, "label": pl.String}
VALUES = {"measure": pl.String, "value": pl.Float64, "threshold": pl.Float64, "over": pl.Boolean}


def collapse(run: store.Run) -> pl.DataFrame:
    """One row per MoE layer and measure of :data:`COLLAPSE_MEASURES`.

    Columns: layer, step, label, measure, value, threshold, over. value is null where the run lacks what it needs; over
    means beyond the threshold and, of counted experts, that chance explains fewer than 0.05.
    """
    used, probability, routed = (run_sums(run)[name] for name in ("tokens", "probability", "routed"))
    rows: list[tuple[Any, ...]] = []
    for axis, layer in enumerate(run.layers):
        place = (layer.layer, layer.step, layer_label(layer.layer, layer.step))
        rows += [(*place, *row) for row in _layer(layer, used[axis], probability[axis], *routed[axis])]
    return pl.DataFrame(rows, schema={**KEYS, **VALUES}, orient="row")


def shares(run: store.Run, *, label: str) -> pl.DataFrame:
    """Load and probability of the experts of one layer: label, expert, load = E f / k, probability = E P.

    Both are 1 for a balanced router, and null where they are not known.
    """
    sums = run_sums(run)
    axis = [layer_label(layer.layer, layer.step) for layer in run.layers].index(label)
    used, probability, size = sums["tokens"][axis], sums["probability"][axis], run.layers[axis].num_experts
    tokens = sums["routed"][axis][1]
    return pl.DataFrame(
        {
            "label": [label] * size,
            "expert": range(size),
            "load": used * size / used.sum() if used.sum() else [None] * size,
            "probability": probability * size / tokens if tokens else [None] * size,
        },
        schema={"label": pl.String, "expert": pl.Int32, "load": pl.Float64, "probability": pl.Float64},
    ).fill_nan(None)


def run_sums(run: store.Run) -> dict[str, list[Any]]:
    """Per MoE layer: tokens (experts,) selections; probability (experts,) sums of router probability, NaN where unseen;
    routed = (tokens routed, tokens whose logits were seen, sums of their entropies in nats and of their largest
    probabilities)."""
    keys = ["layer", "step"]
    table = run.table("expert_load").filter(pl.col("kind") == "routed")
    seen = pl.when(pl.col("probability_sum").is_not_null().all()).then(pl.col("probability_sum").sum())
    per_expert = table.group_by([*keys, "expert"]).agg(pl.col("tokens").sum(), seen.alias("probability"))
    sums = ["tokens", "logit_tokens", "entropy_sum", "top_probability_sum"]
    router = run.table("router_load").group_by(keys).agg(pl.col(sums).sum())
    totals = {row[:2]: row[2:] for row in router.select(*keys, *sums).iter_rows()}
    parts = dict(iter(per_expert.group_by(keys)))
    result: dict[str, list[Any]] = {"tokens": [], "probability": [], "routed": []}
    for layer in run.layers:
        part = parts.get((layer.layer, layer.step), per_expert.clear())
        used, probability = np.zeros(layer.num_experts), np.full(layer.num_experts, np.nan)
        used[part["expert"].to_numpy()] = part["tokens"].to_numpy()
        probability[part["expert"].to_numpy()] = part["probability"].cast(pl.Float64).fill_null(float("nan")).to_numpy()
        routed, *others = totals.get((layer.layer, layer.step), (None, 0, 0.0, 0.0))
        result["tokens"].append(used)
        result["probability"].append(probability)
        result["routed"].append((routed or used.sum() / max(layer.top_k, 1), *(value or 0 for value in others)))
    return result


def _layer(
    layer: store.LayerInfo,
    used: NDArray[np.float64],
    probability: NDArray[np.float64],
    tokens: float,
    logits: int,
    entropy: float,
    top: float,
) -> list[tuple[str, float | None, float | None, bool]]:
    """measure, value, threshold, over of one layer."""
    experts, top_k = layer.num_experts, layer.top_k
    found: dict[str, tuple[float | None, float | None]] = dict.fromkeys(COLLAPSE_MEASURES, (None, None))
    counts = {"dead": 0.0, "nearly_dead": 0.0}
    if used.sum() and top_k:
        even = formulas.balance(load=used[None])
        dead = formulas.dead_experts(counts=used[None], top_k=top_k, tokens=tokens, threshold=NEARLY_DEAD)
        unused = int(dead.dead.sum())
        found["dead"] = (unused, 1.0)
        found["nearly_dead"] = (int(dead.nearly_dead.sum()) - unused, 1.0)
        counts = {"dead": float(dead.expected_dead[0]), "nearly_dead": expected_nearly_dead(experts, top_k, tokens)}
        found["max_violation"] = (float(even.max_violation[0]), MAX_VIOLATION)
        if experts > top_k:
            limit = float(np.log(min(COLLAPSE * top_k, experts)) / np.log(experts))
            found["normalised_entropy"] = (float(even.normalised_entropy[0]), limit)
        if logits and np.isfinite(probability).all():
            sums = probability * (tokens / logits)
            loss = formulas.load_balance_loss(
                counts=used[None], probability_sums=sums[None], tokens=tokens, top_k=top_k
            )  # fmt: skip
            found["balance_loss"] = (float(loss.mean_form[0]), SHARED_LOSS)
            found["correlation"] = (_pearson(used, probability), None)
    if logits and experts > 1:
        found["router_entropy"] = (float(entropy / logits / np.log(experts)), UNDECIDED)
        found["top_probability"] = (float(top / logits), CERTAIN)
    return [
        (name, value, threshold, _over(name, value, threshold) and counts.get(name, 0.0) < ACCIDENT)
        for name, (value, threshold) in found.items()
    ]


def _over(measure: str, value: float | None, threshold: float | None) -> bool:
    if value is None or threshold is None:
        return False
    if measure in COUNTS:
        return value >= threshold
    return value > threshold if MEASURES[measure].worst == "high" else value < threshold


def expected_nearly_dead(experts: int, top_k: int, tokens: float) -> float:
    """Experts of a balanced router that so many tokens leave nearly dead by chance, unused ones included: binomial."""
    part = top_k / experts
    below = np.ceil(NEARLY_DEAD * part * tokens) - 1
    return float(experts * bdtr(below, round(tokens), part) if below >= 0 else 0.0)


def _pearson(first: NDArray[np.float64], second: NDArray[np.float64]) -> float | None:
    """Pearson's correlation; None where one of them does not vary."""
    if not (first.std() > 0 and second.std() > 0):
        return None
    return float(np.corrcoef(first, second)[0, 1])
