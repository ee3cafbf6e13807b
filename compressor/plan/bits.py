"""Bit widths of experts: what a width is, what storing it takes, and the step that gives experts their own."""

from __future__ import annotations

import base64
import binascii
import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from compressor.plan.steps import Record, Role, Row

Bits = Literal[1, 2, 3, 4, 8, "ternary"]
"""Width of a quantized weight. ``1`` = sign times the group's mean magnitude (MC-MoE), ``ternary`` = -1, 0 or 1 times
it (MoTE), all others whole numbers of a grid per group."""

BITS: tuple[Bits, ...] = (1, "ternary", 2, 3, 4, 8)
"""All widths, the narrowest first: the order of the lists in table ``expert_error`` of a run."""

PARTS = ("gate", "up", "down")
"""The projections of an expert."""

SCALE_BITS = 16
"""Bits of the scale of a group."""

GROUP_SIZE = 128
"""Input channels that share a scale, where nobody says otherwise and they divide evenly."""


class ExpertBits(Record):
    """The widths of one expert's projections.

    Attributes:
        expert: its number; shared experts are kept merged in one module, which is number 0.
        role: routed or shared.
        gate: width of its gate projection; null = as it is, and in experts without gate.
        up: of its up projection; null = as it is.
        down: of its down projection; null = as it is.
    """

    expert: int = Field(ge=0)
    role: Role = "routed"
    gate: Bits | None = None
    up: Bits | None = None
    down: Bits | None = None

    def of(self, part: str) -> Bits | None:
        """The width of one projection."""
        value: Bits | None = getattr(self, part)
        return value


class QuantizeLayer(Record):
    """The widths of one layer's experts; experts that are not named stay as they are."""

    layer: int = Field(ge=0)
    step: int = Field(default=0, ge=0)
    experts: Row[ExpertBits]


class SmoothLayer(Record):
    """What is known of the input channels of one layer's experts, by which they are smoothed (EAQuant).

    Attributes:
        layer: decoder layer.
        step: call of the layer's experts.
        input_max: (H,) largest |x| of each channel, as 32-bit floats in base64.
    """

    layer: int = Field(ge=0)
    step: int = Field(default=0, ge=0)
    input_max: str

    @staticmethod
    def of(*, layer: int, input_max: NDArray[np.floating[Any]], step: int = 0) -> SmoothLayer:
        """From a vector (H,)."""
        content = np.ascontiguousarray(input_max, dtype="<f4").tobytes()
        return SmoothLayer(layer=layer, step=step, input_max=base64.b64encode(content).decode("ascii"))

    def values(self, size: int) -> NDArray[np.float32]:
        """(size,) largest |x| of each channel.

        Raises:
            ValueError: the vector is damaged, or of another length.
        """
        try:
            content = base64.b64decode(self.input_max, validate=True)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"the channels of layer {self.layer} cannot be read: {error}") from error
        if len(content) != 4 * size:
            raise ValueError(f"layer {self.layer} has {len(content) / 4:g} channels, not {size}")
        values = np.frombuffer(content, dtype="<f4").astype(np.float32)
        if not (np.isfinite(values).all() and (values >= 0).all()):
            raise ValueError(f"a channel of layer {self.layer} has no largest magnitude: a number that is not finite")
        return values


class QuantizeStep(Record):
    """Weights of experts are put on grids of few values.

    Attributes:
        method: by which planner the widths were found.
        granularity: what has a width of its own: a matrix (one projection of one expert), an expert, a layer, or a
            projection of a layer.
        form: ``dense`` = the values of the grid are stored in the type of the source: any engine loads it, nothing is
            saved, and it shows what the widths cost. ``packed`` = compressed-tensors, which ``compressor.load`` reads.
        group_size: input channels that share a scale; 0 = all of a row.
        symmetric: grids around zero, without a zero point.
        scales: how a grid is found: ``range`` = from the smallest to the largest weight of the group; ``clipped`` = the
            part of that range with the least squared error.
        nested: the narrowest width, from which wider ones are made by one binary residual per bit, so that one file
            serves all (matryoshka, D2MoE); null = each width by itself.
        activation_bits: width of what enters the experts, one scale per token; null = as it is.
        smoothing: exponent by which the ranges of channels are moved from activations into weights; null = not at all.
        channels: what smoothing needs to know.
        layers: the widths, layer by layer.
    """

    step: Literal["quantize"] = "quantize"
    method: str
    granularity: Literal["matrix", "expert", "layer", "projection"] = "expert"
    form: Literal["dense", "packed"] = "packed"
    group_size: int = Field(default=GROUP_SIZE, ge=0)
    symmetric: bool = False
    scales: Literal["range", "clipped"] = "clipped"
    nested: Literal[2, 3, 4] | None = None
    activation_bits: Literal[4, 8] | None = None
    smoothing: float | None = Field(default=None, ge=0, le=1)
    channels: Row[SmoothLayer] = ()
    layers: Row[QuantizeLayer]

    @model_validator(mode="after")
    def _smooths_what_it_knows(self) -> QuantizeStep:
        if (self.smoothing is None) != (not self.channels):
            raise ValueError("smoothing takes an exponent and the channels of every layer, or neither")
        return self

    def stored(self, bits: Bits | None, inputs: int, source: float = 16.0) -> float:
        """Bits that one weight of this width takes, see :func:`stored_bits`."""
        return stored_bits(bits, inputs=inputs, group_size=self.group_size, symmetric=self.symmetric,
                           nested=self.nested, source=source)  # fmt: skip


def stored_bits(
    bits: Bits | None,
    *,
    inputs: int,
    group_size: int = GROUP_SIZE,
    symmetric: bool = False,
    nested: int | None = None,
    source: float = 16.0,
) -> float:
    """Effective bits per weight: the width, and the part that each weight has in scales and zero points.

    Five ternary values take one byte. Grids of width 1 and ternary have no zero point; nested widths have one more
    scale per bit above the narrowest.

    Args:
        bits: the width; None = as it is.
        inputs: channels of a row of the matrix.
        group_size: channels that share a scale; 0 = the row.
        symmetric: without zero points.
        nested: the narrowest of nested widths.
        source: bits of a weight that stays as it is.
    """
    if bits is None:
        return source
    group = group_size or inputs
    if bits in (1, "ternary"):
        return (1.6 if bits == "ternary" else 1.0) + SCALE_BITS / group
    width = int(bits)
    base = width if nested is None else min(width, nested)
    zeros = 0 if symmetric else base
    return width + (SCALE_BITS * (1 + width - base) + zeros) / group


def group_size_for(*sizes: int, wanted: int = GROUP_SIZE) -> int:
    """The largest of ``wanted``, its half, quarter, ... (at least 16) that divides all row lengths; else 0, a row."""
    whole = math.gcd(*sizes)
    size = wanted
    while size >= 16:
        if whole % size == 0:
            return size
        size //= 2
    return 0
