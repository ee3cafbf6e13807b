"""A machine that serves a model: its device, its memories, and the links between them.

All bandwidths are effective ones, in bytes per second. Presets have nominal figures times :data:`EFFICIENCY`; figures
measured on the user's own machine (``moescope measure-device``) replace them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from moescope.errors import PlanError

EFFICIENCY = 0.8
"""Part of a nominal bandwidth that copies are taken to reach where nobody measured; ours."""

GIB = 2**30


@dataclass(frozen=True)
class Link:
    """What weights are copied over.

    Attributes:
        name: how it is asked for.
        bandwidth: bytes per second that copies reach.
        latency: seconds before the first byte of a copy.
    """

    name: str
    bandwidth: float
    latency: float = 20e-6

    def seconds(self, size: float) -> float:
        """Time of one copy of ``size`` bytes."""
        return self.latency + size / self.bandwidth


@dataclass(frozen=True)
class Processor:
    """What multiplies: an accelerator, or the CPU.

    Attributes:
        bandwidth: bytes per second that it reads weights with; it bounds small batches.
        flops: floating-point operations per second of matrix products in 16 bits; they bound large ones.
        overhead: seconds that one expert takes beside that, for starting kernels.
    """

    bandwidth: float
    flops: float
    overhead: float = 5e-6

    def seconds(self, size: float, parameters: float, tokens: float) -> float:
        """Time of one expert of ``size`` bytes and ``parameters`` weights on ``tokens`` tokens."""
        return self.overhead + max(size / self.bandwidth, 2.0 * parameters * tokens / self.flops)


@dataclass(frozen=True)
class Machine:
    """One machine.

    Attributes:
        name: how it is asked for.
        title: in words.
        vram: bytes of the device's memory.
        ram: bytes of host memory that experts may take.
        device: the accelerator.
        cpu: runs experts where they lie in host memory.
        link: host memory to device.
        disk: disk to host memory; None = no disk is used.
        measured: figures that were measured rather than taken from data sheets, by name.
        note: what is known of them, for the reader.
    """

    name: str
    title: str
    vram: int
    ram: int
    device: Processor
    cpu: Processor
    link: Link
    disk: Link | None = None
    measured: tuple[str, ...] = field(default=())
    note: str = ""

    @property
    def shares_memory(self) -> bool:
        """Device and CPU have one memory: what is in it is never copied."""
        return self.link.bandwidth == float("inf")

    def __post_init__(self) -> None:
        for what, value in (
            ("device bandwidth", self.device.bandwidth), ("device flops", self.device.flops),
            ("cpu bandwidth", self.cpu.bandwidth), ("cpu flops", self.cpu.flops),
            ("link bandwidth", self.link.bandwidth),
            ("disk bandwidth", self.disk.bandwidth if self.disk is not None else 1.0),
        ):  # fmt: skip
            if not value > 0:
                raise PlanError(f"machine {self.name!r} has a {what} of {value}: give a number above 0")
