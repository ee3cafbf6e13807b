"""``moescope runs``: what a store holds; rename, delete, compute metrics again, put into a remote store."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from app.commands.compute import add_compute, compute, require_compute
from app.commands.options import add_json, add_store

if TYPE_CHECKING:
    from store import Catalog

NAME = "runs"
SUMMARY = "list, rename or delete the runs of a store, compute their metrics again, or put one into a remote store"

ACTIONS = {"list": 0, "rename": 2, "delete": 1, "compute": 1, "push": 1}
"""What can be done, and how many names it takes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_store(parser)
    add_json(parser)
    parser.add_argument("action", nargs="?", choices=list(ACTIONS), default="list")
    parser.add_argument("names", nargs="*", metavar="NAME", help="rename OLD NEW; delete NAME; compute NAME; push NAME")
    add_compute(parser)


def run(options: argparse.Namespace) -> int:
    """List the store, or change it."""
    from moescope.errors import InputError
    from store import Catalog

    require_compute(options)
    catalog, names = Catalog(options.store), options.names
    if len(names) != ACTIONS[options.action]:
        raise InputError(f"runs {options.action} takes {ACTIONS[options.action]} names, not {len(names)}")
    if options.action == "rename":
        print(f"renamed to {catalog.rename(*names)}")
    elif options.action == "delete":
        catalog.delete(names[0])
        print(f"deleted {names[0]}")
    elif options.action == "compute":
        compute(options, catalog.resolve(names[0]))
    elif options.action == "push":
        print(f"pushed to {_push(catalog, names[0])}")
    else:
        _list(catalog, as_json=options.json)
    return 0


def _push(catalog: Catalog, name: str) -> str:
    """Put a run into the remote store: one that was made in its mirror, or the file of one at a path."""
    from app.commands.delivery import push

    return push(catalog, name)


def _list(catalog: Catalog, *, as_json: bool) -> None:
    from app.frames.runs import run_list
    from app.text import table

    frame = run_list(catalog)
    if as_json:
        print(json.dumps(frame.to_dicts(), default=str))
    elif frame.is_empty():
        print(f"no runs in {catalog} yet: moescope demo, or moescope collect MODEL --data PATH")
    else:
        print(table(frame))
