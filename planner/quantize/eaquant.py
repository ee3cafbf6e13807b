"""EAQuant: one width for weights and one for activations, with channels smoothed for all experts and the router alike.

Source: EAQuant (arXiv 2506.13329), W4A4 to W2A4 on top of DuQuant's rotations; its code was not read. The smoothing
itself is :mod:`compressor.edits.smooth`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, Unpack, get_args

import numpy as np

from compressor.plan import Bits, LayerKey, QuantizeStep, SmoothLayer
from moescope.errors import PlanError
from planner.importance.statistics import Statistics, layers_of
from planner.quantize import uniform_bits
from planner.quantize.grid import Grid, Widths
from planner.task import Array, Draft, Task

Narrow = Literal[4, 8]
"""Widths of activations."""

WEIGHT_BITS: Bits = 4
"""Of the weights where neither a width nor a budget was asked for: the paper's widest."""

_UNBOUND = 64.0
"""Effective bits that no width takes."""

BALANCE = 2.0
"""Times an even router's share of its first text that every expert has to get, while text is drawn (r)."""

FIRST_TEXT = 128 * 4096
"""Tokens of that first text: 128 sequences of 4,096."""


def draft(
    task: Task,
    *,
    activation_bits: Narrow | None = 4,
    smoothing: float = 0.6,
    weight_bits: Bits | None = None,
    widths: Widths = (2, 3, 4, 8),
    **grid: Unpack[Grid],
) -> Draft:
    """The widest width of weights that fits, activations at ``activation_bits``, and ranges moved between them.

    Args:
        task: what to plan; its bits are those of the weights, None = :data:`WEIGHT_BITS`.
        activation_bits: 4 or 8; None = as they are: smoothing alone.
        smoothing: a, the part of a channel's range that goes into the weights, 0..1.
        weight_bits: width of the weights; it has to fit into the task's bits. None = the widest that fits.
        widths: of weights that may be taken.
        grid: see :class:`planner.quantize.grid.Grid`.

    Raises:
        PlanError: as uniform bits, a parameter that cannot be, or a run without the largest inputs of its experts.
    """
    if activation_bits is not None and activation_bits not in get_args(Narrow):
        raise PlanError(f"activations of {activation_bits} bits are not known: use 4, 8, or none")
    if not 0 <= smoothing <= 1:
        raise PlanError(f"smoothing {smoothing:g} is outside [0, 1]: give the part that goes into weights, such as 0.6")
    found, notes = input_max(task)
    if task.bits is None:
        task, weight_bits = replace(task, bits=_UNBOUND), weight_bits or WEIGHT_BITS
    weights = uniform_bits.draft(task, widths=widths if weight_bits is None else [weight_bits], **grid)
    (step,) = weights.steps
    assert isinstance(step, QuantizeStep)
    channels = tuple(
        SmoothLayer.of(layer=layer.layer, step=layer.step, input_max=found[layer.layer, layer.step])
        for layer in step.layers
    )
    changed = {"method": "eaquant", "activation_bits": activation_bits, "smoothing": smoothing, "channels": channels}
    return Draft(
        steps=(QuantizeStep.model_validate({**step.model_dump(), **changed}),),
        score="none", unit="", values={},
        notes=(*weights.notes[:-1], *notes, *_told(task, activation_bits)),
    )  # fmt: skip


def input_max(task: Task) -> tuple[dict[LayerKey, Array], tuple[str, ...]]:
    """(layer, step) -> (channels,) largest |x| that any routed expert was given, and what to note.

    Raises:
        PlanError: the run does not know it.
    """
    rows = task.run.table("expert_vector")
    if "input_max" not in rows.columns or rows["input_max"].null_count() == len(rows):
        raise PlanError(
            f"run {task.run.name!r} has no expert_vector.input_max, the largest inputs of its experts, which older"
            " versions did not record: collect it with --level activations again"
        )
    pooled = set(rows["domain"].unique()) <= {""}
    names = [None] if pooled or task.every_domain else list(task.domains)
    found: dict[LayerKey, Array] = {}
    for name in names:
        statistics = Statistics(task.run, level="activations", domain=name)
        frame = statistics.vectors("expert_vector", "input_max", axis="channel")
        for key, part in layers_of(frame.filter(frame["kind"] == "routed")):
            largest = part.group_by("channel").max().sort("channel")["input_max"].to_numpy().astype(np.float64)
            found[key] = np.maximum(found[key], largest) if key in found else largest
    note = "The run keeps expert_vector pooled over domains: channels are the same for every domain."
    return found, (note,) if pooled and not task.every_domain else ()


def _told(task: Task, activation_bits: Narrow | None) -> list[str]:
    load = Statistics(task.run, level="routing").experts("expert_load", "tokens")
    least = load.sort("tokens", "layer", "step", "expert").row(0, named=True)
    shape = task.source.by_key[least["layer"], least["step"]]
    even = shape.top_k * FIRST_TEXT / shape.num_experts
    notes = [
        f"Largest inputs are those of the run's text: expert {least['expert']} of layer {least['layer']} got the fewest"
        f" tokens, {least['tokens']:,}. EAQuant draws text until every expert has {BALANCE:g} k N / E of them, N ="
        f" {FIRST_TEXT:,}: here {BALANCE * even:,.0f}.",
        "Routers keep the type of the source; at EAQuant's best they had 8 bits, in weights and activations.",
    ]
    if activation_bits is not None:
        notes.append(
            f"Activations of {activation_bits} bits are the engine's to make: the plan is measured in memory, and no"
            " checkpoint or exporter carries them yet."
        )
    return notes
