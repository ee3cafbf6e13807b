"""The memory that streaming a checkpoint takes, from shapes alone, and whether it fits."""

from __future__ import annotations

import os
import resource
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from moescope.errors import ModelError
from profiler.capture.discovery import MoEModel
from profiler.capture.levels import RecordingOptions
from profiler.capture.placement import parse_size
from profiler.inspect.memory import extra_memory

GIB = 1 << 30

KERNELS = 1152 << 20
"""Products of matrices in 16 bits on a CPU: for each shape, and experts get ever other numbers of tokens, the library
makes a kernel and keeps the last 1024 (measured: 0.65 MiB each, whatever the size); memory has holes between them."""

SHARE = 0.8
"""Part of the free memory that is taken where no limit is given."""


@dataclass(frozen=True)
class StreamMemory:
    """Bytes at the peak of a streamed collection.

    Attributes:
        process: what the process has now, and kernels that it will make.
        outside: embeddings, norms and whatever else stands around the decoder layers.
        layer: the largest decoder layer, with what converting it takes.
        batch: the largest batch in a layer.
        recording: the sums and the trace of one layer, and what recorders need for a batch.
        hidden: the hidden states of all batches.
    """

    process: int
    outside: int
    layer: int
    batch: int
    recording: int
    hidden: int

    def peak(self, *, on_disk: bool) -> int:
        """Bytes of the whole process; hidden states count where they wait in memory."""
        return self.process + self.outside + self.layer + self.batch + self.recording + (0 if on_disk else self.hidden)

    def sentence(self, *, on_disk: bool) -> str:
        """What is expected, for people."""
        where = "on disk" if on_disk else "in memory"
        return f"peak {_gib(self.peak(on_disk=on_disk))} expected, hidden states ({_gib(self.hidden)}) {where}"


def expected_memory(
    found: MoEModel,
    *,
    outside: int,
    layer: int,
    shapes: Sequence[tuple[int, ...]],
    options: RecordingOptions,
    domains: int,
    device: str = "cpu",
) -> StreamMemory:
    """The memory of a streamed collection.

    Args:
        found: the model, without weights.
        outside: bytes of the weights around the decoder layers.
        layer: bytes of the largest decoder layer.
        shapes: (rows, tokens) of each batch, padding included.
        options: what is recorded.
        domains: number of domains.
        device: type of the device that the layers run on.
    """
    weights = [parameter for module in found.stack for parameter in module.parameters()]
    width = max((parameter.element_size() for parameter in weights), default=4)
    kernels = KERNELS if width == 2 and device == "cpu" else 0
    hidden = _number(found, "hidden_size", 0) * _number(found, "hc_mult", 1)
    rows, length = max(shapes, key=prod, default=(0, 0))
    tokens = sum(prod(shape) for shape in shapes)
    alone = [replace(found, layers=[entry]) for entry in found.layers]
    recording = [
        extra_memory(part, options, batch=rows * length, tokens=tokens, domains=domains).total for part in alone
    ]
    return StreamMemory(
        process=_resident() + kernels,
        outside=outside,
        layer=layer,
        batch=_batch_bytes(found, rows, length, hidden, width),
        recording=max(recording, default=0),
        hidden=tokens * hidden * width,
    )


def _batch_bytes(found: MoEModel, rows: int, length: int, hidden: int, width: int) -> int:
    """Residual stream, attention and the experts' rows of one batch in one layer."""
    heads = _number(found, "num_attention_heads", 0)
    size = _number(found, "head_dim", 0) or hidden // max(1, heads)
    attention = rows * length * (4 * heads * size * width + length * 4)
    if getattr(found.config, "_attn_implementation", "") == "eager":
        attention += 2 * rows * heads * length * length * 4
    dense = 3 * _number(found, "intermediate_size", 0) * width
    blocks = [entry.top_k * (2 * hidden + 3 * entry.expert_width) * width for entry in found.layers]
    return attention + rows * length * (hidden * (8 * width + 12) + max([dense, *blocks]))


def require_memory(expected: StreamMemory, limit: int | str | None, on_disk: bool) -> bool:
    """Whether hidden states wait on disk.

    Args:
        expected: what is needed.
        limit: bytes of the whole process, also as ``3GiB``; a share of what is free if None.
        on_disk: they are wanted on disk in any case.

    Raises:
        ModelError: one layer and one batch do not fit, with the numbers.
        InputError: a limit that is no size.
    """
    free = round(SHARE * (_available() or sys.maxsize))
    allowed = parse_size(limit) if limit is not None else expected.process + free
    needed = expected.peak(on_disk=True)
    if needed > allowed:
        name = "the memory limit is" if limit is not None else "there are free"
        raise ModelError(
            f"one layer at a time takes {_gib(needed)} ({_gib(expected.layer)} the largest layer,"
            f" {_gib(expected.outside)} weights around the layers, {_gib(expected.batch)} a batch,"
            f" {_gib(expected.recording)} recording, {_gib(expected.process)} the process itself), {name}"
            f" {_gib(allowed)}: use a smaller --batch-size or --sequence-length, or a higher --memory-limit"
        )
    return on_disk or expected.peak(on_disk=False) > allowed


def _number(found: MoEModel, name: str, otherwise: int) -> int:
    """A number of the configuration; where layers differ in it, the configuration refuses to say."""
    try:
        return int(getattr(found.config, name, None) or otherwise)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return otherwise


def require_disk(folder: Path, needed: int) -> None:
    """Refuse hidden states that the disk has no room for.

    Raises:
        ModelError: with both numbers.
    """
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ModelError(
            f"hidden states take up to {_gib(needed)}, and {folder} has {_gib(free)} free: name another --scratch, or"
            " use less --tokens"
        )


def _resident() -> int:
    """Bytes of this process that are in memory now."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        peak: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak << 10


def _available() -> int | None:
    """Bytes of memory that are free on this machine; None where nothing says so."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")), None)


def _gib(size: int) -> str:
    return f"{size / GIB:.3g} GiB"
