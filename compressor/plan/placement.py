"""The step that says which device of an expert-parallel group holds which experts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from compressor.plan.steps import Record, Row


class PlaceLayer(Record):
    """The slots of one layer.

    Attributes:
        layer: decoder layer.
        step: call of the layer's experts.
        experts: expert in each slot (EPLB's physical_to_logical). Device d has slots d * P / D to (d + 1) * P / D - 1
            of the P slots; an expert in several slots is replicated.
    """

    layer: int = Field(ge=0)
    step: int = Field(default=0, ge=0)
    experts: Row[int] = Field(min_length=1)


class PlaceStep(Record):
    """Which device holds which experts.

    Attributes:
        method: by which planner it was found.
        devices: D, of the expert-parallel group.
        nodes: among which they are divided evenly.
        layers: slots, layer by layer; all have as many.
    """

    step: Literal["place"] = "place"
    method: str
    devices: int = Field(ge=1)
    nodes: int = Field(default=1, ge=1)
    layers: Row[PlaceLayer] = Field(min_length=1)

    @model_validator(mode="after")
    def _divides(self) -> PlaceStep:
        slots = {len(layer.experts) for layer in self.layers}
        if len(slots) > 1:
            raise ValueError(f"layers have {min(slots)} to {max(slots)} slots; all have as many")
        count = slots.pop()
        if count % self.devices:
            raise ValueError(f"{count} slots cannot be divided among {self.devices} devices")
        if self.devices % self.nodes:
            raise ValueError(f"{self.devices} devices cannot be divided among {self.nodes} nodes")
        return self

    @property
    def slots(self) -> int:
        """P, slots of a layer over all devices."""
        return len(self.layers[0].experts)

    @property
    def slots_per_device(self) -> int:
        """Of one layer."""
        return self.slots // self.devices
