"""CAMERA bits: wide, middle and narrow widths by the energy that experts put into the output (CAMERA-Q, AAAI 2026).

CAMERA ranks single neurons; no checkpoint stores widths neuron by neuron, so their energies are summed per expert. The
published code leaves the quantizing part out, and the shares of the three groups are unverified: here they follow from
the budget, as even as it allows.
"""

from __future__ import annotations

from typing import Unpack

import numpy as np

from moescope.errors import PlanError
from planner.domains import Mix
from planner.quantize.costs import told
from planner.quantize.grid import Granularity, Grid, Widths, widths_of
from planner.quantize.programme import Floats, Whole
from planner.quantize.units import Units, units_of
from planner.slim.neurons import neuron_scores
from planner.task import Array, Draft, Task, rounded

_HALVINGS = 100


def draft(
    task: Task,
    *,
    alpha: float = 0.9,
    widths: Widths = (2, 3, 4),
    granularity: Granularity = "expert",
    mix: Mix = "union",
    **grid: Unpack[Grid],
) -> Draft:
    """The units of most energy have the widest width, those of least the narrowest.

    Experts are ranked within their layer, and every layer has the same shares; layers and projections are ranked over
    the model.

    Args:
        task: what to plan.
        alpha: part of the maximum in the energy, 0..1; 0.9 is what the published run used.
        widths: of the groups, three unless told otherwise.
        granularity: what has a width of its own; a projection has the energy of its layer.
        mix: how domains come together, where vectors were kept per domain.
        grid: see :class:`planner.quantize.grid.Grid`.

    Raises:
        PlanError: fewer than two widths, a run without activations, or bits that cannot be met.
    """
    if len(widths_of(widths)) < 2:
        raise PlanError("CAMERA bits tell groups of experts apart: give at least two widths, such as 2, 3 and 4")
    units = units_of(task, widths=widths, granularity=granularity, **grid)
    scores, notes = neuron_scores(
        task, "camera", "neuron_activation", scope="layer", mix=mix, shared=False, parameters={"alpha": alpha}
    )
    energy = rounded(units.of({key: {"all": one.routed.sum(1)[:, None]} for key, one in scores.items()})[:, 0])
    columns = _grouped(units, energy)
    counts = [int((columns == column).sum()) for column in range(len(units.widths))]
    groups = ", ".join(f"{count} units have {width} bits" for count, width in zip(counts, units.widths, strict=True))
    return Draft(
        steps=(units.step("camera_bits", columns),),
        score="camera energy",
        unit="squared activation, summed over the expert's neurons",
        values=units.by_expert(energy),
        notes=(
            *told(units, columns),
            f"{groups}: as even as the budget allows, for the published shares are unverified.",
            *notes,
        ),
    )


def _grouped(units: Units, energy: Floats) -> Whole:
    """(units,) columns."""
    per_layer = units.grid.granularity == "expert"
    pinned = units.pinned(np.zeros(units.sizes.shape))
    units.require_room(pinned, per_layer=per_layer)
    columns = np.zeros(len(energy), dtype=np.int64)
    columns[units.protected] = len(units.widths) - 1
    rooms = units.layer_capacity.tolist() if per_layer else [units.capacity]
    for group, room in enumerate(rooms):
        mine = np.flatnonzero(units.groups == group) if per_layer else np.arange(len(energy))
        free = mine[~np.isin(mine, units.protected)]
        held = mine[np.isin(mine, units.protected)]
        left = room - int(units.sizes[held, -1].sum())
        columns[free[np.argsort(-energy[free], kind="stable")]] = _shares(units.sizes[free], left)
    return columns


def _shares(sizes: Whole, room: int) -> Whole:
    """(units,) columns in descending order that fit: groups as even as the room allows.

    Shares of the largest entropy among those of a mean size are proportional to exp(b x size).
    """
    count, mean = len(sizes), sizes.mean(0)
    if not count:
        return np.zeros(0, dtype=np.int64)
    scaled: Array = (mean - mean[0]) / (mean[-1] - mean[0])

    def columns(slope: float) -> Whole:
        share = np.exp(slope * (scaled - (slope > 0)))
        edges = np.floor(np.cumsum((share / share.sum())[::-1])[:-1] * count + 1e-9).astype(np.int64)
        return len(mean) - 1 - np.searchsorted(edges, np.arange(count), side="right")

    def fits(slope: float) -> bool:
        return int(np.take_along_axis(sizes, columns(slope)[:, None], axis=1).sum()) <= room

    low, high = -700.0, 700.0
    if fits(high):
        return columns(high)
    if not fits(low):
        return np.zeros(count, dtype=np.int64)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return columns(low)
