"""The weights of one expert, in one orientation whatever the checkpoint's or the module's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class ExpertWeights:
    """One feed-forward expert: ``down(act(gate x) * up x)``, or ``down(act(up x))`` without gate.

    Neuron n is row n of gate and up (and of their biases) and column n of down. Inputs and outputs have H channels.

    Attributes:
        up: (I, H)
        down: (H, I)
        gate: (I, H); None in experts without.
        up_bias: (I,); None without.
        gate_bias: (I,); None without.
        down_bias: (H,); None without.
    """

    up: Tensor
    down: Tensor
    gate: Tensor | None = None
    up_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    down_bias: Tensor | None = None

    @property
    def width(self) -> int:
        """I, its neurons."""
        return int(self.up.shape[0])

    @property
    def dtype(self) -> torch.dtype:
        """Type of its weights."""
        return self.up.dtype

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of all that it has."""
        for field in fields(self):
            tensor = getattr(self, field.name)
            if tensor is not None:
                yield field.name, tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> ExpertWeights:
        """The same with every tensor changed alike."""
        return ExpertWeights(**{name: change(tensor) for name, tensor in self.parts()})

    def like(self, other: ExpertWeights) -> ExpertWeights:
        """The same in the types of another expert's tensors."""
        types = {name: tensor.dtype for name, tensor in other.parts()}
        return ExpertWeights(**{name: tensor.to(types[name]) for name, tensor in self.parts()})

    def exact(self) -> ExpertWeights:
        """The same in the type that arithmetic is done in; see :func:`working_type`."""
        return self.map(lambda tensor: tensor.to(working_type(tensor.dtype)))

    def neurons(self, order: Tensor) -> ExpertWeights:
        """The neurons of these numbers, in this order; an index (n,) or a mask (I,)."""
        return ExpertWeights(
            up=self.up[order],
            down=self.down[:, order],
            gate=None if self.gate is None else self.gate[order],
            up_bias=None if self.up_bias is None else self.up_bias[order],
            gate_bias=None if self.gate_bias is None else self.gate_bias[order],
            down_bias=self.down_bias,
        )


def working_type(dtype: torch.dtype) -> torch.dtype:
    """float64 for what comes in float32 or float64, else float32: rounding once, on the way back."""
    return torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32
