"""How fast this machine is at what expert offloading needs: products, memory, copies to the accelerator, disk reads.

Everything is measured at the sizes of experts, several times; the figure is the median, beside the smallest and the
largest. Bursts are long enough for the clock, and their weights too many for the caches of a processor.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from app.disk_probe import read_speed
from planner.machine import Link, Machine, Processor
from planner.machines import UNIFIED, USABLE

HIDDEN, INNER = 2048, 1408
"""Of the expert that is multiplied: as large as those of DeepSeek-V2-Lite and Qwen1.5-MoE."""

TOKENS = 512
"""Of the products that show operations per second."""

SMALL = 64
"""Width of the expert whose time is taken as the cost of starting."""

HOST_ROOM, DEVICE_ROOM = 512 << 20, 2 << 30
"""Bytes of the experts that take turns, so that none is found in a cache; less where memory is short."""

COPY = 64 << 20
"""Bytes of a copy to the accelerator."""

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Figure:
    """One measured figure.

    Attributes:
        name: what it is.
        unit: of what is printed, such as ``GB/s``.
        median: in SI units.
        low: smallest.
        high: largest.
        repeats: measurements.
        how: in words.
    """

    name: str
    unit: str
    median: float
    low: float
    high: float
    repeats: int
    how: str

    @classmethod
    def of(cls, name: str, unit: str, values: list[float], how: str) -> Figure:
        """The figure of several measurements."""
        return cls(name, unit, statistics.median(values), min(values), max(values), len(values), how)


class Arithmetic(Protocol):
    """A library on a processor."""

    title: str
    value_bytes: int

    def weights(self, rows: int, columns: int) -> Any:
        """A matrix of small positive numbers."""

    def tokens(self, columns: int, count: int) -> Any:
        """Inputs (columns, count), a vector of one."""

    def expert(self, parts: tuple[Any, Any, Any], tokens: Any) -> None:
        """down @ (gate @ x * up @ x)."""

    def wait(self) -> None:
        """Until all that was asked for is done."""


class Numpy:
    """numpy in 32 bits."""

    title, value_bytes = "numpy, 32-bit weights", 4

    def __init__(self) -> None:
        import numpy as np

        self._random, self._copies = np.random.default_rng(0), np.tile
        self._type: Any = np.float32

    def weights(self, rows: int, columns: int) -> Any:
        """As :class:`Arithmetic` says."""
        line = self._random.random(columns, self._type) * self._type(1 / columns)
        return self._copies(line, (rows, 1))

    def tokens(self, columns: int, count: int) -> Any:
        """As :class:`Arithmetic` says."""
        return self._random.random((columns, count) if count > 1 else columns, self._type)

    def expert(self, parts: tuple[Any, Any, Any], tokens: Any) -> None:
        """As :class:`Arithmetic` says."""
        gate, up, down = parts
        down @ ((gate @ tokens) * (up @ tokens))

    def wait(self) -> None:
        """Nothing runs on."""


class Torch:
    """torch on a device, in one type."""

    def __init__(self, torch: Any, device: str, dtype: str) -> None:
        self._torch, self._device, self._dtype = torch, device, getattr(torch, dtype)
        self.value_bytes = self._dtype.itemsize
        self.title = f"torch on {device}, {8 * self.value_bytes}-bit weights"

    def weights(self, rows: int, columns: int) -> Any:
        """As :class:`Arithmetic` says."""
        line = (self._torch.rand(columns, device=self._device) / columns).to(self._dtype)
        return line.repeat(rows, 1)

    def tokens(self, columns: int, count: int) -> Any:
        """As :class:`Arithmetic` says."""
        shape = (columns, count) if count > 1 else (columns,)
        return self._torch.rand(shape, device=self._device).to(self._dtype)

    def expert(self, parts: tuple[Any, Any, Any], tokens: Any) -> None:
        """As :class:`Arithmetic` says."""
        gate, up, down = parts
        down @ ((gate @ tokens) * (up @ tokens))

    def wait(self) -> None:
        """As :class:`Arithmetic` says."""
        if self._device != "cpu":
            self._torch.cuda.synchronize()


def probe(*, folder: Path | None, seconds: float, tell: Tell) -> tuple[Machine, list[Figure]]:
    """This machine, and the figures behind it.

    Args:
        folder: on the disk that is read; None = no disk.
        seconds: about how long all may take, without loading libraries.
        tell: is told what is being measured.

    Raises:
        InputError: the folder cannot be written to, lies in memory, or has no room.
    """
    torch = _torch()
    accelerator = torch is not None and torch.cuda.is_available()
    share = seconds / (3 if accelerator else 2)
    figures: list[Figure] = []
    disk = None
    if folder is not None:
        tell(f"reads from {folder}")
        reading = read_speed(folder, seconds=share)
        figures += [
            Figure.of("disk read", "GB/s", reading.bandwidths, reading.how),
            Figure.of("disk latency", "µs", reading.latencies, "4 KiB at a time, at random places"),
        ]
        disk = Link(f"disk of {folder}", figures[-2].median, figures[-1].median)
    cores: list[Arithmetic] = [Numpy()]
    if torch is not None:
        cores += [Torch(torch, "cpu", "float32"), Torch(torch, "cpu", "bfloat16")]
    cpu = _processor("cpu", cores, share, min(HOST_ROOM, free_memory() // 4), figures, tell)
    free = int(free_memory() * USABLE)
    machine = Machine(
        name="measured", title=_title(), vram=free, ram=0, device=cpu, cpu=cpu, link=UNIFIED, disk=disk,
        measured=("cpu",) if disk is None else ("cpu", "disk"),
        note="measured by moescope measure-device; without an accelerator, host memory counts as the device's",
    )  # fmt: skip
    if not accelerator:
        return machine, figures
    room = min(DEVICE_ROOM, torch.cuda.mem_get_info()[0] // 4)
    device = _processor("device", [Torch(torch, "cuda", "bfloat16")], share / 2, room, figures, tell)
    link = _link(torch, share / 2, figures, tell)
    return Machine(
        name="measured", title=f"{torch.cuda.get_device_name()} in {_title()}",
        vram=int(torch.cuda.mem_get_info()[1] * USABLE), ram=free, device=device, cpu=cpu, link=link, disk=disk,
        measured=("device", "cpu", "link", *(("disk",) if disk is not None else ())),
        note="measured by moescope measure-device",
    ), figures  # fmt: skip


def _processor(
    name: str, libraries: list[Arithmetic], seconds: float, room: int, figures: list[Figure], tell: Tell
) -> Processor:
    """Bandwidth, products and overhead of a processor: of several libraries, whichever is fastest at each."""
    part = seconds / (3 * len(libraries))
    best: dict[str, Figure] = {}
    for library in libraries:
        tell(f"{name}: {library.title}")
        small = _expert(library, SMALL, SMALL)
        start = _bursts(library, [small], 1, 200, part)
        overhead = statistics.median(start)
        size = 3 * HIDDEN * INNER * library.value_bytes
        experts = [_expert(library, HIDDEN, INNER) for _ in range(max(2, math.ceil(room / size)))]
        reads = [size / max(one - overhead, 1e-9) for one in _bursts(library, experts, 1, len(experts), part)]
        operations = 2.0 * 3 * HIDDEN * INNER * TOKENS
        products = [operations / max(one - overhead, 1e-9) for one in _bursts(library, experts[:2], TOKENS, 2, part)]
        del experts
        for figure in (
            Figure.of(
                f"{name} reads weights", "GB/s", reads, f"experts of {size >> 20} MiB, one token; {library.title}"
            ),
            Figure.of(f"{name} products", "GFLOP/s", products, f"the same, {TOKENS} tokens; {library.title}"),
            Figure.of(f"{name} start", "µs", start, f"an expert {SMALL} wide; {library.title}"),
        ):
            other = best.get(figure.name)
            better = other is None or (figure.median < other.median) == (figure.unit == "µs")
            if better:
                best[figure.name] = figure
    figures += best.values()
    return Processor(*(one.median for one in best.values()))


def _expert(library: Arithmetic, hidden: int, inner: int) -> tuple[Any, Any, Any]:
    return library.weights(inner, hidden), library.weights(inner, hidden), library.weights(hidden, inner)


def _bursts(library: Arithmetic, experts: list[Any], tokens: int, length: int, seconds: float) -> list[float]:
    """Seconds per expert of bursts that go through all experts in turn; at least three, until the time is up."""
    inputs = library.tokens(experts[0][0].shape[1], tokens)
    found: list[float] = []
    end = time.perf_counter() + seconds
    for burst in range(1000):
        start = time.perf_counter()
        for turn in range(length):
            library.expert(experts[turn % len(experts)], inputs)
        library.wait()
        if burst:  # the first one warms up
            found.append((time.perf_counter() - start) / length)
        if len(found) >= 3 and time.perf_counter() > end:
            break
    return found


def _link(torch: Any, seconds: float, figures: list[Figure], tell: Tell) -> Link:
    """Copies from pinned host memory to the accelerator."""
    tell("copies to the accelerator")

    def copies(size: int) -> list[float]:
        here = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        there = torch.empty(size, dtype=torch.uint8, device="cuda")
        found: list[float] = []
        end = time.perf_counter() + seconds / 2
        for turn in range(1000):
            torch.cuda.synchronize()
            start = time.perf_counter()
            there.copy_(here, non_blocking=True)
            torch.cuda.synchronize()
            if turn:
                found.append(time.perf_counter() - start)
            if len(found) >= 3 and time.perf_counter() > end:
                break
        return found

    latencies = copies(4096)
    latency = statistics.median(latencies)
    bandwidths = [COPY / max(one - latency, 1e-9) for one in copies(COPY)]
    figures += [
        Figure.of("link", "GB/s", bandwidths, f"pinned memory to device, {COPY >> 20} MiB at a time"),
        Figure.of("link latency", "µs", latencies, "the same, 4 KiB at a time"),
    ]
    return Link("measured link", figures[-2].median, latency)


def free_memory() -> int:
    """Bytes of host memory that new work may take; half of all where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (ValueError, OSError, AttributeError):
        return 4 << 30


def _torch() -> Any:
    """The library, None where it is not installed or does not load."""
    try:
        import torch
    except (ImportError, OSError):
        return None
    return torch


def _title() -> str:
    """The processor's name, where the system says it."""
    import platform

    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} cores"
    except OSError:
        pass
    return f"{platform.processor() or platform.machine() or sys.platform}, {os.cpu_count()} cores"
