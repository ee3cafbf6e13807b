"""The step that says where experts lie while a model runs: on the device, in a cache of it, in host memory, on disk."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from compressor.plan.bits import Bits
from compressor.plan.steps import Record, Row

CachePolicy = Literal[
    "static", "lru", "lfu", "lfu_in_cache", "hobbit", "edgemoe", "moe_infinity", "mixtral_offloading", "fate"
]
"""Which expert makes room for one that is missing. ``static``: none, what is on the device stays there. ``lfu`` counts
all uses so far, ``lfu_in_cache`` forgets them when the expert goes. The others are published rules; docs/caching.md."""

Prefetch = Literal["none", "cross_layer_gate", "transitions", "activation_matrix", "popularity"]
"""What foresees the experts of a later layer; docs/caching.md."""


class CacheLayer(Record):
    """Where the routed experts of one layer lie.

    Attributes:
        layer: decoder layer.
        step: call of the layer's experts.
        slots: experts of this layer that the device holds at a time, pinned ones included. In a shared cache, those
            that are pinned alone.
        pinned: experts that never leave the device, ascending.
        disk: experts that lie on disk and not in host memory, ascending; all others that are not pinned lie in it.
    """

    layer: int = Field(ge=0)
    step: int = Field(default=0, ge=0)
    slots: int = Field(ge=0)
    pinned: Row[int] = ()
    disk: Row[int] = ()

    @field_validator("pinned", "disk")
    @classmethod
    def _ascending(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if list(value) != sorted(set(value)):
            raise ValueError(f"experts {value} must ascend, without repetition")
        return value

    @model_validator(mode="after")
    def _lies_somewhere(self) -> CacheLayer:
        both = sorted(set(self.pinned) & set(self.disk))
        if both:
            raise ValueError(f"expert {both[0]} of layer {self.layer} is pinned to the device and lies on disk alone")
        if len(self.pinned) > self.slots:
            raise ValueError(f"layer {self.layer} pins {len(self.pinned)} experts into {self.slots} slots")
        return self


class CacheStep(Record):
    """Which experts the device holds, and what happens when another one is needed.

    Attributes:
        method: by which planner slots and pins were found.
        policy: which expert makes room.
        scope: a cache of its own per layer, or one that all layers share.
        slots: experts that the device holds at a time, over all layers.
        misses: an expert that is not on the device is loaded over the link, or runs on the CPU where it lies.
        prefetch: what is loaded before it is asked for.
        ahead: how many MoE layers before; of no meaning without prefetching.
        low_bits: width of the second, narrower version that misses of little gate weight load (HOBBIT); null = none.
        thresholds: gate weight ranked before an expert up to which it is loaded in full, and up to which at all
            (HOBBIT's T1 and T2); null where there is no second version.
        layers: where each layer's experts lie.
    """

    step: Literal["cache"] = "cache"
    method: str
    policy: CachePolicy
    scope: Literal["layer", "shared"] = "layer"
    slots: int = Field(ge=0)
    misses: Literal["load", "cpu"] = "load"
    prefetch: Prefetch = "none"
    ahead: int = Field(default=1, ge=1, le=3)
    low_bits: Bits | None = None
    thresholds: tuple[float, float] | None = None
    layers: Row[CacheLayer] = Field(min_length=1)

    @model_validator(mode="after")
    def _adds_up(self) -> CacheStep:
        held = sum(layer.slots for layer in self.layers)
        if held != self.slots if self.scope == "layer" else held > self.slots:
            raise ValueError(f"the layers hold {held} experts on the device, the step {self.slots}")
        if (self.low_bits is None) != (self.thresholds is None):
            raise ValueError("a second, narrower version takes its width and the thresholds of its use, or neither")
        if self.thresholds is not None and not 0 <= self.thresholds[0] <= self.thresholds[1] <= 1:
            raise ValueError(f"thresholds {self.thresholds} must ascend within 0..1")
        return self
