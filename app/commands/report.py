"""``moescope report``: a run as one file: provenance, findings with their evidence, and every figure."""

from __future__ import annotations

import argparse
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING

from app.commands.options import add_memory_limit, add_store
from app.commands.within import within

if TYPE_CHECKING:
    import store
    from app.report.document import Tell

NAME = "report"
SUMMARY = "write a run as one file that opens from disk: provenance, findings with their evidence, every figure"

FORMATS = ("html", "md")
THEMES = ("auto", "light", "dark")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("target", metavar="RUN", help="path of a run, or its name in --store")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="what to write (default: report.html or .md)")
    parser.add_argument("--format", choices=FORMATS, help="html, or md for a ticket (default: by the file's name)")
    parser.add_argument(
        "--theme", choices=THEMES, default="auto", help="html: colours at first (default: the reader's)"
    )
    parser.add_argument(
        "--layers", type=_layers, default=3, metavar="N",
        help="how many layers are shown expert by expert, the most telling ones (default 3)",
    )  # fmt: skip
    parser.add_argument("--no-text", action="store_true", help="leave out the text that the run keeps")
    parser.add_argument(
        "--figures", type=Path, metavar="DIR", help="md: write every figure as SVG there (needs kaleido)"
    )
    parser.add_argument("--force", action="store_true", help="replace a file that is there")
    add_memory_limit(parser)
    add_store(parser)


def run(options: argparse.Namespace) -> int:
    """Write the report; the file appears whole or not at all."""
    return within(options, _run)


def _run(options: argparse.Namespace) -> int:
    import store
    from app.images import write_whole
    from app.progress import Stoppable
    from app.telling import Telling

    form, output = _output(options)
    began = time.monotonic()
    path = store.Catalog(options.store).resolve(options.target)
    with Stoppable(), store.open_run(path, text=not options.no_text) as opened:
        with Telling() as tell:
            content = _content(opened, options, form, tell)
        write_whole(output, content)
    said = " (still being collected: what is published so far)" if opened.live else ""
    print(f"{output}: {len(content) / 1e6:.2f} MB in {time.monotonic() - began:.1f} s{said}")
    return 0


def _content(opened: store.Run, options: argparse.Namespace, form: str, tell: Tell) -> bytes:
    from app.report.document import compose

    document = compose(
        opened, command=command(opened.name, options, form), layers=options.layers, both=form == "html", tell=tell
    )
    if form == "md":
        from app.report.markdown import pictures, text

        drawn = pictures(document, options.figures, tell=tell) if options.figures else {}
        return text(document, figures=drawn).encode()
    from app.report.html import page

    return page(document, theme=options.theme, tell=tell).encode()


def command(name: str, options: argparse.Namespace, form: str) -> str:
    """The command that makes this report, with the run's name instead of its path."""
    words = ["moescope", "report", name, "-o", f"report.{form}"]
    words += ["--theme", options.theme] if options.theme != "auto" else []
    words += ["--layers", str(options.layers)] if options.layers != 3 else []
    words += ["--no-text"] if options.no_text else []
    return shlex.join(words)


def _output(options: argparse.Namespace) -> tuple[str, Path]:
    """Format and file, by what was said of either.

    Raises:
        InputError: the file is there, or its folder is not; pictures beside HTML.
    """
    from moescope.errors import InputError

    given: Path | None = options.output
    form = options.format or ("md" if given is not None and given.suffix.lower() in (".md", ".markdown") else "html")
    output = given or Path(f"report.{form}")
    if options.figures and form != "md":
        raise InputError("--figures goes with --format md: the HTML report draws its figures itself")
    if output.is_dir():
        raise InputError(f"{output} is a folder: name the file, as in -o {output / f'report.{form}'}")
    if not output.parent.is_dir():
        raise InputError(f"there is no folder {output.parent}: make it first, or name another file with -o")
    if output.exists() and not options.force:
        raise InputError(f"{output} is there already: name another file with -o, or replace it with --force")
    return form, output


def _layers(given: str) -> int:
    try:
        number = int(given)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{given!r} is no number of layers") from None
    if not 0 <= number <= 64:
        raise argparse.ArgumentTypeError(f"{given!r} must be from 0 to 64")
    return number
