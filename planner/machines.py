"""Machines by name, from data sheets, and machines from files, as they were measured.

::

    machine("rtx4090", ram=64 * GIB)                       # a preset, with other memory
    machine("rtx4090", link="pcie3x16", disk="sata")       # in an older computer
    machine(file="machine.json")                           # what moescope measure-device wrote
    machine("rtx4090", file="machine.json")                # the preset, with whatever was measured

Bandwidths and products per second of presets are nominal ones, of the makers' data sheets, times
:data:`planner.machine.EFFICIENCY`: none of them was measured here. Products are dense ones in 16 bits with sums in 32.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from moescope.errors import PlanError
from moescope.sizes import size
from planner.machine import EFFICIENCY, GIB, Link, Machine, Processor

NOTE = f"nominal figures x {EFFICIENCY}, not measured here"
FORMAT, VERSION = "moescope machine", 1
DEFAULT_RAM = 32 * GIB
USABLE = 0.9
"""Part of a device's memory that weights, keys and values may take: the rest is the engine's and the driver's; ours."""

PARTS = ("device", "cpu", "link", "disk")
"""What a file may have measured."""


def _link(name: str, nominal: float, latency: float) -> Link:
    return Link(name, nominal * EFFICIENCY, latency)


def _processor(bandwidth: float, flops: float, overhead: float) -> Processor:
    return Processor(bandwidth * EFFICIENCY, flops * EFFICIENCY, overhead)


UNIFIED = Link("unified", float("inf"), 0.0)
"""Device and CPU share one memory: what is in it need not be copied."""

LINKS = {
    one.name: one
    for one in (
        _link("pcie3x8", 7.88e9, 20e-6), _link("pcie3x16", 15.75e9, 20e-6), _link("pcie4x8", 15.75e9, 20e-6),
        _link("pcie4x16", 31.5e9, 20e-6), _link("pcie5x8", 31.5e9, 20e-6), _link("pcie5x16", 63.0e9, 20e-6),
        _link("nvlink-c2c", 450e9, 10e-6),  # 900 GB/s in both directions together
        _link("usb4", 4.0e9, 50e-6),  # 32 of its 40 Gbit/s are for PCIe
        UNIFIED,
    )
}  # fmt: skip
"""Host memory to device, in one direction."""

DISKS = {
    one.name: one
    for one in (
        _link("nvme-gen3", 3.5e9, 100e-6), _link("nvme-gen4", 7.0e9, 80e-6), _link("nvme-gen5", 14.0e9, 70e-6),
        _link("sata", 0.55e9, 150e-6), _link("hdd", 0.2e9, 10e-3),
    )
}  # fmt: skip
"""Sequential reads. Sustained reads of large files may be slower: HOBBIT (arXiv 2411.01433) saw about 3 GB/s of 7."""

_DESKTOP = _processor(89.6e9, 1.5e12, 10e-6)  # two channels of DDR5-5600, 16 cores
_SERVER = _processor(307.2e9, 6e12, 10e-6)  # eight channels of DDR5-4800, 32 cores with 512-bit units
_GRACE = _processor(500e9, 7e12, 10e-6)  # LPDDR5X

# name: title, GB of memory, GB/s, 16-bit TFLOP/s, link, CPU
_DEVICES: dict[str, tuple[str, float, float, float, str, Processor]] = {
    "rtx3060": ("NVIDIA GeForce RTX 3060 12 GB", 12, 360, 25.5, "pcie4x16", _DESKTOP),
    "rtx3090": ("NVIDIA GeForce RTX 3090", 24, 936, 71, "pcie4x16", _DESKTOP),
    "rtx4090": ("NVIDIA GeForce RTX 4090", 24, 1008, 165, "pcie4x16", _DESKTOP),
    "rtx5090": ("NVIDIA GeForce RTX 5090", 32, 1792, 209, "pcie5x16", _DESKTOP),
    "a6000": ("NVIDIA RTX A6000", 48, 768, 155, "pcie4x16", _SERVER),
    "l40s": ("NVIDIA L40S", 48, 864, 362, "pcie4x16", _SERVER),
    "a100-80g": ("NVIDIA A100 SXM 80 GB", 80, 2039, 312, "pcie4x16", _SERVER),
    "h100-80g": ("NVIDIA H100 SXM 80 GB", 80, 3350, 989, "pcie5x16", _SERVER),
    "h200": ("NVIDIA H200 SXM", 141, 4800, 989, "pcie5x16", _SERVER),
    "gh200": ("NVIDIA GH200, 96 GB", 96, 4000, 989, "nvlink-c2c", _GRACE),
}


