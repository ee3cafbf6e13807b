"""Other routing, tried on a run's trace: curves over the values of a method, layers, loads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl

import store
from app.frames.axes import layer_label
from planner.simulate.what_if import METHODS, Method, Refused, WhatIf, method_named, refusal, what_if
from planner.simulate.what_if.blocks import Subject

FIRST_LOOK = 1_000_000
"""Token-layers that are read first; all of them only when asked for."""

STEPS = tuple(round(0.05 * step, 2) for step in range(1, 20))
VALUES: dict[str, tuple[float, ...]] = {
    "top_p": (*STEPS, 0.99), "ratio": STEPS, "tiers": (0.0, *STEPS),
    "odp": (0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 1.75, 2.0),
    "threshold": (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5),
}  # fmt: skip
"""Finer than what methods try by themselves, for the slider: one sort gives all of them."""

FITTED: dict[str, tuple[str, str, str]] = {
    "odp": ("ratio", "Ratio skipping by layer (ODP)", "multiple of each layer's median (ODP: 1)"),
    "null_left": ("null_experts", "Null experts, so many left", "mean experts left in each layer"),
}
"""Methods whose value is found layer by layer, on every other sequence: the method that they rest on, title, and what
their values are."""

CURVES = ("top_p", "ratio", "odp", "threshold", "null_experts", "null_left", "top_k")
"""Methods that change how many experts a token uses."""

KEPT = 0.95
"""Of the gate weight: the first value that is shown is the one with the fewest experts that keeps so much."""

Bias = tuple[tuple[tuple[int, int], tuple[float, ...]], ...]
"""((layer, step), one number per expert), so that it can be a key."""


def limit_of(run: store.Run, whole: bool) -> int | None:
    """Tokens that a look rests on; None = all."""
    return None if whole else max(FIRST_LOOK // max(len(run.layers), 1), 1)


def found(
    run: store.Run,
    *,
    method: str,
    values: tuple[float, ...] | None = None,
    weights: str = "renormalized",
    domain: str | None = None,
    whole: bool = False,
    layers: tuple[int, ...] | None = None,
    bias: Bias | None = None,
    **options: Any,
) -> WhatIf:
    """What the method makes of the trace, at all values that are tried.

    Raises:
        Refused: it makes no sense on this run, or the run lacks the data.
    """
    more: dict[str, Any] = {} if bias is None else {"bias": {key: np.array(row) for key, row in bias}}
    given = VALUES.get(method) if values is None else values
    if method in FITTED:
        method, options = FITTED[method][0], options | {"fitted": True}
    return what_if(
        run, method, values=None if given is None else list(given), weights=weights,  # type: ignore[arg-type]
        domain=domain, limit_tokens=limit_of(run, whole), layers=None if layers is None else list(layers),
        **more, **options,
    )  # fmt: skip


def methods(run: store.Run) -> pl.DataFrame:
    """One row per method: name, title, source, rule, certainty, here (bool), and missing = why it is not shown."""
    rows = []
    for one in METHODS:
        reason = refusal(run, one.name)
        for each in (one, *(about(name) for name, (base, _, _) in FITTED.items() if base == one.name)):
            rows.append((each.name, each.title, one.source, one.rule, one.certainty, reason is None, reason))
    names = ("name", "title", "source", "rule", "certainty", "here", "missing")
    schema = {name: pl.Boolean if name == "here" else pl.String for name in names}
    return pl.DataFrame(rows, schema=schema, orient="row")


def about(name: str) -> Method:
    """A method by its name, those of :data:`FITTED` among them."""
    if name not in FITTED:
        return method_named(name)
    base, title, value = FITTED[name]
    return replace(method_named(base), name=name, title=title, value=value)


def as_rule(result: WhatIf, method: str, value: float) -> dict[str, Any]:
    """A method at one value as :func:`app.frames.what_if_plan.made` takes it: found layer by layer for those of
    :data:`FITTED`."""
    if method not in FITTED:
        return {"rule": method, "value": value}
    at = place_of(result, value)
    values = tuple(zip(result.layers, map(float, result.layer_values[at]), strict=True))
    return {"rule": FITTED[method][0], "values": values, "found_by": method}


def labels(run: store.Run) -> list[str]:
    """The names of the layers."""
    return [layer_label(one.layer, one.step) for one in run.layers]


def curve(result: WhatIf) -> pl.DataFrame:
    """One row per value, over all layers: value, mean_active, p50, p95, kept_mass, flops_share, changed_tokens,
    changed_selections, load_cv, load_peak, known, certainty; and the same before: before_active, before_cv,
    before_peak, before_mass."""
    tokens = result.tokens
    rows: dict[str, Any] = {"value": result.values}
    for name in ("mean_active", "kept_mass", "flops_share", "changed_tokens", "changed_selections", "load_cv",
                 "load_peak", "known"):  # fmt: skip
        rows[name] = result.pooled(name)
    rows["p50"], rows["p95"] = result.pooled_quantile(0.5), result.pooled_quantile(0.95)
    rows["certainty"] = list(result.certainties)
    for name, values in (
        ("before_active", result.mean_active_before), ("before_cv", result.load_cv_before),
        ("before_peak", result.load_peak_before), ("before_mass", result.kept_mass_before),
    ):  # fmt: skip
        rows[name] = np.full(len(result.values), _mean(values, tokens))
    for name in result.figures:
        rows[name] = result.pooled(name)
    return pl.DataFrame(rows).fill_nan(None)


def layers(result: WhatIf, value: float) -> pl.DataFrame:
    """One row per layer at one value: layer, step, label, num_experts, tokens, layer_value, mean_active, p50, p95,
    kept_mass, flops_share, changed_tokens, load_cv, load_peak, known, and before_active, before_cv, before_peak."""
    at = place_of(result, value)
    keys = result.layers
    rows: dict[str, Any] = {
        "layer": [key[0] for key in keys], "step": [key[1] for key in keys],
        "label": [layer_label(*key) for key in keys], "num_experts": result.num_experts,
        "tokens": result.tokens, "layer_value": result.layer_values[at],
        "p50": result.p50_active[at], "p95": result.p95_active[at],
    }  # fmt: skip
    for name in ("mean_active", "kept_mass", "flops_share", "changed_tokens", "load_cv", "load_peak", "known"):
        rows[name] = getattr(result, name)[at]
    rows["before_active"], rows["before_cv"] = result.mean_active_before, result.load_cv_before
    rows["before_peak"] = result.load_peak_before
    for name, values in result.figures.items():
        rows[name] = values[at]
    return pl.DataFrame(rows).fill_nan(None)


def by_value(result: WhatIf) -> pl.DataFrame:
    """One row per value and layer: layer, step, label, value, mean_active, kept_mass."""
    count, keys = len(result.values), result.layers
    grid: dict[str, Any] = {
        "layer": [key[0] for key in keys] * count, "step": [key[1] for key in keys] * count,
        "label": [layer_label(*key) for key in keys] * count, "value": np.repeat(result.values, len(keys)),
        "mean_active": result.mean_active.ravel(), "kept_mass": result.kept_mass.ravel(),
    }  # fmt: skip
    return pl.DataFrame(grid).fill_nan(None)


def loads(result: WhatIf, value: float) -> pl.DataFrame:
    """One row per expert of every layer at one value: layer, step, label, expert, before and after (tokens),
    before_share and after_share of the layer's tokens, change = difference of both."""
    at, rows = place_of(result, value), []
    for axis, (layer, step) in enumerate(result.layers):
        tokens = max(int(result.tokens[axis]), 1)
        for expert in range(int(result.num_experts[axis])):
            before, after = int(result.load_before[axis, expert]), int(result.load[at, axis, expert])
            rows.append((layer, step, layer_label(layer, step), expert, before, after, before / tokens, after / tokens))
    names = ("layer", "step", "label", "expert", "before", "after", "before_share", "after_share")
    frame = pl.DataFrame(rows, schema=list(names), orient="row")
    return frame.with_columns((pl.col("after_share") - pl.col("before_share")).alias("change"))


