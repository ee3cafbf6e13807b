"""``moescope export``: a plan in the words of an engine: widths, where experts lie, and on which device."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from app.commands.options import add_config, add_json

if TYPE_CHECKING:
    from compressor.exporters import Exported

NAME = "export"
SUMMARY = "write a plan's widths, caches or placements for another engine"

SHOWN = 10
"""Sentences about what is left out that are printed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "plan",
        metavar="PLAN",
        type=Path,
        nargs="?",
        help="a plan with a step that the engine knows: quantize, cache or place",
    )
    parser.add_argument("--to", metavar="ENGINE", help="the engine; --list names all")
    parser.add_argument(
        "-o",
        "--output",
        metavar="PATH",
        type=Path,
        help="file to write (default: standard output; a must for binary files)",
    )
    parser.add_argument(
        "--list", action="store_true", help="list the engines, and the step of a plan that each file speaks of"
    )
    add_config(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Write the file; what it cannot say is told on stderr."""
    from compressor.exporters import exporter
    from compressor.plan import Plan
    from moescope.errors import InputError

    if options.list:
        _list(options.json)
        return 0
    if options.plan is None or options.to is None:
        raise InputError("what, and for whom? give PLAN and --to ENGINE; --list names the engines")
    engine = exporter(options.to)
    exported = engine.export(Plan.load(options.plan))
    if options.output is not None:
        _write(options.output, exported.content)
    elif exported.binary is None:
        print(exported.text, end="")
    else:
        raise InputError(f"the file for {engine.name} is binary: say where to write it, -o NAME{engine.suffix}")
    _tell(options, exported)
    return 0


def _list(as_json: bool) -> None:
    import json

    from compressor.exporters import EXPORTERS

    if as_json:
        fields = ("name", "title", "suffix", "step")
        print(json.dumps([{field: getattr(one, field) for field in fields} for one in EXPORTERS]))
        return
    width = max(len(one.name) for one in EXPORTERS)
    for one in EXPORTERS:
        print(f"{one.name:{width}}  {one.step:8}  {one.title} ({one.suffix})")


def _write(path: Path, content: bytes) -> None:
    from moescope.errors import InputError

    try:
        path.write_bytes(content)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error


def _tell(options: argparse.Namespace, exported: Exported) -> None:
    import json

    if options.json and options.output is not None:
        content = {"path": str(options.output), "left_out": exported.left_out, "notes": exported.notes}
        print(json.dumps(content))
        return
    for note in exported.notes:
        print(f"note: {note}", file=sys.stderr)
    missing = exported.left_out
    for sentence in missing[:SHOWN]:
        print(f"left out: {sentence}", file=sys.stderr)
    if len(missing) > SHOWN:
        print(f"left out: {len(missing) - SHOWN} more; --json with -o lists all", file=sys.stderr)
    if options.output is not None:
        print(f"{options.output}: written for {options.to}" + (f", {len(missing)} left out" if missing else ""))
