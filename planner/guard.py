"""The guard: which experts no plan may cut, because massive activations come from them.

Dropping 3 of Qwen3-30B's 6,144 experts takes its reasoning away (arXiv 2507.23279). So every plan keeps super experts
unless it is told otherwise, whatever their score.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import polars as pl

import store
from compressor.plan import LayerKey, Protected, Role
from moescope.errors import PlanError
from profiler.metrics import super_experts

Rule = Literal["paper", "code"]


@dataclass(frozen=True)
class Guard:
    """What is protected.

    Attributes:
        protected: the units, in the order of the model.
        active: super experts were looked for.
        notes: what weakens the verdict, in sentences.
    """

    protected: tuple[Protected, ...] = ()
    active: bool = False
    notes: tuple[str, ...] = ()

    def experts(self, key: LayerKey, role: Role = "routed") -> frozenset[int]:
        """The protected experts of one layer."""
        return frozenset(unit.expert for unit in self.protected if (unit.layer, unit.step) == key and unit.role == role)

    @property
    def layers(self) -> frozenset[int]:
        """The decoder layers that hold any."""
        return frozenset(unit.layer for unit in self.protected)


def guard_of(run: store.Run, guard: bool | Rule) -> Guard:
    """The super experts of a run, from what its experts put out over all tokens and all domains.

    Args:
        run: a run; without level activations nothing is known, and the guard says so.
        guard: True and ``paper``: the paper's rule, above the 99.5th percentile and a tenth of the maximum, in layers
            where massive activations form. ``code``: that of its published code, in the first three quarters of the
            layers; in a model of few experts it always finds one. False: none.

    Raises:
        PlanError: another word.
    """
    if guard is False:
        return Guard(notes=("Super experts are not protected: the guard was switched off.",))
    if guard is not True and guard not in ("paper", "code"):
        raise PlanError(f"guard {guard!r} is not known: use True, False, 'paper' or 'code'")
    output = run.table("expert_output").filter(pl.col("output_max").is_not_null())
    if output.is_empty():
        return Guard(
            notes=("Super experts are not protected: the run has no expert outputs (level activations) to find them.",)
        )
    found = _found(run, output, "code" if guard == "code" else "paper")
    above = max(found.percentile_threshold, found.max_threshold)
    units = [
        Protected(
            layer=one.layer, expert=one.expert, role=one.kind,
            reason=f"super expert ({found.rule}'s rule): puts out {one.value:.4g}, threshold {above:.4g}",
        )
        for one in found.experts
    ]  # fmt: skip
    units.sort(key=lambda unit: (unit.layer, unit.role, unit.expert))
    return Guard(protected=tuple(units), active=True, notes=tuple(found.notes))


def _found(run: store.Run, output: pl.DataFrame, rule: Rule) -> super_experts.SuperExperts:
    layers = sorted({layer.layer for layer in run.layers})
    maxima = {}
    for kind in ("routed", "shared"):
        rows = output.filter(pl.col("kind") == kind)
        columns: dict[str, Any] = {"layer": rows["layer"], "expert": rows["expert"], "value": rows["output_max"]}
        maxima[kind] = super_experts.maxima_by_layer(**columns, layers=layers)
    common: dict[str, Any] = {
        "output_max": maxima["routed"], "shared_output_max": maxima["shared"], "layers": layers,
    }  # fmt: skip
    if rule == "code":
        return super_experts.super_experts_code(**common, num_hidden_layers=run.info.num_layers)
    return super_experts.super_experts(**common, massive_layers=_forming_layers(run))


def _forming_layers(run: store.Run) -> list[int] | None:
    """Decoder layers in which massive activations form; None where the residual stream was not watched."""
    frame = run.table("residual").filter(pl.col("absolute_max").is_not_null())
    if frame.is_empty():
        return None
    peaks = super_experts.residual_peaks(
        layer=frame["layer"], absolute_max=frame["absolute_max"], median_there=frame["median_there"]
    )
    return super_experts.forming_layers(**peaks)