def fixed(
    run: store.Run, *, domain: str | None = None, whole: bool = False, by_probability: bool, scored: bool = False,
    layers: tuple[int, ...] | None = None,
) -> pl.DataFrame:  # fmt: skip
    """A fixed number of experts for every token: one row per k with mean_active and kept_mass, of router probability,
    or of the gate weight of the token's own choice; ``scored``: of tokens with router scores alone."""
    if by_probability:
        top_k = found(run, method="top_k", domain=domain, whole=whole, layers=layers)
        return curve(top_k).select("mean_active", "kept_mass")
    subject = Subject.of(run, scored=scored, domain=domain, layers=layers, limit_tokens=limit_of(run, whole))
    most = max(one.info.top_k for one in subject.layers)
    kept, active, tokens = np.zeros(most), np.zeros(most), 0
    for layer in subject.layers:
        for block in subject.blocks(layer):
            mass = np.cumsum(block.shares, axis=1)
            rows = np.minimum(np.arange(most), mass.shape[1] - 1)
            kept += mass[:, rows].sum(0)
            active += np.minimum(block.own[:, None], np.arange(1, most + 1)).sum(0)
            tokens += len(mass)
    return pl.DataFrame({"mean_active": active / max(tokens, 1), "kept_mass": kept / max(tokens, 1)})


def at_mean(frame: pl.DataFrame, mean: float) -> float | None:
    """Kept mass of a fixed number of experts at a mean between two of them; None beyond what :func:`fixed` has."""
    known = frame.drop_nulls().sort("mean_active")
    active, mass = known["mean_active"].to_numpy(), known["kept_mass"].to_numpy()
    if not len(active) or not active[0] - 1e-9 <= mean <= active[-1] + 1e-9:
        return None
    return float(np.interp(mean, active, mass))


def proposed(frame: pl.DataFrame) -> float:
    """The value with the fewest experts that keeps :data:`KEPT` of the mass; of none, the one that keeps most."""
    known = frame.drop_nulls("kept_mass")
    if known.is_empty():
        return float(frame["value"][len(frame) // 2])
    enough = known.filter(pl.col("kept_mass") >= KEPT * pl.col("before_mass")).sort("mean_active", "value")
    return float(enough["value"][0] if len(enough) else known.sort("kept_mass")["value"][-1])


def place_of(result: WhatIf, value: float) -> int:
    """Where the value nearest to one that was asked for stands."""
    return int(np.argmin(np.abs(result.values - value)))


def tokens_of(result: WhatIf) -> str:
    """On how many tokens a result rests, in words."""
    least, most = int(result.tokens.min()), int(result.tokens.max())
    said = f"{most:,}" if least == most else f"{least:,} to {most:,}"
    part = f" of {result.run_tokens:,}" if most < result.run_tokens else ""
    return f"{said}{part} tokens per layer"


def _mean(values: Sequence[float] | Any, weights: Any) -> float:
    known = np.isfinite(values) & (np.asarray(weights) > 0)
    return float(np.average(np.asarray(values)[known], weights=np.asarray(weights)[known])) if known.any() else np.nan


__all__ = ["CURVES", "METHODS", "Refused", "WhatIf", "method_named"]
