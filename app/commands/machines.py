"""Options that say on which machine a model is to run; shared by the commands that ask."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.commands.options import positive
from app.commands.plan import memory

if TYPE_CHECKING:
    from planner.machine import Machine

DEFAULT = "rtx4090"
"""The machine where nobody names one."""

PHASES = ("any", "prompt", "decode")


def add_machine(parser: argparse.ArgumentParser) -> None:
    """--machine, --vram, --ram, --link, --disk and --machines."""
    parser.add_argument(
        "--machine", metavar="NAME|FILE",
        help=f"a machine by name, or a file of moescope measure-device (default {DEFAULT}); --machines lists the names",
    )  # fmt: skip
    parser.add_argument("--vram", type=memory, metavar="SIZE", help="memory of the device that may be used, as 12GiB")
    parser.add_argument("--ram", type=_host, metavar="SIZE", help="host memory that experts may take; none = none")
    parser.add_argument("--link", metavar="NAME", help="host memory to device, as pcie4x16")
    parser.add_argument("--disk", metavar="NAME", help="disk for experts that host memory does not hold; none = none")
    parser.add_argument("--machines", action="store_true", help="list machines, links and disks by name")


def add_serving(parser: argparse.ArgumentParser) -> None:
    """--context, --batch, --chunk and --phase."""
    parser.add_argument("--context", type=positive, metavar="TOKENS", help="whose keys and values are kept (4096)")
    parser.add_argument("--batch", type=positive, metavar="N", help="sequences that are decoded together (default 1)")
    parser.add_argument(
        "--chunk", type=positive, metavar="TOKENS", help="read text so many tokens at a time, as prompts"
    )
    parser.add_argument("--phase", choices=PHASES, help="tokens that are replayed, one after another (default any)")


def _host(text: str) -> int:
    return 0 if text.strip().lower() in ("none", "0") else memory(text)


def machine_of(options: argparse.Namespace) -> Machine:
    """The machine that the options say.

    Raises:
        PlanError: no such machine, link or disk, or a file that is none.
    """
    from planner.machines import machine

    given: dict[str, Any] = {name: getattr(options, name) for name in ("vram", "ram", "link", "disk")}
    name = options.machine or DEFAULT
    if Path(name).suffix == ".json" or "/" in name:
        return machine(file=name, **given)
    return machine(name, **given)


def asked_of(options: argparse.Namespace) -> dict[str, Any]:
    """What the options say of how it is served, without what nobody said."""
    asked = {name: getattr(options, name, None) for name in ("context", "batch", "chunk", "phase", "other_weights")}
    return {name: value for name, value in asked.items() if value is not None}


def list_machines(*, as_json: bool) -> None:
    """Print machines, links and disks."""
    import json

    import polars as pl

    from app.text import size, table
    from planner.machines import DISKS, LINKS, MACHINES

    machines = [(one.name, one.title, size(one.vram), one.link.name, f"{one.device.bandwidth / 1e9:,.0f}")
                for one in MACHINES.values()]  # fmt: skip
    links = [(kind, one.name, f"{one.bandwidth / 1e9:,.3g}", f"{one.latency * 1e6:,.0f}")
             for kind, known in (("link", LINKS), ("disk", DISKS)) for one in known.values()]  # fmt: skip
    frames = (
        pl.DataFrame(machines, ("machine", "title", "usable memory", "link", "GB/s of the device"), orient="row"),
        pl.DataFrame(links, ("kind", "name", "GB/s", "latency, µs"), orient="row"),
    )
    if as_json:
        print(json.dumps({"machines": frames[0].to_dicts(), "links": frames[1].to_dicts()}))
        return
    print("\n\n".join(table(frame, rows=None) for frame in frames))
    print("\nFigures are nominal ones of data sheets, times 0.8; moescope measure-device measures yours.")
