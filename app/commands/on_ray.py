"""``--ray`` and ``--workers``: work on a finished run that goes over the workers of a Ray."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from app.commands.options import positive

if TYPE_CHECKING:
    from moescope.cluster import Cluster

WORKERS = 2


def add_ray(parser: argparse._ActionsContainer, what: str) -> None:
    """The options.

    Args:
        what: goes over workers, in a few words.
    """
    parser.add_argument("--ray", metavar="ADDRESS", help=f"{what}: local (this machine), or HOST:PORT of a Ray cluster")
    parser.add_argument("--workers", type=positive, metavar="N", help=f"of Ray, each with a CPU (default {WORKERS})")


def require_ray(options: argparse.Namespace) -> None:
    """Refuse workers without a Ray.

    Raises:
        InputError: with what to give.
    """
    from moescope.errors import InputError

    if options.workers is not None and options.ray is None:
        raise InputError("--workers is about workers on Ray: give --ray local or --ray HOST:PORT too")


@contextmanager
def on_ray(options: argparse.Namespace) -> Iterator[Cluster | None]:
    """The Ray that was asked for, as long as it is needed; None without one.

    Raises:
        InputError: as :func:`moescope.cluster.connected`.
    """
    if options.ray is None:
        yield None
        return
    from moescope import cluster

    with cluster.connected(options.ray, workers=options.workers or WORKERS) as joined:
        yield joined
