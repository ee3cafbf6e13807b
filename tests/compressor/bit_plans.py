"""Plans of families that give experts widths by hand, without a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from compressor.plan import ExpertBits, LayerShape, Plan, QuantizeLayer, QuantizeStep, Source, Step
from tests.compressor.edit_plans import plan

HIDDEN, WIDTH, EXPERTS = 256, 512, 4

FAMILIES = {
    "olmoe": 0, "qwen3_moe": 0, "mixtral": 0, "gpt_oss": 0, "deepseek_v3": 512,
}  # fmt: skip
"""Family -> width of its shared experts."""

Bit = Callable[[int, int, str], Any]


def source(family: str = "olmoe", **changes: Any) -> Source:
    """Three decoder layers, the first dense; four experts each."""
    shape = {"num_experts": EXPERTS, "top_k": 2, "width": WIDTH, "shared_width": FAMILIES.get(family, 0)}
    shape |= {name: changes.pop(name) for name in list(changes) if name in LayerShape.model_fields}
    known: dict[str, Any] = {
        "model": "toy", "model_type": family, "hidden_size": HIDDEN, "expert_size": HIDDEN, "num_layers": 3,
        "layers": tuple(LayerShape(layer=layer, **shape) for layer in (1, 2)),
    }  # fmt: skip
    return Source(**{**known, **changes})


def quantize(known: Source, bits: Bit, **changes: Any) -> QuantizeStep:
    """``bits(layer, expert, part)`` for every projection of every expert; shared experts are expert -1."""
    layers = []
    for shape in known.layers:
        entries = [(expert, "routed", expert) for expert in range(shape.num_experts)]
        entries += [(0, "shared", -1)] if shape.shared_width else []
        experts = []
        for expert, role, asked in entries:
            widths = {part: bits(shape.layer, asked, part) for part in ("gate", "up", "down")}
            if not known.gated:
                widths["gate"] = None
            if any(width is not None for width in widths.values()):
                experts.append(ExpertBits(expert=expert, role=role, **widths))  # type: ignore[arg-type]
        layers.append(QuantizeLayer(layer=shape.layer, experts=tuple(experts)))
    return QuantizeStep(**{"method": "test", "layers": tuple(layers), "group_size": 64, **changes})


def quantizing(
    family: str, bits: Bit, *before: Step, source_changes: dict[str, Any] | None = None, **step: Any
) -> Plan:
    """A checked plan of one quantize step behind others."""
    known = source(family, **(source_changes or {}))
    return plan(known, *before, quantize(known, bits, **step))


def mixed(layer: int, expert: int, part: str) -> Any:
    """2, 4, 8 and no bits by layer and expert; down projections are one step wider."""
    place = (layer + expert) % 4 + (part == "down")
    return (2, 4, 8, None, 3)[place]
