"""One expert at every bit width: what its weights change by, and what its output changes by.

The grids are those of :func:`compressor.edits.quantize.to_grid` with the default :class:`compressor.plan.QuantizeStep`
(asymmetric, clipped scales): the same that a plan is put into effect with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compressor.edits.quantize import to_grid
from compressor.plan import BITS, Bits, QuantizeStep, group_size_for
from profiler.recorders.base import finite
from profiler.recorders.narrowed import WHOLE, Narrowed

NESTED: tuple[Bits, ...] = (2, 3, 4)
"""Widths that are made from 2 as well, by one binary residual per further bit."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Changes:
    """What the output of an expert changes by, token by token: squared L2 norms.

    Attributes:
        energy: (tokens,) of the output itself, weights as they are.
        parts: part (all, and each projection alone) -> (widths, tokens), widths as in ``BITS``.
        nested: (nested widths, tokens), all projections at once.
    """

    energy: Array
    parts: dict[str, Array]
    nested: Array


def grids_of(weights: Mapping[str, Tensor]) -> QuantizeStep:
    """The grids that plans use unless they are told otherwise; one group size for all projections of an expert."""
    hidden, width = weights["down"].shape
    return QuantizeStep(method="errors", group_size=group_size_for(hidden, width), layers=())


def try_widths(weights: Mapping[str, Tensor], expert: Narrowed | None) -> tuple[dict[str, Array], Changes | None]:
    """Put each matrix on each grid, once.

    Args:
        weights: part -> (out, in).
        expert: the expert that has them, on its tokens; None where it saw none.

    Returns:
        Part -> (widths,) squared Frobenius norm of what the weights change by, and what the output does.
    """
    step = grids_of(weights)
    grid = {part: np.zeros(len(BITS)) for part in weights}
    rows = 0 if expert is None else len(expert.output)
    parts = {part: np.zeros((len(BITS), rows)) for part in (WHOLE, *weights)}
    for place, bits in enumerate(BITS):
        narrow = {part: to_grid(weight, bits, step).values() for part, weight in weights.items()}
        for part, weight in weights.items():
            grid[part][place] = float((narrow[part] - weight).square().sum(dtype=torch.float64))
        if expert is not None:
            for part, output in expert.outputs(narrow, alone=True):
                parts[part][place] = _squares(output - expert.output)
    if expert is None:
        return grid, None
    # The base of nested widths is no other than that width by itself.
    nested = [parts[WHOLE][BITS.index(NESTED[0])], *(_nested(weights, expert, bits, step) for bits in NESTED[1:])]
    return grid, Changes(_squares(expert.output), parts, np.stack(nested))


def _nested(weights: Mapping[str, Tensor], expert: Narrowed, bits: Bits, step: QuantizeStep) -> Array:
    within = step.model_copy(update={"nested": NESTED[0]})
    narrow = {part: to_grid(weight, bits, within).values() for part, weight in weights.items()}
    (_, output), *_ = expert.outputs(narrow, alone=False)
    return _squares(output - expert.output)


def outlier(weight: Tensor) -> float:
    """Largest over input channels of max |w| / mean |w| (QuantMoE-Bench, arXiv 2406.08155); ``weight`` is (out, in)."""
    size = weight.abs()
    return float((size.amax(0) / size.mean(0).clamp_min(torch.finfo(size.dtype).tiny)).max())


def _squares(values: Tensor) -> Array:
    """(tokens,) squared L2 norm of each row; 0 for a row with a value that is no finite number."""
    squares: Array = finite(values.float().square().sum(1)).double().cpu().numpy()
    return squares
