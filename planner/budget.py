"""A budget in bytes: which shares may meet it, by exact arithmetic on the experts' parameters."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from compressor.plan import Plan, Step
from moescope.errors import PlanError
from planner.allocation import least_kept
from planner.estimate.parameters import expert_parameters, sizes_after, sizes_before
from planner.estimate.storage import expert_bytes
from planner.presets import Preset
from planner.source import value_bytes
from planner.task import Task

_ROUNDING = 1e-12


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def memory_of(memory: int | str) -> int:
    """Bytes of ``12GiB``, ``500MB``, ``12g`` or a plain number.

    Raises:
        PlanError: it is no size, or nothing.
    """
    if isinstance(memory, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(I?))?B?\s*", memory.upper())
        if found is None:
            raise PlanError(f"{memory!r} is no size of memory: write 12GiB, 500MiB or a number of bytes")
        number, letter, binary = (part or "" for part in found.groups())
        memory = int(float(number) * (1024 ** ("KMGT".index(letter) + 1) if letter and binary else _UNITS[letter]))
    if memory < 1:
        raise PlanError(f"memory {memory} is no number of bytes: give at least 1")
    return memory


def bytes_after(task: Task, plan: Plan) -> int:
    """Bytes of the experts' weights that a plan stores: in the run's type, or in the widths that they have."""
    return expert_bytes(plan, source_bits=8.0 * value_bytes_of(task))


def bits_that_fit(task: Task, *, memory: int, other: int) -> float:
    """Effective bits per weight at which all experts fit.

    Raises:
        PlanError: the form saves nothing, nothing is left for them, everything fits as it is, or the type of the
            weights is not known.
    """
    if task.form == "dense":
        raise PlanError("form dense keeps the type of the source and saves no memory: give bits, or form packed")
    whole = expert_parameters(task.source, sizes_before(task.source))
    size = value_bytes_of(task)
    if other + whole * size <= memory:
        raise PlanError(
            f"the weights take {other + whole * size:,} bytes and fit into {memory:,}: leave them as they are"
        )
    if other >= memory:
        raise PlanError(f"the other weights alone take {other:,} of {memory:,} bytes: nothing is left for the experts")
    return (memory - other) * 8.0 / whole


def bits_left(task: Task, before: Sequence[Step], *, room: int) -> float:
    """Effective bits per weight at which what earlier steps leave fits into so many bytes.

    Raises:
        PlanError: it fits as it is: nothing has to be quantized.
    """
    plan = Plan.model_construct(source=task.source, steps=tuple(before))
    left, size = expert_parameters(task.source, sizes_after(plan)), value_bytes_of(task)
    if left * size <= room:
        raise PlanError(f"the experts that stay take {left * size:,} bytes and fit into {room:,}: cut without bits")
    if room <= 0:
        raise PlanError("the other weights alone take all the memory: nothing is left for the experts")
    return room * 8.0 / left


def shares_that_may_fit(task: Task, preset: Preset, *, memory: int, other: int) -> Iterator[float]:
    """Shares to try, ascending, each of which removes one unit more; those that cannot fit are left out.

    A unit is one expert per layer, one neuron per expert, or one layer. Even where layers lose different numbers, a
    share removes no more than its part of all experts' weights, so smaller ones cannot fit.

    Raises:
        PlanError: everything fits as it is, the form saves nothing, or the type of the weights is not known.
    """
    if task.form == "masked":
        others = " or ".join(form for form in preset.forms if form != "masked")
        raise PlanError(f"form masked keeps all shapes and saves no memory: give a share, or form {others}")
    if preset.name == "moe_blocks":
        raise PlanError("preset 'moe_blocks' keeps all shapes and saves no memory: give a share")
    if preset.step == "factor" and task.form == "dense":
        raise PlanError(f"preset {preset.name!r} stores experts rebuilt, which saves no memory: give a share")
    source, size = task.source, value_bytes_of(task)
    whole = expert_parameters(source, sizes_before(source)) * size
    if other + whole <= memory:
        raise PlanError(f"the weights take {other + whole:,} bytes and fit into {memory:,}: nothing has to be removed")
    units, most = _units(task, preset)
    if units is None:
        yield from (count / source.num_layers for count in range(1, source.num_layers))
        return
    shared = sum(shape.shared_width for shape in source.layers) * (3 if source.gated else 2) * source.hidden_size * size
    needed = (other + whole - memory) / (whole - shared)
    if most / units < needed - _ROUNDING:
        least = other + shared + round((whole - shared) * (1 - most / units))
        raise PlanError(
            f"no plan of preset {preset.name!r} fits into {memory:,} bytes: without {most} of {units}"
            f" {'neurons of each expert' if preset.step == 'slim' else 'experts per layer'} the weights still take"
            f" {least:,}"
        )
    yield from (count / units for count in range(1, most + 1) if (count + 1) / units > needed)


def _units(task: Task, preset: Preset) -> tuple[int | None, int]:
    """How many units the widest layer has, and how many of them can go; None for layers."""
    if preset.name == "block_influence":
        return None, 0
    if preset.step == "slim":
        width = max(shape.width for shape in task.layers)
        return width, width - 1
    widest = max(task.layers, key=lambda shape: shape.num_experts)
    return widest.num_experts, widest.num_experts - least_kept(widest)


def value_bytes_of(task: Task) -> int:
    """Bytes of one weight in the run's type.

    Raises:
        PlanError: the run does not say.
    """
    size = value_bytes(task.run)
    if size is None:
        raise PlanError(
            f"run {task.run.name!r} does not say in which type its weights are ({task.run.info.dtype or 'none'}), so"
            " bytes cannot be counted: give a share"
        )
    return size
