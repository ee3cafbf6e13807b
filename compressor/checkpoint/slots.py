"""One expert's part of a stored tensor: how it is turned, and the way between it and :class:`ExpertWeights`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compressor.families.checkpoint import INTERLEAVED, Part, TensorName
from moescope.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

    from compressor.weights import ExpertWeights

TRANSPOSED = ("aria", "aria_text", "gpt_oss", "llama4", "llama4_text", "openai_privacy_filter")
"""Families that store (in, out); only asked where no tensor of a layer tells by its shape."""


@dataclass(frozen=True)
class Slot:
    """What one stored tensor holds of one expert.

    Attributes:
        part: which projection.
        bias: its bias instead of its weight.
        transposed: stored as (in, out).
        interleaved: gate and up rows in turns.
    """

    part: Part
    bias: bool = False
    transposed: bool = False
    interleaved: bool = False

    def shape(self, width: int, hidden: int) -> tuple[int, ...]:
        """Shape of the part for an expert of ``width`` neurons between ``hidden`` channels."""
        shape = _shape(self.part, self.bias, width, hidden)
        return shape[::-1] if self.transposed else shape

    def of(self, expert: ExpertWeights) -> Tensor:
        """The part as it is stored."""
        import torch

        kind = "_bias" if self.bias else ""
        if self.part != "gate_up":
            value = getattr(expert, f"{self.part}{kind}")
        else:
            gate, up = getattr(expert, f"gate{kind}"), getattr(expert, f"up{kind}")
            if gate is None:
                value = up
            elif self.interleaved:
                value = torch.stack([gate, up], 1).reshape(2 * len(gate), *gate.shape[1:])
            else:
                value = torch.cat([gate, up])
        result: Tensor = value.mT if self.transposed else value
        return result.contiguous()

    def parts(self, stored: Tensor) -> dict[str, Tensor]:
        """The fields of :class:`ExpertWeights` that it gives."""
        value = stored.mT if self.transposed else stored
        kind = "_bias" if self.bias else ""
        if self.part != "gate_up":
            return {f"{self.part}{kind}": value}
        if self.interleaved:
            return {f"gate{kind}": value[::2], f"up{kind}": value[1::2]}
        half = len(value) // 2
        return {f"gate{kind}": value[:half], f"up{kind}": value[half:]}


def find_slots(
    tensors: Iterable[tuple[TensorName, tuple[int, ...]]], *, width: int, hidden: int, model_type: str
) -> list[Slot]:
    """How the parts of an expert are stored.

    Args:
        tensors: name and shape of one expert's part of each tensor.
        width: neurons per expert.
        hidden: channels that enter and leave it.
        model_type: of the family, asked where shapes do not tell.

    Raises:
        ModelError: a shape that fits neither orientation.
    """
    known = list(tensors)
    turned: list[bool | None] = []
    for name, shape in known:
        assert name.part is not None
        expected = _shape(name.part, name.what == "bias", width, hidden)
        if shape not in (expected, expected[::-1]):
            raise ModelError(
                f"{name.name} has shape {list(shape)} per expert; the plan's experts of {width} neurons between"
                f" {hidden} channels would have {list(expected)}: is it for this model?"
            )
        if name.packed:  # DBRX: one matrix under the other, down projections turned
            turned.append(name.part == "down")
        else:
            turned.append(None if expected == expected[::-1] else shape != expected)
    # A square tensor does not tell; the others of the layer are turned alike, and two of them cannot all be square.
    other = next((value for value in turned if value is not None), model_type in TRANSPOSED)
    return [
        Slot(
            part=name.part or "up",
            bias=name.what == "bias",
            transposed=name.what != "bias" and (other if value is None else value),
            interleaved=name.part == "gate_up" and (name.interleaved or model_type in INTERLEAVED),
        )
        for (name, _), value in zip(known, turned, strict=True)
    ]


def _shape(part: Part, bias: bool, width: int, hidden: int) -> tuple[int, ...]:
    rows = {"gate": width, "up": width, "gate_up": 2 * width, "down": hidden}[part]
    if bias:
        return (rows,)
    return rows, width if part == "down" else hidden
