"""A plan that changes routing, as tables and titles."""

from __future__ import annotations

import polars as pl

import store
from app.frames.axes import layer_label
from app.frames.what_if import Bias
from compressor.plan import LayerKey, Plan, RouteRule, RouteWeights
from moescope.errors import InputError
from planner.route import make


def made(
    run: store.Run, *, rule: RouteRule, value: float | None = None,
    values: tuple[tuple[LayerKey, float], ...] | None = None, found_by: str = "", biases: Bias | None = None,
    weights: RouteWeights = "renormalized", domain: str | None = None, guard: bool = True,
    limit_tokens: int | None = None,
) -> Plan:  # fmt: skip
    """The plan of a rule at one value, at one per layer that was found as ``found_by`` says, or of biases.

    Raises:
        PlanError: as :func:`planner.route.make`.
    """
    return make(
        run, rule=rule, value=value, values=None if values is None else dict(values),
        biases=None if biases is None else dict(biases), weights=weights,
        domains=None if domain is None else [domain], guard=guard, limit_tokens=limit_tokens,
        method="steering" if rule == "bias" else found_by,
    )  # fmt: skip


def title(plan: Plan) -> str:
    """What it changes: rule, value or from which to which, number of layers."""
    step = plan.route
    if step is None:
        raise InputError("the plan changes no routing")
    values = sorted({one.value for one in step.layers if one.value is not None})
    value = f" {values[0]:.4g}" if values else ""
    value += f" to {values[-1]:.4g}" if len(values) > 1 else ""
    count = f"{len(step.layers)} layer{'s' if len(step.layers) > 1 else ''}"
    return f"route by {step.rule}{value}, {count}"


def layers(plan: Plan) -> pl.DataFrame:
    """One row per layer that it changes: label; value, or the experts whose logits are shifted and by how much; and
    what the trace says: mean active experts, or the coefficient of variation of the load."""
    if plan.route is None:
        raise InputError("the plan changes no routing")
    told = {(one.layer, one.step): one.values for one in plan.evidence[0].layers}
    rows = []
    for one in plan.route.layers:
        values = [value for value in told.get((one.layer, one.step), ()) if value is not None]
        row: dict[str, object] = {"layer": layer_label(one.layer, one.step)}
        if plan.route.rule == "bias":
            load = pl.Series(values, dtype=pl.Float64)
            spread, mean = load.std(ddof=0), load.mean()
            row["shifted experts"] = sum(bias != 0 for bias in one.bias)
            row["least"], row["largest"] = min(one.bias), max(one.bias)
            row["load CV then"] = spread / mean if spread is not None and mean else None  # type: ignore[operator]
        else:
            row["value"], row["mean active experts"] = one.value, values[0] if values else None
        rows.append(row)
    return pl.DataFrame(rows, infer_schema_length=None)
