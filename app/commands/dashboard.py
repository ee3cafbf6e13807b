"""``moescope dashboard``: the pages in a browser."""

from __future__ import annotations

import argparse

from app.commands.options import add_store

NAME = "dashboard"
SUMMARY = "open the dashboard on a directory of runs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_store(parser)
    add_server(parser)


def add_server(parser: argparse.ArgumentParser) -> None:
    """Options of the server, shared with ``demo``."""
    parser.add_argument("--port", type=int, help="port (default: the first free one from 8501)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--no-browser", action="store_true", help="do not open a browser window")


def run(options: argparse.Namespace) -> int:
    """Serve until interrupted."""
    from app.serve import serve

    return serve(options.store, host=options.host, port=options.port, browser=not options.no_browser)
