"""``moescope measure-device``: how fast this machine computes, copies and reads, for time estimates of one's own."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from app import line
from app.commands.options import add_json

if TYPE_CHECKING:
    from app.device_probe import Figure
    from planner.machine import Machine

NAME = "measure-device"
SUMMARY = "measure how fast this machine computes, copies and reads from disk, for time estimates"
SECONDS = 16.0
"""About as long as all takes, if nobody says otherwise."""

_SCALES = {"GB/s": 1e-9, "GFLOP/s": 1e-9, "µs": 1e6}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the machine to this file (JSON)")
    parser.add_argument(
        "--disk", type=Path, metavar="DIR", default=Path(),
        help="folder on the disk that experts would be read from; a file of up to 1 GiB is written there and removed"
        " (default: this folder)",
    )  # fmt: skip
    parser.add_argument("--no-disk", action="store_true", help="measure no disk")
    parser.add_argument(
        "--seconds", type=_seconds, metavar="N", default=SECONDS, help=f"about how long (default: {SECONDS:g})"
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Measure, print the figures, and write the machine."""
    from app.device_probe import probe
    from moescope.errors import InputError
    from planner.machines import as_json

    if options.output is not None:
        _require_writable(options.output)

    def tell(text: str) -> None:
        line.over(f"measuring {text}")

    try:
        machine, figures = probe(folder=None if options.no_disk else options.disk, seconds=options.seconds, tell=tell)
    finally:
        line.clear()
    if options.output is not None:
        try:
            options.output.write_text(as_json(machine), encoding="utf-8")
        except OSError as error:
            raise InputError(f"{options.output} cannot be written: {error.strerror}") from error
    if options.json:
        content = {"machine": json.loads(as_json(machine)), "figures": [asdict(figure) for figure in figures]}
        print(json.dumps(content))
        return 0
    _print(machine, figures, options.output)
    return 0


def _print(machine: Machine, figures: list[Figure], output: Path | None) -> None:
    import polars as pl

    from app.text import size, table

    rows = [
        {
            "figure": one.name, "median": one.median * _SCALES[one.unit], "lowest": one.low * _SCALES[one.unit],
            "highest": one.high * _SCALES[one.unit], "unit": one.unit, "repeats": one.repeats, "how": one.how,
        }
        for one in figures
    ]  # fmt: skip
    print(f"{machine.title}\n")
    print(table(pl.DataFrame(rows)))
    print(f"\ndevice memory {size(machine.vram)}, host memory beside it {size(machine.ram)}")
    if output is not None:
        print(f"written to {output}")


def _require_writable(path: Path) -> None:
    from moescope.errors import InputError

    folder = path.parent
    if path.is_dir() or not folder.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise InputError(f"-o {path} cannot be written: give a file in a folder of yours")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value <= 600:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of seconds from 1 to 600")
    return value