def _preset(name: str) -> Machine:
    title, memory, bandwidth, flops, link, cpu = _DEVICES[name]
    return Machine(
        name=name, title=title, vram=int(memory * GIB * USABLE), ram=DEFAULT_RAM,
        device=_processor(bandwidth * 1e9, flops * 1e12, 5e-6), cpu=cpu, link=LINKS[link], disk=DISKS["nvme-gen4"],
        note=NOTE,
    )  # fmt: skip


_APPLE = _processor(546e9, 34e12, 10e-6)

MACHINES = {name: _preset(name) for name in _DEVICES} | {
    "m4-max": Machine(
        name="m4-max", title="Apple M4 Max, 64 GB of memory that CPU and GPU share", vram=int(64 * GIB * 0.75), ram=0,
        device=_APPLE, cpu=replace(_APPLE, flops=2e12 * EFFICIENCY), link=UNIFIED, disk=DISKS["nvme-gen4"],
        note=f"{NOTE}; Apple publishes no products per second: 34 TFLOP/s are not verified",
    ),
    "cpu-desktop": Machine(
        name="cpu-desktop", title="a desktop CPU without an accelerator: two channels of DDR5-5600", vram=DEFAULT_RAM,
        ram=0, device=_DESKTOP, cpu=_DESKTOP, link=UNIFIED, disk=DISKS["nvme-gen4"],
        note=f"{NOTE}; host memory counts as the device's",
    ),
    "cpu-server": Machine(
        name="cpu-server", title="a server CPU without an accelerator: eight channels of DDR5-4800", vram=256 * GIB,
        ram=0, device=_SERVER, cpu=_SERVER, link=UNIFIED, disk=DISKS["nvme-gen4"],
        note=f"{NOTE}; host memory counts as the device's",
    ),
}  # fmt: skip
"""Presets by name. 9/10 of the device's memory may be used; Apple's systems leave the GPU 3/4 by default."""


def machine(
    name: str | None = None,
    *,
    vram: int | None = None,
    ram: int | None = None,
    link: str | Link | None = None,
    disk: str | Link | None = None,
    file: str | Path | None = None,
) -> Machine:
    """A machine by its name or from a file, with whatever else is said of it.

    Args:
        name: of a preset; None = the machine of the file.
        vram: bytes of the device's memory that may be used.
        ram: bytes of host memory that experts may take; none where device and CPU share one memory.
        link: host memory to device, by name.
        disk: by name; ``none`` = no disk is used.
        file: of ``moescope measure-device``. With a name, what was measured replaces the preset's figures.

    Raises:
        PlanError: neither a name nor a file, no such machine, link or disk, sizes that are none, or a file that is no
            machine.
    """
    if name is None and file is None:
        raise PlanError(f"which machine? name one of {', '.join(MACHINES)}, or give a file of moescope measure-device")
    measured = None if file is None else load(file)
    found = measured if name is None else _named(name, MACHINES, "machine")
    assert found is not None
    if name is not None and measured is not None:
        found = replace(
            found, measured=measured.measured, note=f"{found.note}; measured: {', '.join(measured.measured)}",
            **{part: getattr(measured, part) for part in measured.measured},
        )  # fmt: skip
    for what, given in (("vram", vram), ("ram", ram)):
        if given is not None and given < (1 if what == "vram" else 0):
            raise PlanError(f"{what} of {given} bytes is none: give a size such as 12GiB")
    changes: dict[str, Any] = {}
    if vram is not None:
        changes["vram"] = int(vram)
    if ram is not None:
        changes["ram"] = int(ram)
    if link is not None:
        changes["link"] = _named(link, LINKS, "link") if isinstance(link, str) else link
    if disk is not None:
        changes["disk"] = None if disk == "none" else _named(disk, DISKS, "disk") if isinstance(disk, str) else disk
    left = tuple(part for part in found.measured if part not in changes)
    made = replace(found, measured=left, **changes)
    if not made.shares_memory:
        return made
    if ram:
        raise PlanError(
            f"machine {made.name!r} has one memory for device and CPU, and no {size(ram)} beside it: give all of it as"
            " vram"
        )
    return replace(made, ram=0)


