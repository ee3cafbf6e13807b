"""What factors would take if they were stored as they are: plans store experts rebuilt, which saves nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from compressor.plan import PARTS, FactorGroup, FactorStep, Plan, Source
from compressor.plan.bits import SCALE_BITS
from planner.estimate.storage import stored_parts

INDEX_BITS = 32
"""Bits of the number of a row that is kept."""

TERNARY_BITS = 1.6
"""Bits of one entry of a residual: five in a byte. Entropy coding (ComPEFT: Golomb) would take less."""


def factored_bytes(plan: Plan, *, source_bits: float) -> int:
    """Bytes of all experts of a plan with what its factor step names stored as factors; biases are left out.

    The thin matrices, rows that are kept and centres have the type of the source, the others their widths as in
    :func:`planner.estimate.storage.expert_bytes`.

    Args:
        plan: a plan.
        source_bits: bits of a weight that stays as it is.
    """
    step = next((step for step in plan.steps if isinstance(step, FactorStep)), None)
    groups = {
        (layer.layer, layer.step, member): group
        for layer in (step.layers if step is not None else ())
        for group in layer.groups
        for member in group.members
    }
    whole = 0.0
    for part in stored_parts(plan, source_bits=source_bits):
        group = groups.get(part.unit[:3]) if part.unit[3] == "routed" else None
        if step is None or group is None:
            whole += part.weights * part.bits
        else:
            rows = part.weights // part.inputs
            whole += _bits(step, group, part.unit[2], rows, part.inputs, source_bits)
    return round(whole / 8)


def saved_note(source: Source, step: FactorStep, *, value_bytes: int | None) -> str:
    """A sentence on what the experts that a step names would take as factors, of what they take in the plan."""
    size = 8.0 * (value_bytes or 2)
    shapes, whole, stored, count = source.by_key, 0, 0.0, 0
    for layer in step.layers:
        width = shapes[layer.layer, layer.step].width
        for group, member in _members(layer.groups):
            count += 1
            for part in PARTS if source.gated else PARTS[1:]:
                rows, inputs = (source.expert_size, width) if part == "down" else (width, source.expert_size)
                whole += rows * inputs
                stored += _bits(step, group, member, rows, inputs, size)
    return (
        f"The {count} experts of the factor step are stored rebuilt, which saves nothing; kept as factors they would"
        f" take {round(stored / 8):,} of {round(whole * size / 8):,} bytes."
    )


def _members(groups: Iterable[FactorGroup]) -> Iterator[tuple[FactorGroup, int]]:
    return ((group, member) for group in groups for member in group.members)


def _bits(step: FactorStep, group: FactorGroup, expert: int, rows: int, inputs: int, source_bits: float) -> float:
    """Bits of one projection (rows, inputs) of an expert; the lead of a group holds its centre."""
    if step.method == "low_rank_sparse":
        kept = round(step.density * rows)
        return (step.rank or 0) * (rows + inputs) * source_bits + kept * (inputs * source_bits + INDEX_BITS)
    if len(group.members) == 1:
        return rows * inputs * source_bits
    centre = rows * inputs * source_bits if expert == group.lead else 0.0
    return centre + rows * inputs * TERNARY_BITS + SCALE_BITS
