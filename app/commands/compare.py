"""``moescope compare``: two runs token by token, or checkpoints against the last one; the frames of page Compare."""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from typing import TYPE_CHECKING

from app.commands.options import add_json, add_store

if TYPE_CHECKING:
    import polars as pl

NAME = "compare"
SUMMARY = "compare the routing of runs on the same tokens: two in full, more as checkpoints against the last"

TITLES = {
    "alignment": "What is compared",
    "agreement": "Agreement over all layers",
    "layers": "Agreement by layer",
    "domains": "Agreement by domain",
    "margins": "How close tokens were to flipping, in the first run",
    "load": "Load of the experts that change most",
    "changed": "Token ids that agree least",
}

ROWS = {"layers": 200, "margins": 80, "load": 12, "changed": 20}
"""Rows that the terminal gets of long tables; --json prints all."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("targets", metavar="RUN", nargs="+", help="two or more paths of runs, or names in --store")
    parser.add_argument(
        "--by-position", action="store_true",
        help="pair sequences of the same number and length, whatever their tokens are (for runs without token ids)",
    )  # fmt: skip
    add_store(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Compare two runs in full, or more against the last."""
    import store
    from app.frames import comparison
    from app.text import table
    from moescope.errors import InputError

    if len(options.targets) < 2:
        raise InputError(f"compare takes two runs or more, not {len(options.targets)}: moescope compare RUN RUN")
    catalog = store.Catalog(options.store)
    with ExitStack() as opened:
        runs = [opened.enter_context(store.open_run(catalog.resolve(target))) for target in options.targets]
        if len(runs) > 2:
            frames = {"saturation": comparison.saturation(runs, by_position=options.by_position)}
        else:
            frames = comparison.tables(runs[0], runs[1], by_position=options.by_position)
    if options.json:
        print(json.dumps({name: frame.to_dicts() for name, frame in frames.items()}, default=str))
        return 0
    titles = {**TITLES, "saturation": f"Router saturation against {runs[-1].name}"}
    shown = {name: _shortened(name, frame) for name, frame in frames.items() if len(frame)}
    print("\n\n".join(f"{titles[name]}\n{table(frame, rows=ROWS.get(name, 60))}" for name, frame in shown.items()))
    return 0


def _shortened(name: str, frame: pl.DataFrame) -> pl.DataFrame:
    """What fits a terminal: margins of all layers together, the experts whose load moves most first."""
    import polars as pl

    if name == "margins":
        return frame.filter(
            (pl.col("label") == "all") & (pl.col("flipped") + pl.col("unchanged").fill_null(0) > 0)
        ).drop("label")
    if name == "load":
        return frame.sort(pl.col("difference").abs(), descending=True).drop("layer", "step")
    return frame.drop("layer", "step", strict=False)
