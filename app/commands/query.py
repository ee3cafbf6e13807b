"""``moescope query``: SQL over one run or several, read-only and within limits."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from app.commands.options import add_json, add_store, positive

if TYPE_CHECKING:
    import store

NAME = "query"
SUMMARY = "ask a run, or several as one, a question in SQL; nothing but the runs can be read, and nothing written"

_LETTERS = 200
"""Of a cell of the printed table; files, JSON and CSV hold it whole."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "words", nargs="*", metavar="RUN... SQL",
        help="runs by path or by name in --store, then the question; - reads it from standard input. Of several runs, "
        "every table has the column run",
    )  # fmt: skip
    parser.add_argument("--examples", action="store_true", help="print questions to begin with")
    parser.add_argument("--rows", type=positive, default=10_000, metavar="N", help="at most so many (default 10000)")
    parser.add_argument("--seconds", type=_seconds, default=10.0, metavar="X", help="at most so long (default 10)")
    parser.add_argument("--csv", action="store_true", help="print CSV instead of a table")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="write the answer, by its ending: csv, parquet or json"
    )
    add_store(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Ask, and print or write the answer."""
    import store
    from app.frames.plain import ending
    from moescope.errors import InputError

    if options.examples:
        print("\n\n".join(f"-- {one.title}\n{one.sql.strip()}" for one in store.EXAMPLES))
        return 0
    if len(options.words) < 2:
        raise InputError('give a run and a question: moescope query RUN "select layer, tokens from expert_load"')
    if options.output is not None:
        ending(options.output)
    *targets, sql = options.words
    catalog = store.Catalog(options.store)
    console = store.console([catalog.resolve(target) for target in targets])
    found = console.ask(sys.stdin.read() if sql == "-" else sql, rows=options.rows, seconds=options.seconds)
    _show(found, options)
    if found.cut:
        print(f"moescope: cut after {options.rows:,} rows; there are more (--rows N)", file=sys.stderr)
    return 0


def _show(found: store.Answer, options: argparse.Namespace) -> None:
    from app.frames.plain import encoded, ending, flat, records
    from app.text import table

    if options.output is not None:
        from app.images import write_whole

        write_whole(options.output, encoded(found.frame, ending(options.output)))
        print(f"{options.output}: {len(found.frame):,} rows")
    elif options.json:
        print(records(found.frame))
    elif options.csv:
        print(encoded(found.frame, "csv").decode(), end="")
    else:
        print(table(flat(found.frame, limit=_LETTERS)) if found.frame.width else "no columns")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 86_400:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of seconds above zero")
    return value
