"""A packed checkpoint seen as a dense one: every packed matrix under the name that its values would have."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace

from compressor.checkpoint.files import Checkpoint, Reader, reading
from compressor.checkpoint.headers import FLOATS, Entry
from compressor.packed.entries import PackedEntry
from compressor.packed.parts import SUFFIXES
from compressor.packed.settings import Group, group_of, read_groups, stated_settings
from compressor.packed.words import words_for
from moescope.errors import ModelError

_ORDER = "weight_g_idx"
_BLOCKS = ("mlp", "block_sparse_moe", "feed_forward")
_PROJECTIONS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_PROJECTIONS |= {other: name for name, other in _PROJECTIONS.items()}


def dense_view(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with one entry per packed matrix in place of its tensors; itself where nothing is packed.

    Raises:
        ModelError: settings that are not supported, a matrix that no group names, or tensors that do not fit; one line
            that names it.
    """
    settings = stated_settings(checkpoint.config)
    if settings is None:
        return checkpoint
    try:
        groups = read_groups(settings)
    except ModelError as error:
        raise ModelError(f"{checkpoint.folder}: {error}") from error
    entries, shards = checkpoint.entries, {}
    with reading() as reader:
        for file, tensors in checkpoint.shards.items():
            shards[file] = list(_seen(tensors, entries, groups, reader))
    return replace(checkpoint, shards=shards)


def _seen(
    tensors: list[Entry], entries: dict[str, Entry], groups: tuple[Group, ...], reader: Reader
) -> Iterator[Entry]:
    for entry in tensors:
        module, _, suffix = entry.name.rpartition(".")
        if suffix == "weight_packed":
            yield _packed(module, entries, groups, reader)
        elif suffix not in (*SUFFIXES, _ORDER):
            yield entry
        elif f"{module}.weight_packed" not in entries:
            raise ModelError(f"{entry.file.parent} holds {entry.name} and no {module}.weight_packed")


def _packed(module: str, entries: dict[str, Entry], groups: tuple[Group, ...], reader: Reader) -> PackedEntry:
    def part(suffix: str) -> Entry:
        name = f"{module}.{suffix}"
        if name not in entries:
            raise ModelError(f"{packed.file.parent} holds {packed.name} and no {name}")
        return entries[name]

    packed = entries[f"{module}.weight_packed"]
    group = group_of(groups, names_of(module))
    if group is None:
        raise ModelError(f"no group of quantization_config names {module}, which is packed")
    shape = _shape(part("weight_shape"), reader)
    scale = part("weight_scale")
    zeros = None if group.symmetric else part("weight_zero_point")
    _require_fitting(group, packed, scale, zeros, shape)
    order = entries.get(f"{module}.{_ORDER}")
    if order is not None and (order.shape != (shape[1],) or order.dtype not in ("I32", "I64")):
        raise ModelError(f"{order.name} has shape {list(order.shape)} for {shape[1]} input channels")
    return PackedEntry(
        name=f"{module}.weight",
        dtype="F32",
        shape=shape,
        file=packed.file,
        start=packed.start,
        size=packed.size,
        bits=group.bits,
        packed=packed,
        scale=scale,
        zeros=zeros,
        order=order,
    )


def _shape(entry: Entry, reader: Reader) -> tuple[int, int]:
    if entry.shape != (2,) or entry.dtype not in ("I32", "I64"):
        raise ModelError(f"{entry.name} is no shape of a matrix: {entry.dtype} {list(entry.shape)}")
    rows, columns = (int(length) for length in reader.tensor(entry))
    if rows < 1 or columns < 1:
        raise ModelError(f"{entry.name} says ({rows}, {columns}), which is no shape of a matrix")
    return rows, columns


def _require_fitting(group: Group, packed: Entry, scale: Entry, zeros: Entry | None, shape: tuple[int, int]) -> None:
    """All tensors are those of a matrix of this shape and width."""
    rows, columns = shape
    wanted = (rows, words_for(columns, group.bits))
    if packed.dtype != "I32" or packed.shape != wanted:
        raise ModelError(
            f"{packed.name} is {packed.dtype} {list(packed.shape)}; {rows} x {columns} weights of {group.bits} bits"
            f" ({group.name} of quantization_config) would be I32 {list(wanted)}"
        )
    groups = columns // group.group_size if group.strategy == "group" else 1
    scales: tuple[tuple[int, ...], ...] = ((rows, groups),)
    if group.strategy == "tensor":
        scales = ((), (1,), (1, 1))
    elif groups == 1:
        scales = ((rows, 1), (rows,))
    if (group.strategy == "group" and columns % group.group_size) or scale.shape not in scales:
        what = f"groups of {group.group_size}" if group.strategy == "group" else f"one per {group.strategy}"
        raise ModelError(f"{scale.name} has shape {list(scale.shape)} for {rows} x {columns} weights, {what}")
    if scale.dtype not in FLOATS:
        raise ModelError(f"{scale.name} is {scale.dtype}, which is no type of scales that is supported")
    if zeros is None:
        return
    possible = {"I32": ((words_for(rows, group.bits), groups),), "I8": (scale.shape,)}
    if group.strategy == "tensor":
        possible.pop("I32")
    if zeros.shape not in possible.get(zeros.dtype, ()):
        raise ModelError(f"{zeros.name} is {zeros.dtype} {list(zeros.shape)} for scales of shape {list(scale.shape)}")


def names_of(module: str) -> Iterator[str]:
    """The name of a module on disk, and those that it may have in memory or by the names of another library.

    Mixtral's ``block_sparse_moe.experts.3.w1`` is ``mlp.experts.3.gate_proj`` to who quantizes it in memory.
    """
    found = re.match(r"^(?P<before>.*\.)(?P<block>\w+)(?P<middle>\.experts\.\d+\.)(?P<projection>\w+)$", module)
    yield module
    if not found:
        return
    blocks = [found["block"], *(block for block in _BLOCKS if block != found["block"])]
    own = found["projection"]
    projections = [own, *([_PROJECTIONS[own]] if own in _PROJECTIONS else [])]
    for block, projection in itertools.product(blocks, projections):
        name = f"{found['before']}{block}{found['middle']}{projection}"
        if name != module:
            yield name
