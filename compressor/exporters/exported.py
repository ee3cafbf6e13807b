"""What an exporter gives, and the projections that it has to find words for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from compressor.plan import (
    PARTS,
    Bits,
    LayerKey,
    Plan,
    QuantizeStep,
    Role,
    ServingStep,
    bits_after,
    experts_after,
    kept_layers,
    widths_after,
)
from compressor.plan.result import neurons_after, places_after
from moescope.errors import PlanError

BY_ITSELF = "for the engine that serves the result: export it by itself, moescope export --list names the formats"
"""Of a cache or place step, in a file that is about another step."""


@dataclass(frozen=True)
class Exported:
    """A plan in the words of an engine.

    Attributes:
        text: content of the engine's file; ends with a line break. Empty where the file is no text.
        left_out: every unit and step that the format cannot say, with the reason; numbers are those of the source.
        notes: what the reader of the file has to know.
        binary: content of a file that is no text; None where it is.
    """

    text: str
    left_out: tuple[str, ...]
    notes: tuple[str, ...] = ()
    binary: bytes | None = None

    @property
    def content(self) -> bytes:
        """The bytes of the file."""
        return self.text.encode() if self.binary is None else self.binary


@dataclass(frozen=True)
class Unit:
    """One projection of an expert, as it stands when all cuts of the plan are made.

    Attributes:
        layer: its decoder layer, then.
        expert: its place among the experts of the layer, then; 0 for shared experts.
        role: routed or shared.
        part: gate, up or down.
        bits: width; None = as it is.
        inputs: channels of a row.
        outputs: rows.
        source: (layer, step) and expert of the source.
    """

    layer: int
    expert: int
    role: Role
    part: str
    bits: Bits | None
    inputs: int
    outputs: int
    source: tuple[LayerKey, int]

    @property
    def words(self) -> str:
        """The unit for a reader, without its projection, by the numbers of the source."""
        (layer, step), expert = self.source
        place = f"layer {layer}" + (f" step {step}" if step else "")
        return f"{place} shared experts" if self.role == "shared" else f"{place} expert {expert}"


def quantize_step(plan: Plan) -> QuantizeStep:
    """The step that gives widths.

    Raises:
        PlanError: the plan has none.
    """
    for step in plan.steps:
        if isinstance(step, QuantizeStep):
            return step
    raise PlanError(
        "the plan has no quantize step, so there are no widths to export: plan with a method that gives them"
    )


def units(plan: Plan) -> list[Unit]:
    """Every projection of every expert that is left, in the order of the layers; also those that stay as they are."""
    found, after, widths = bits_after(plan), experts_after(plan), widths_after(plan)
    numbers = {layer: number for number, layer in enumerate(kept_layers(plan))}
    shapes, numbers_of = plan.source.by_key, places_after(plan, after)
    masks = neurons_after(plan)
    parts = [part for part in PARTS if part != "gate" or plan.source.gated]
    result = []
    for key, experts in after.items():
        shape = shapes[key]
        ones: list[tuple[Role, int, int, int, int]] = [
            ("routed", numbers_of[key][one.lead], one.lead, widths[key], plan.source.expert_size) for one in experts
        ]
        if shape.shared_width:
            kept = masks.get((*key, 0, "shared"))
            masked = any(step.step == "slim" and step.form == "masked" for step in plan.steps)
            width = shape.shared_width if kept is None or masked else max(int(kept.sum()), 1)
            ones.append(("shared", 0, 0, width, plan.source.hidden_size))
        for role, place, expert, width, hidden in ones:
            entry = found.get((*key, expert, role))
            for part in parts:
                inputs, outputs = (width, hidden) if part == "down" else (hidden, width)
                bits = None if entry is None else entry[0].of(part)
                result.append(Unit(numbers[key[0]], place, role, part, bits, inputs, outputs, (key, expert)))
    return result


def unsaid_steps(plan: Plan) -> list[str]:
    """What no file of widths says: every step to be applied first, steps for engines that serve, and what a quantize
    step is beside widths."""
    result = []
    for place, step in enumerate(plan.steps, start=1):
        if isinstance(step, ServingStep):
            result.append(f"step {place}, {step.step}: {BY_ITSELF}")
            continue
        if not isinstance(step, QuantizeStep):
            result.append(f"step {place}, {step.step}: apply it first; the names in the file are those of the result")
            continue
        if step.nested is not None:
            result.append(
                f"step {place}, quantize: nested widths from {step.nested} bits; each is on a grid of its own"
            )
        if step.activation_bits is not None:
            result.append(f"step {place}, quantize: {step.activation_bits} bits for what enters the experts")
        if step.smoothing is not None:
            result.append(f"step {place}, quantize: smoothing of input channels with exponent {step.smoothing:g}")
    return result


def left_out(cases: Iterable[tuple[Unit, str]]) -> list[str]:
    """Sentences for the projections of one expert after the other that a format cannot say.

    Args:
        cases: unit and reason; those of an expert one behind the other.
    """
    result = []
    for (words, reason), group in groupby(cases, key=lambda case: (case[0].words, case[1])):
        parts = ", ".join(f"{unit.part} {_width(unit.bits)}" for unit, _ in group)
        result.append(f"{words} ({parts}): {reason}")
    return result


def require_some(said: object, engine: str, missing: Iterable[str]) -> None:
    """Refuse a file that would say nothing.

    Raises:
        PlanError: with the first reason.
    """
    if not said:
        reason = next(iter(missing), "the plan gives no expert a width")
        raise PlanError(f"nothing of the plan can be said in the words of {engine}: {reason}")


def _width(bits: Bits | None) -> str:
    return "as it is" if bits is None else "ternary" if bits == "ternary" else f"{bits} bit"
