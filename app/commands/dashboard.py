"""``moescope dashboard``: the pages in a browser."""

from __future__ import annotations

import argparse

from app.address import Address, checked
from app.commands.options import add_stores

NAME = "dashboard"
SUMMARY = "open the dashboard on a directory of runs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_stores(parser)
    add_server(parser)


def add_server(parser: argparse.ArgumentParser) -> None:
    """Options of the server, shared with ``demo``."""
    parser.add_argument("--port", type=int, help="port (default: the first free one from 8501)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--expose", action="store_true", help="allow an address that other machines reach")
    parser.add_argument(
        "--allowed-hosts", nargs="+", default=[], metavar="NAME", help="further names to answer under, as of a proxy"
    )
    parser.add_argument("--base-path", default="", metavar="PATH", help="first part of all paths, such as /moescope")
    parser.add_argument("--no-browser", action="store_true", help="do not open a browser window")


def address_of(options: argparse.Namespace) -> Address:
    """Where to listen, by the options of :func:`add_server`.

    Raises:
        InputError: others would reach it and ``--expose`` is not given; or a name or path that cannot be.
    """
    return checked(
        options.host,
        port=options.port,
        expose=options.expose,
        base_path=options.base_path,
        names=options.allowed_hosts,
    )


def run(options: argparse.Namespace) -> int:
    """Serve until interrupted."""
    from app.serve import serve

    return serve(options.store or [], address_of(options), browser=not options.no_browser)
