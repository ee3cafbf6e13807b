"""Weights of a packed checkpoint as the library takes them: read, and given their values, when it asks for them.

The library materialises what it loads by ``tensor[...]``, one tensor after the other, as it does with slices of
safetensors files. So memory holds the dense model, and the experts of the layer that is put together at the moment.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.checkpoint.files import Checkpoint
from compressor.checkpoint.headers import Entry
from compressor.packed.entries import PackedEntry
from compressor.packed.view import dense_view

_EXPERT = re.compile(r"(?P<before>\.experts\.\d+\.)(?P<projection>gate_proj|up_proj|down_proj)\.")
_NUMBERED = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


class Unpacked:
    """A packed matrix that has its values when it is indexed, each time anew."""

    def __init__(self, entry: PackedEntry, read: Callable[[Entry], Tensor]) -> None:
        self._entry, self._read = entry, read

    @property
    def shape(self) -> torch.Size:
        """(R, C)."""
        return torch.Size(self._entry.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return torch.float32

    def is_floating_point(self) -> bool:
        """As a tensor says it."""
        return True

    def __getitem__(self, key: Any) -> Tensor:
        return self._entry.values(self._read)[key]


@contextmanager
def dense_state(folder: Path, model_type: str) -> Iterator[dict[str, Any]]:
    """Name -> what gives the tensor when it is indexed; the files stay open as long as the block runs.

    Args:
        folder: of a checkpoint of compressed-tensors.
        model_type: family, whose names of experts are given where other libraries wrote those in memory.

    Raises:
        ModelError: the checkpoint is damaged, or packed in a way that is not supported.
    """
    from safetensors import safe_open

    checkpoint = dense_view(Checkpoint.open(folder))
    numbered = _takes_numbered(model_type)
    with ExitStack() as stack:
        opened = {
            path: stack.enter_context(safe_open(path, framework="pt"))
            for path in (checkpoint.folder / name for name in checkpoint.shards)
        }

        def read(entry: Entry) -> Tensor:
            tensor: Tensor = opened[entry.file].get_tensor(entry.name)
            return tensor

        dense: dict[str, Any] = {}
        packed: dict[str, Any] = {}
        for entry in checkpoint.entries.values():
            name = _EXPERT.sub(_as_numbered, entry.name) if numbered else entry.name
            if isinstance(entry, PackedEntry):
                packed[name] = Unpacked(entry, read)
            else:
                dense[name] = opened[entry.file].get_slice(entry.name)
        yield dense | packed


def _takes_numbered(model_type: str) -> bool:
    """The family's files call the projections of experts w1, w2 and w3."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    known = get_checkpoint_conversion_mapping(model_type) or ()
    patterns = [pattern for entry in known for pattern in getattr(entry, "source_patterns", ())]
    return any("experts" in pattern and ".w1." in pattern for pattern in patterns)


def _as_numbered(found: re.Match[str]) -> str:
    return f"{found['before']}{_NUMBERED[found['projection']]}."
