"""A matrix that a file holds packed, as if it held its values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compressor.checkpoint.headers import Entry

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PackedEntry(Entry):
    """The matrix ``<module>.weight`` that several tensors stand for; its values are float32.

    Attributes:
        bits: width.
        packed: its codes, (R, words) int32.
        scale: (R, G), (R, 1) or a single number.
        zeros: codes that stand for 0, packed along the rows or as signed bytes; None on symmetric grids.
        order: (C,) the group that each input channel belongs to; None where they follow each other.
    """

    bits: int = 0
    packed: Entry | None = None
    scale: Entry | None = None
    zeros: Entry | None = None
    order: Entry | None = None

    def values(self, read: Callable[[Entry], Tensor]) -> Tensor:
        """(R, C) float32.

        Args:
            read: gives a tensor of the files.
        """
        import torch

        from compressor.packed.words import unpack

        assert self.packed is not None and self.scale is not None
        rows, columns = self.shape
        codes = unpack(read(self.packed), self.bits, columns).float()
        scale = read(self.scale).float().reshape(-1, self._groups)
        zero = self._zero(read)
        if self.order is not None and bool(((order := read(self.order).long()) >= 0).all()):
            wide = zero[:, order] if isinstance(zero, torch.Tensor) else zero
            return (codes - wide) * scale[:, order]
        grouped = codes.reshape(rows, self._groups, -1)
        grouped -= zero[..., None] if isinstance(zero, torch.Tensor) else zero
        grouped *= scale[..., None]
        return grouped.reshape(rows, columns)

    @property
    def _groups(self) -> int:
        assert self.scale is not None
        return self.scale.shape[1] if len(self.scale.shape) == 2 else 1

    def _zero(self, read: Callable[[Entry], Tensor]) -> Tensor | float:
        """What is subtracted from the unsigned codes: (R, G) or (1, 1), or one number."""
        from compressor.packed.words import unpack

        half = 2.0 ** (self.bits - 1)
        if self.zeros is None:
            return half
        stored = read(self.zeros)
        if self.zeros.dtype != "I32":  # where they are not packed, they are signed
            return stored.float().reshape(-1, self._groups) + half
        return unpack(stored.T.contiguous(), self.bits, self.shape[0]).T.float()
