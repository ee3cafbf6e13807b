"""A grid as compressed-tensors stores it: packed codes, scales, zero points and the shape.

Codes are unsigned in both kinds of grids: the library adds ``2 ** (bits - 1)`` to its signed ones, and so do we. Zero
points are packed along the rows. Rows of codes and columns of zero points end on whole words, which may leave a part of
the last one empty. Scales are the 16-bit floats of the grid whatever the type of the model, so that what is read is
exactly :meth:`Grid.values`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compressor.packed.words import pack, words_for
from compressor.plan import QuantizeStep

if TYPE_CHECKING:
    from torch import Tensor

    from compressor.edits.quantize import Grid

SUFFIXES = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
"""The tensors of one matrix, behind the name of its module."""


def part_shapes(rows: int, columns: int, bits: int, step: QuantizeStep) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Suffix -> type and shape of the tensors that a (rows, columns) matrix becomes."""
    groups = columns // (step.group_size or columns)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "weight_packed": ("I32", (rows, words_for(columns, bits))),
        "weight_scale": ("F16", (rows, groups)),
        "weight_shape": ("I64", (2,)),
    }
    if not step.symmetric:
        shapes["weight_zero_point"] = ("I32", (words_for(rows, bits), groups))
    return shapes


def parts_of(grid: Grid) -> dict[str, Tensor]:
    """Suffix -> tensor."""
    import torch

    bits = int(grid.bits)
    codes = grid.codes if grid.zeros is not None else grid.codes + 2 ** (bits - 1)
    parts = {
        "weight_packed": pack(codes, bits),
        "weight_scale": grid.scales.half(),
        "weight_shape": torch.tensor(grid.codes.shape, dtype=torch.int64),
    }
    if grid.zeros is not None:
        parts["weight_zero_point"] = pack(grid.zeros.T, bits).T.contiguous()
    return parts