def _named(name: str, known: dict[str, Any], what: str) -> Any:
    key = name.strip().lower().replace(" ", "-").replace("_", "-")
    if key in known:
        return known[key]
    close = difflib.get_close_matches(key, known, n=2, cutoff=0.6)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise PlanError(f"no {what} {name!r}: {hint}there are {', '.join(known)}")


# --- files ---


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)


_Rate = Annotated[float, Field(ge=1e6, le=1e14)]  # 1 MB/s to 100 TB/s
_Seconds = Annotated[float, Field(ge=0, le=10)]
_Size = Annotated[int, Field(ge=0, le=2**50)]


class _LinkRecord(_Strict):
    name: str = Field(min_length=1, max_length=100)
    bandwidth: _Rate | None = Field(description="null: nothing is copied")
    latency: _Seconds


class _ProcessorRecord(_Strict):
    bandwidth: _Rate
    flops: float = Field(ge=1e6, le=1e18)
    overhead: _Seconds


class _MachineRecord(_Strict):
    format: Literal["moescope machine"]
    version: Literal[1]
    name: str = Field(min_length=1, max_length=100)
    title: str = Field(max_length=500)
    vram: Annotated[int, Field(ge=1, le=2**50)]
    ram: _Size
    device: _ProcessorRecord
    cpu: _ProcessorRecord
    link: _LinkRecord
    disk: _LinkRecord | None
    measured: list[Literal["device", "cpu", "link", "disk"]]
    note: str = Field(default="", max_length=5000)

    @model_validator(mode="after")
    def _disk_reads(self) -> _MachineRecord:
        if self.disk is not None and self.disk.bandwidth is None:
            raise ValueError("a disk needs a bandwidth")
        if "disk" in self.measured and self.disk is None:
            raise ValueError("the disk cannot have been measured where there is none")
        return self


def as_json(machine: Machine) -> str:
    """The text of a machine's file."""
    record = {"format": FORMAT, "version": VERSION, **asdict(machine), "measured": list(machine.measured)}
    if record["link"]["bandwidth"] == float("inf"):
        record["link"]["bandwidth"] = None
    return json.dumps(record, indent=2, allow_nan=False) + "\n"


def load(path: str | Path) -> Machine:
    """A machine from its file.

    Raises:
        PlanError: no such file, or one that is no machine: what is wrong is named.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(
            f"machine file {path} cannot be read: {getattr(error, 'strerror', None) or error};"
            " moescope measure-device -o FILE writes one"
        ) from error
    try:
        record = _MachineRecord.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise PlanError(
            f"machine file {path}: {place}: {first['msg']}; moescope measure-device -o FILE writes one that works"
        ) from error
    return Machine(
        name=record.name, title=record.title, vram=record.vram, ram=record.ram,
        device=Processor(**record.device.model_dump()), cpu=Processor(**record.cpu.model_dump()),
        link=_as_link(record.link), disk=None if record.disk is None else _as_link(record.disk),
        measured=_in_order(record.measured), note=record.note,
    )  # fmt: skip


def _as_link(record: _LinkRecord) -> Link:
    return Link(record.name, float("inf") if record.bandwidth is None else record.bandwidth, record.latency)


def _in_order(parts: Iterable[str]) -> tuple[str, ...]:
    named = set(parts)
    return tuple(part for part in PARTS if part in named)
