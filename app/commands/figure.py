"""``moescope figure``: one figure of a run as a file, without a server; or the list of all figures."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.commands.options import add_json, add_store

if TYPE_CHECKING:
    import store
    from app.exhibits import Exhibit

NAME = "figure"
SUMMARY = "write a figure of a run, or its data, to a file; without a name, list the figures"

PICTURES = ("svg", "png", "pdf")
FORMATS = (*PICTURES, "html", "csv", "parquet", "json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("target", metavar="RUN", help="path of a run, or its name in --store")
    parser.add_argument("name", nargs="?", metavar="NAME", help="which figure; without it, all are listed")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE",
        help=f"what to write, by its ending: {', '.join(PICTURES)} (they need moescope[images] and Chromium), html, or "
        "the data as csv, parquet or json; without it, the data is printed",
    )  # fmt: skip
    parser.add_argument(
        "--check", action="store_true", help="list whether the run has each, which draws them all: a minute"
    )
    chosen = parser.add_argument_group("choices", "each figure has some of them; the list says which")
    chosen.add_argument("--layer", metavar="L", help="the MoE layer (2.1 = second module of layer 2)")
    chosen.add_argument("--expert", metavar="E", help="number of the expert")
    chosen.add_argument("--domain", metavar="NAME", help="only its text")
    chosen.add_argument("--phase", choices=("prompt", "decode"), help="only its tokens")
    chosen.add_argument(
        "--set", dest="choices", action="append", default=[], metavar="NAME=VALUE", help="any other choice"
    )
    drawn = parser.add_argument_group("drawing")
    drawn.add_argument("--theme", choices=("light", "dark"), default="light", help="default light")
    drawn.add_argument("--width", type=_pixels, metavar="N", help="pixels (default 1000)")
    drawn.add_argument("--height", type=_pixels, metavar="N", help="pixels (default: the figure's own)")
    drawn.add_argument("--scale", type=_scale, default=2.0, metavar="X", help="pixels of a PNG per pixel (default 2)")
    add_store(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """List the figures, print the data of one, or write a file."""
    import store
    from app.frames.plain import ending
    from moescope.errors import InputError

    with store.open_run(store.Catalog(options.store).resolve(options.target)) as opened:
        if options.name is None:
            if options.output is not None:
                raise InputError("-o writes one figure: name it; moescope figure RUN lists them")
            _list(opened, options)
            return 0
        suffix = ending(options.output, FORMATS) if options.output is not None else ""
        told = _told(options)
        made = _make(opened, options, told)
        if options.output is None:
            _print(made, options)
            return 0
        from app.images import write_whole

        content = _content(made, suffix, opened, options, told)
        write_whole(options.output, content)
        print(f"{options.output}: {options.name} of {opened.name}, {len(content):,} bytes")
    return 0


def _list(opened: store.Run, options: argparse.Namespace) -> None:
    from app.frames.figures import figures, listed
    from app.telling import Telling
    from app.text import table

    frame = listed()
    if options.check:
        with Telling() as tell:
            frame = figures(opened, tell=tell)
    print(json.dumps(frame.to_dicts()) if options.json else table(frame, rows=None))


def _make(opened: store.Run, options: argparse.Namespace, told: dict[str, Any]) -> Exhibit:
    from app import exhibits

    return exhibits.make(options.name, opened, theme=options.theme, choices=told)


def _print(made: Exhibit, options: argparse.Namespace) -> None:
    from app.frames.plain import flat, records
    from app.text import table

    if options.json:
        print(records(made.frame))
    else:
        print(f"{made.alt}\n\n{table(flat(made.frame))}")


def _content(made: Exhibit, suffix: str, opened: store.Run, options: argparse.Namespace, told: dict[str, Any]) -> bytes:
    """The file that the ending asks for."""
    from app import images
    from app.frames.plain import encoded, records

    if suffix in ("csv", "parquet"):
        return encoded(made.frame, suffix)
    if suffix == "json":
        said = {"run": opened.name, "figure": options.name, "choices": told, "alt": made.alt, "read": made.read,
                "rests_on": made.rests_on, "data": json.loads(records(made.frame))}  # fmt: skip
        return (json.dumps(said, ensure_ascii=False) + "\n").encode()
    if suffix == "html":
        return images.page(made.figure, theme=options.theme, width=options.width, height=options.height)
    return images.picture(
        made.figure, suffix, theme=options.theme, width=options.width, height=options.height, scale=options.scale,  # type: ignore[arg-type]
    )  # fmt: skip


def _told(options: argparse.Namespace) -> dict[str, Any]:
    """The choices that were made, by name.

    Raises:
        InputError: ``--set`` without a name or a value.
    """
    from moescope.errors import InputError

    named = {name: getattr(options, name) for name in ("layer", "expert", "domain", "phase")}
    told = {name: value for name, value in named.items() if value is not None}
    for text in options.choices:
        name, found, value = text.partition("=")
        if not name or not found:
            raise InputError(f"--set {text!r}: write NAME=VALUE, such as --set scale=share")
        told[name.strip().replace("-", "_")] = value
    return told


def _pixels(text: str) -> int:
    if not text.isdigit() or not 50 <= int(text) <= 10_000:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of pixels, 50 to 10000")
    return int(text)


def _scale(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.1 <= value <= 10:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number, 0.1 to 10")
    return value
