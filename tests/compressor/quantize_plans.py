"""Plans that give experts widths, for tests of packed checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from compressor.plan import Bits, DropStep, ExpertBits, Plan, QuantizeLayer, QuantizeStep, Source, Step
from tests.compressor.apply_cases import saved
from tests.compressor.edit_plans import plan, source

MIXED: tuple[Bits | None, ...] = (2, 3, 4, 8, None)


def quantize(known: Source, *steps: Step, widths: Sequence[Bits | None] = MIXED, seed: int = 0, **more: Any) -> Plan:
    """Every projection of every expert that stays has a width of its own, drawn at random; shared experts 4 bits."""
    draw = np.random.default_rng(seed)

    def width() -> Bits | None:
        return widths[draw.integers(len(widths))]

    gone = {entry.layer: set(entry.experts) for step in steps if isinstance(step, DropStep) for entry in step.layers}
    layers = []
    for shape in known.layers:
        units = [
            ExpertBits(expert=expert, gate=width() if known.gated else None, up=width(), down=width())
            for expert in range(shape.num_experts)
            if expert not in gone.get(shape.layer, ())
        ]
        if shape.shared_width:
            units.append(ExpertBits(expert=0, role="shared", gate=4 if known.gated else None, up=4, down=4))
        layers.append(QuantizeLayer(layer=shape.layer, experts=tuple(units)))
    step = {"method": "test", "group_size": 16, "scales": "range", "layers": tuple(layers), **more}
    return plan(known, *steps, QuantizeStep(**step))


def alike(model: nn.Module, bits: Bits, **more: Any) -> Plan:
    """One width for all."""
    return quantize(source(model), widths=(bits,), **more)


def tiny(family: str, folder: Path, **changes: Any) -> Any:
    """A model with two MoE layers, and its checkpoint."""
    return saved(family, folder, num_hidden_layers=3 if family == "deepseek_v3" else 2, **changes)
