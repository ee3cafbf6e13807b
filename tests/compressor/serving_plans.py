"""Plans that say where experts lie, by hand, without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compressor.plan import (
    CacheLayer,
    CacheStep,
    Evidence,
    LayerShape,
    LayerValues,
    PlaceLayer,
    PlaceStep,
    Plan,
    Source,
    Step,
)
from tests.compressor.bit_plans import source
from tests.compressor.edit_plans import plan

Rows = Mapping[int, Sequence[Any]]


def deep(count: int, dense: int = 1, **changes: Any) -> Source:
    """As many decoder layers, of which the first are dense; the others have four experts, or as asked."""
    shape = {"num_experts": 4, "top_k": 2, "width": 512}
    shape |= {name: changes.pop(name) for name in list(changes) if name in LayerShape.model_fields}
    layers = tuple(LayerShape(layer=layer, **shape) for layer in range(dense, count))
    return source(**{"family": "qwen3_moe", "num_layers": count, "layers": layers, **changes})


def cache(pinned: Rows, room: Mapping[int, int] | None = None, disk: Rows | None = None, **more: Any) -> CacheStep:
    """Layer -> pinned experts; as many slots as pins unless said."""
    layers = tuple(
        CacheLayer(
            layer=layer, pinned=tuple(experts), slots=(room or {}).get(layer, len(experts)),
            disk=tuple((disk or {}).get(layer, ())),
        )
        for layer, experts in pinned.items()
    )  # fmt: skip
    known: dict[str, Any] = {"method": "test", "policy": "static", "misses": "cpu"}
    known["slots"] = sum(layer.slots for layer in layers)
    return CacheStep(**{**known, "layers": layers, **more})


def place(experts: Rows, devices: int = 2, **more: Any) -> PlaceStep:
    """Layer -> expert in each slot."""
    layers = tuple(PlaceLayer(layer=layer, experts=tuple(row)) for layer, row in experts.items())
    return PlaceStep(**{"method": "test", "devices": devices, "layers": layers, **more})


def counted(known: Source, counts: Rows, *steps: Step) -> Plan:
    """A checked plan that holds how often each expert of a layer is chosen."""
    rows = tuple(LayerValues(layer=layer, values=tuple(row)) for layer, row in counts.items())
    evidence = Evidence(score="selections", unit="tokens", layers=rows)
    return plan(known, *steps).model_copy(update={"evidence": (evidence,)}).checked()
