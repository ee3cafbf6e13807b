"""What a width costs an expert: read from a run at level ``errors``, or estimated where it was not recorded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

from compressor.plan import BITS, LayerKey, LayerShape
from moescope.errors import PlanError
from planner.task import Array, Task

TYPICAL = (0.3625, 0.2642, 0.1384, 0.0351, 0.0091, 3.5e-05)
"""Relative squared error of Gaussian weights per width of :data:`compressor.plan.BITS`, groups of 128, clipped scales,
zero points; a test computes them again. Errors of outputs are close to those of weights where nothing else is known."""


@dataclass(frozen=True)
class LayerErrors:
    """The errors of one layer's experts, as parts of the layer's own output: they add up over experts.

    Squared norms are divided by the summed squared norm of the routed experts' gated outputs, so that a layer whose
    experts all put out nothing any more has about 1.

    Attributes:
        energy: (experts,) squared norm of each expert's gated output.
        errors: part (all, gate, up, down) -> (experts, widths) of what a width changes, widths as in BITS; an expert
            without weights in a part has 0.
        nested: (experts, 3) the same for widths 2, 3, 4 made from 2; NaN where the run does not know.
        shared_energy: (0 or 1,) of the shared experts.
        shared_errors: part -> (0 or 1, widths).
        tokens: (experts,) sampled tokens of each; 0 where errors are estimated.
        measured: read from the run; False = the typical error of each width times the expert's energy.
    """

    energy: Array
    errors: dict[str, Array]
    nested: Array
    shared_energy: Array
    shared_errors: dict[str, Array]
    tokens: Array
    measured: bool

    def relative(self, part: str) -> Array:
        """(experts, widths) errors as parts of the expert's own output; of experts never seen, what is usual here."""
        errors = self.errors[part]
        usual = errors.sum(0) / max(float(self.energy.sum()), 1e-300)
        found = np.tile(usual, (len(errors), 1))
        np.divide(errors, self.energy[:, None], out=found, where=self.energy[:, None] > 0)
        return found


def layer_errors(task: Task) -> dict[LayerKey, LayerErrors]:
    """(layer, step) -> errors of its experts over the task's domains; worked out once per task.

    Raises:
        PlanError: the run has neither level errors nor level activations.
    """
    if "expert_errors" not in task.kept:
        task.kept["expert_errors"] = _measured(task) or _typical(task)
    found: dict[LayerKey, LayerErrors] = task.kept["expert_errors"]
    return found


def _measured(task: Task) -> dict[LayerKey, LayerErrors] | None:
    rows = task.run.table("expert_error").filter(pl.col("domain").is_in([*task.domains, ""]))
    if rows.is_empty():
        return None
    keys = ["layer", "step", "kind", "part", "expert"]
    width = len(BITS)
    summed = rows.group_by(keys).agg(
        pl.col("tokens", "gated_output_square_sum").sum(),
        *(pl.col("gated_error_square_sum").list.get(place).sum().alias(f"e{place}") for place in range(width)),
        *(
            pl.col("nested_error_square_sum").list.get(place, null_on_oob=True).sum().alias(f"n{place}")
            for place in range(3)
        ),
    )
    by_layer = summed.partition_by("layer", "step", as_dict=True)
    found = {}
    for shape in task.source.layers:
        part = by_layer.get(shape.key)
        if part is None:
            raise PlanError(f"run {task.run.name!r} has no expert_error of layer {shape.layer}: collect it again")
        found[shape.key] = _layer(part, shape)
    return found


def _layer(rows: pl.DataFrame, shape: LayerShape) -> LayerErrors:
    def column(kind: str, part: str, names: list[str], count: int) -> Array:
        chosen = rows.filter((pl.col("kind") == kind) & (pl.col("part") == part) & (pl.col("expert") < count))
        values = np.zeros((count, len(names)))
        values[chosen["expert"].to_numpy()] = chosen.select(names).to_numpy()
        return values

    widths, parts = [f"e{place}" for place in range(len(BITS))], ("all", "gate", "up", "down")

    def errors_of(kind: str, part: str, own: Array) -> Array:
        """(experts, widths) errors; of single projections, pooled over domains, by their part of the output."""
        lost = column(kind, part, widths, len(own))
        if part == "all":
            return lost
        output = column(kind, part, ["gated_output_square_sum"], len(own))
        parts: Array = lost / np.where(output > 0, output, 1.0) * own[:, None]
        return parts

    energy = column("routed", "all", ["gated_output_square_sum"], shape.num_experts)[:, 0]
    whole = float(energy.sum()) or 1.0
    shared_energy = column("shared", "all", ["gated_output_square_sum"], 1 if shape.shared_width else 0)[:, 0]
    nested = column("routed", "all", ["n0", "n1", "n2"], shape.num_experts) / whole
    return LayerErrors(
        energy=energy / whole,
        errors={part: errors_of("routed", part, energy) / whole for part in parts},
        nested=nested if nested.any() else np.full_like(nested, np.nan),
        shared_energy=shared_energy / whole,
        shared_errors={part: errors_of("shared", part, shared_energy) / whole for part in parts},
        tokens=column("routed", "all", ["tokens"], shape.num_experts)[:, 0],
        measured=True,
    )


def _typical(task: Task) -> dict[LayerKey, LayerErrors]:
    """Errors from the experts' energy alone (section 5's proxy of a width's error: nearly constant per width)."""
    rows = task.run.table("expert_output").filter(pl.col("domain").is_in(task.domains))
    if rows.is_empty() or rows["gated_norm_square_sum"].null_count() == len(rows):
        raise PlanError(
            f"run {task.run.name!r} knows nothing of what widths cost: collect it with --level errors, or at least"
            " --level activations"
        )
    summed = rows.group_by("layer", "step", "kind", "expert").agg(pl.col("gated_norm_square_sum").sum())
    by_layer = summed.partition_by("layer", "step", as_dict=True)
    found = {}
    for shape in task.source.layers:
        part = by_layer.get(shape.key, summed.head(0))
        routed = part.filter((pl.col("kind") == "routed") & (pl.col("expert") < shape.num_experts))
        energy = np.zeros(shape.num_experts)
        energy[routed["expert"].to_numpy()] = routed["gated_norm_square_sum"].to_numpy()
        whole = float(energy.sum()) or 1.0
        shared = np.array([part.filter(pl.col("kind") == "shared")["gated_norm_square_sum"].sum()]) / whole
        shared = shared if shape.shared_width else shared[:0]
        found[shape.key] = LayerErrors(
            energy=energy / whole, errors=_spread(energy / whole, task.source.gated),
            nested=np.full((shape.num_experts, 3), np.nan), shared_energy=shared,
            shared_errors=_spread(shared, task.source.gated), tokens=np.zeros(shape.num_experts), measured=False,
        )  # fmt: skip
    return found


def _spread(energy: Array, gated: bool) -> dict[str, Array]:
    """Typical errors; of a single projection a part as large as that of the others."""
    whole = energy[:, None] * np.array(TYPICAL)
    parts = {"gate": whole / 3, "up": whole / 3, "down": whole / 3}
    if not gated:
        parts = {"gate": whole * 0, "up": whole / 2, "down": whole / 2}
    return {"all": whole, **parts}
