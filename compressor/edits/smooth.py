"""Ranges of channels moved from what enters the experts into their weights: the function stays, the grids get finer.

Channel j of the experts' input is divided by s_j, in the norm that puts it out; whatever reads it has its column j
multiplied by s_j. Source: EAQuant (arXiv 2506.13329), whose scale is the largest that any expert of the layer or its
router asks for, so that one norm serves all of them; its code was not read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from compressor.weights import ExpertWeights, working_type


@dataclass(eq=False)
class Smoothing:
    """The smoothing of one layer.

    Attributes:
        exponent: a, the part of a channel's range that goes into the weights.
        input_max: (H,) largest |x| of each channel.
    """

    exponent: float
    input_max: Tensor
    _scales: Tensor | None = field(default=None, repr=False)

    @property
    def decided(self) -> bool:
        """The scales are known."""
        return self._scales is not None

    @property
    def scales(self) -> Tensor:
        """(H,) float64, by which weights are multiplied and inputs divided.

        Raises:
            RuntimeError: they were not decided yet.
        """
        if self._scales is None:
            raise RuntimeError("decide(experts, router) has to be called first: the scales depend on the weights")
        return self._scales

    def decide(self, experts: Iterable[ExpertWeights], router: Tensor) -> None:
        """Find the scales.

        Args:
            experts: the routed experts as they are before smoothing, read one by one.
            router: (rows, H) its projection.
        """
        maxima = [_column_max(router), *(_column_max(one.gate, one.up) for one in experts)]
        self._scales = smoothing_scales(self.input_max, torch.stack(maxima), self.exponent)

    def expert(self, weights: ExpertWeights) -> ExpertWeights:
        """An expert that reads smoothed inputs."""
        gate = None if weights.gate is None else self.columns(weights.gate)
        return replace(weights, gate=gate, up=self.columns(weights.up))

    def columns(self, matrix: Tensor) -> Tensor:
        """(R, H) rows that read smoothed inputs, in their own type."""
        return self._times(matrix, self.scales)

    def gain(self, weight: Tensor, offset: float = 0.0) -> Tensor:
        """(H,) weight, or bias, of the norm that puts out smoothed inputs.

        Args:
            weight: as it was.
            offset: what the norm adds to its weight before it multiplies: 1 where 0 leaves channels as they are.
        """
        return self._times(weight, 1 / self.scales, offset)

    @staticmethod
    def _times(values: Tensor, scales: Tensor, offset: float = 0.0) -> Tensor:
        kind = working_type(values.dtype)
        return ((values.to(kind) + offset) * scales.to(values.device, kind) - offset).to(values.dtype)


def _column_max(*matrices: Tensor | None) -> Tensor:
    """(H,) largest magnitude of each column of matrices (R, H)."""
    found = [matrix.abs().amax(0).double().cpu() for matrix in matrices if matrix is not None]
    return torch.stack(found).amax(0)


def smoothing_scales(input_max: Tensor, weight_max: Tensor, exponent: float) -> Tensor:
    """(H,) s_j = max over readers i of max|x_j|^a / max|W_ij|^(1 - a).

    A reader whose column is zero asks for nothing; a channel that is always zero, or that nobody reads, has 1.

    Args:
        input_max: (H,) largest |x| of each channel.
        weight_max: (readers, H) largest |W| of each column of each reader.
        exponent: a, 0..1.
    """
    inputs, weights = input_max.double(), weight_max.double()
    asked = inputs.pow(exponent) / weights.pow(1 - exponent)
    asked = torch.where(weights > 0, asked, torch.zeros_like(asked)).amax(0)
    usable = (inputs > 0) & (asked > 0) & torch.isfinite(asked)
    return torch.where(usable, asked, torch.ones_like(asked))
