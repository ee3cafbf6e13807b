"""Bytes of the experts that a plan leaves: exact, scales and zero points counted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from compressor.plan import PARTS, ExpertBits, Plan, QuantizeStep, Role, bits_after, experts_after
from planner.estimate.parameters import sizes_after


@dataclass(frozen=True)
class StoredPart:
    """One projection of one expert that stays, or of several that are stored alike.

    Attributes:
        unit: (layer, step, expert, role); expert -1 for experts that only fill up.
        part: gate, up or down.
        weights: of it.
        inputs: channels of a row.
        bits: effective bits of a weight.
    """

    unit: tuple[int, int, int, Role]
    part: str
    weights: int
    inputs: int
    bits: float


def stored_parts(plan: Plan, *, source_bits: float) -> Iterator[StoredPart]:
    """Everything that the experts of a plan take, projection by projection; biases are left out.

    Args:
        plan: a plan.
        source_bits: bits of a weight that stays as it is. Form ``dense`` stores all weights so, whatever their grids.
    """
    found, source = bits_after(plan), plan.source
    packed = any(isinstance(step, QuantizeStep) and step.form == "packed" for step in plan.steps)
    sizes, after = sizes_after(plan), experts_after(plan)
    for key, experts in after.items():
        size = sizes[key]
        leads: list[int] = [one.lead for one in experts]
        leads += [-1] * (size.experts - len(leads))
        units: list[tuple[int, Role, int, int]] = [(lead, "routed", size.width, source.expert_size) for lead in leads]
        if size.shared_width:
            units.append((0, "shared", size.shared_width, source.hidden_size))
        for expert, role, width, channels in units:
            unit = (*key, expert, role)
            entry = found.get(unit) if packed else None
            for part in PARTS if source.gated else PARTS[1:]:
                inputs = width if part == "down" else channels
                bits = source_bits if entry is None else _bits(entry, part, inputs, source_bits)
                yield StoredPart(unit, part, width * channels, inputs, bits)


def expert_bytes(plan: Plan, *, source_bits: float) -> int:
    """Bytes of all experts of a plan."""
    return round(sum(part.weights * part.bits for part in stored_parts(plan, source_bits=source_bits)) / 8)


def mean_bits(plan: Plan, *, source_bits: float) -> float:
    """Effective bits of a weight of the experts that stay, by weights."""
    whole, bits = 0, 0.0
    for part in stored_parts(plan, source_bits=source_bits):
        whole, bits = whole + part.weights, bits + part.weights * part.bits
    return bits / max(whole, 1)


def _bits(entry: tuple[ExpertBits, QuantizeStep], part: str, inputs: int, source_bits: float) -> float:
    return entry[1].stored(entry[0].of(part), inputs, source_bits)
