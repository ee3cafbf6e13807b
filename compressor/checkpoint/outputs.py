"""What a file of the result is made of: ranges copied from the source, zeros, and what has to be computed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compressor.checkpoint.files import Reader
from compressor.checkpoint.headers import ITEM_BITS, Entry, header_bytes, size_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Copied:
    """Bytes of the source as they are: a range of the file of ``entry``."""

    entry: Entry
    start: int
    size: int


@dataclass(frozen=True)
class Zeros:
    """Bytes that are zero."""

    size: int


@dataclass(frozen=True)
class Made:
    """Bytes that are computed.

    Attributes:
        unit: what is computed together (one expert); pieces of one unit in a file are computed once.
        make: computes it.
        take: the piece's tensor of the outcome.
        size: bytes.
    """

    unit: Hashable
    make: Callable[[Reader], Any]
    take: Callable[[Any], Tensor]
    size: int


Piece = Copied | Zeros | Made


@dataclass(frozen=True)
class Output:
    """One tensor of the result.

    Attributes:
        name: its name.
        dtype: its type.
        shape: its shape.
        pieces: its bytes in order.
        edited: other than a tensor of the source, renamed at most.
        bits: width of the codes that it packs; None of all else.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    edited: bool = False
    bits: int | None = None

    @property
    def size(self) -> int:
        """Bytes."""
        return size_of(self.dtype, self.shape)


@dataclass(frozen=True)
class OutputFile:
    """One file of the result.

    Attributes:
        name: its name.
        tensors: in the order of their bytes.
        header: its first bytes.
    """

    name: str
    tensors: tuple[Output, ...]
    header: bytes

    @staticmethod
    def of(name: str, tensors: Iterable[Output], metadata: Mapping[str, str]) -> OutputFile:
        """Tensors in the order given, wider types first, so that all stand at multiples of their size."""
        ordered = tuple(sorted(tensors, key=lambda output: -ITEM_BITS[output.dtype]))
        return OutputFile(
            name, ordered, header_bytes(((output.name, output.dtype, output.shape) for output in ordered), metadata)
        )

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(output.size for output in self.tensors)


def whole(entry: Entry, name: str) -> Output:
    """A tensor of the source under a name of its own."""
    return Output(name, entry.dtype, entry.shape, (Copied(entry, entry.start, entry.size),))
