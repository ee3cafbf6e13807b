"""What a model weighs: bytes in files and in memory, experts, parameters in all and per token."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from moescope.errors import ModelError
from profiler.capture.discovery import MoELayer, find_moe_layers


@dataclass(frozen=True)
class Size:
    """Sizes of one model.

    Attributes:
        file_bytes: weights in its folder; None for a hub id or a folder without weights.
        memory_bytes: weights as they are loaded, each tensor counted once.
        parameters: of the whole model.
        active_parameters: used per token: all but the routed experts that are not selected.
        expert_parameters: of the routed experts.
        experts: routed experts of all layers that hold weights.
        experts_per_layer: the same, layer by layer.
    """

    file_bytes: int | None
    memory_bytes: int
    parameters: int
    active_parameters: int
    expert_parameters: int
    experts: int
    experts_per_layer: list[int]

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)


def size_of(model: nn.Module, path: str | Path = "") -> Size:
    """The sizes of a loaded model; a model without experts is all active.

    Experts that only fill up a layer (form ``padded`` of a plan) count: they take their place.

    Args:
        model: the model.
        path: folder or file that it was loaded from.
    """
    try:
        layers = _by_module(find_moe_layers(model))
    except ModelError:
        layers = []
    parameters = sum(parameter.numel() for parameter in model.parameters())
    of_experts = [sum(parameter.numel() for parameter in layer.experts.parameters()) for layer in layers]
    idle = sum(
        round(size * (1 - min(1.0, layer.top_k / _weighted(layer))))
        for size, layer in zip(of_experts, layers, strict=True)
    )
    return Size(
        file_bytes=file_bytes(path),
        memory_bytes=sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers())),
        parameters=parameters,
        active_parameters=parameters - idle,
        expert_parameters=sum(of_experts),
        experts=sum(map(_weighted, layers)),
        experts_per_layer=[_weighted(layer) for layer in layers],
    )


def file_bytes(path: str | Path) -> int | None:
    """Bytes of the weights in a folder, or of a file; None where there are none."""
    place = Path(path)
    if not str(path) or not place.exists():
        return None
    found = [place] if place.is_file() else list(place.glob("*.safetensors")) or list(place.glob("*.bin"))
    return sum(file.stat().st_size for file in found) or None


def _by_module(layers: list[MoELayer]) -> list[MoELayer]:
    """Each experts module once, however often it is called."""
    return list({id(layer.experts): layer for layer in layers}.values())


def _weighted(layer: MoELayer) -> int:
    return layer.layout.num_weighted if layer.layout is not None else layer.num_experts
