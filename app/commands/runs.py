"""``moescope runs``: what a store holds; rename and delete."""

from __future__ import annotations

import argparse
import json

from app.commands.options import add_json, add_store

NAME = "runs"
SUMMARY = "list, rename or delete the runs of a store"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_store(parser)
    add_json(parser)
    parser.add_argument("action", nargs="?", choices=["list", "rename", "delete"], default="list")
    parser.add_argument("names", nargs="*", metavar="NAME", help="rename OLD NEW; delete NAME")


def run(options: argparse.Namespace) -> int:
    """List the store, or change it."""
    from moescope.errors import InputError
    from store import Catalog

    catalog = Catalog(options.store)
    if options.action == "rename":
        if len(options.names) != 2:
            raise InputError("runs rename takes two names: OLD NEW")
        print(f"renamed to {catalog.rename(*options.names)}")
    elif options.action == "delete":
        if len(options.names) != 1:
            raise InputError("runs delete takes one name")
        catalog.delete(options.names[0])
        print(f"deleted {options.names[0]}")
    else:
        _list(catalog, as_json=options.json)
    return 0


def _list(catalog: object, *, as_json: bool) -> None:
    from app.frames.runs import run_list
    from app.text import table

    frame = run_list(catalog)  # type: ignore[arg-type]
    if as_json:
        print(json.dumps(frame.to_dicts(), default=str))
    elif frame.is_empty():
        print(f"no runs in {catalog.directory} yet: moescope demo, or moescope collect MODEL --data PATH")  # type: ignore[attr-defined]
    else:
        print(table(frame))
