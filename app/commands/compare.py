"""``moescope compare``: two runs token by token, or checkpoints in order: collapse, alerts, agreement."""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from typing import TYPE_CHECKING

from app.commands.options import add_json, add_store

if TYPE_CHECKING:
    import polars as pl

    import store

NAME = "compare"
SUMMARY = "compare the routing of two runs token by token, or follow collapse over several checkpoints"

TITLES = {
    "alignment": "What is compared",
    "agreement": "Agreement over all layers",
    "layers": "Agreement by layer",
    "domains": "Agreement by domain",
    "margins": "How close tokens were to flipping, in the first run",
    "load": "Load of the experts that change most",
    "changed": "Token ids that agree least",
    "sequences": "Sequences that flip most",
    "flips": "Tokens that flip in most layers",
    "timeline": "Collapse over the checkpoints, the worst layer of each",
}

ROWS = {"layers": 200, "margins": 80, "load": 12, "changed": 20, "sequences": 12, "flips": 12, "timeline": 400}
"""Rows that the terminal gets of long tables; --json prints all."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("targets", metavar="RUN", nargs="+", help="two or more paths of runs, or names in --store")
    parser.add_argument(
        "--by-position", action="store_true",
        help="pair sequences of the same number and length, whatever their tokens are (for runs without token ids)",
    )  # fmt: skip
    parser.add_argument(
        "--order", choices=("given", "step", "date"), default="given",
        help="order of several checkpoints: as given (default), by the step in their names, or by date",
    )  # fmt: skip
    parser.add_argument(
        "--fail-on-alert", action="store_true",
        help="exit code 1 where a measure of collapse is over its threshold at the last checkpoint",
    )  # fmt: skip
    add_store(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Compare two runs in full, or follow several."""
    import store
    from moescope.errors import InputError

    if len(options.targets) < 2:
        raise InputError(f"compare takes two runs or more, not {len(options.targets)}: moescope compare RUN RUN")
    catalog = store.Catalog(options.store)
    several = len(options.targets) > 2
    with ExitStack() as opened:
        runs = [opened.enter_context(store.open_run(catalog.resolve(target))) for target in options.targets]
        frames = {} if several else _two(runs[0], runs[1], options)
        notes: list[str] = []
        if several or options.fail_on_alert:
            runs = _in_order(runs, options.order)
            found, notes = _several(runs, options, agreement=several)
            frames |= found
    if options.json:
        content = {name: frame.to_dicts() for name, frame in frames.items()}
        print(json.dumps({**content, "notes": notes} if several or options.fail_on_alert else content, default=str))
    else:
        _print(frames, notes, runs[-1].name)
    alerted = "alerts" in frames and bool(frames["alerts"]["stands"].any())
    return 1 if options.fail_on_alert and alerted else 0


def _two(first: store.Run, second: store.Run, options: argparse.Namespace) -> dict[str, pl.DataFrame]:
    """The frames of the page Compare; of a model and what a plan made of it, expert by expert."""
    from app.frames import comparison, comparison_made

    link = comparison_made.link(first, second)
    return comparison.tables(first, second, by_position=options.by_position, link=link)


def _several(
    runs: list[store.Run], options: argparse.Namespace, *, agreement: bool
) -> tuple[dict[str, pl.DataFrame], list[str]]:
    """Timeline, alerts, and the agreement with the last checkpoint where the runs have text in common; and notes."""
    import polars as pl

    from app.frames import comparison, timeline
    from moescope.errors import InputError

    frame, notes, frames = timeline.over_checkpoints(runs), [], {}
    if timeline.texts(runs) > 1:
        notes.append("The runs were recorded on different texts, which load experts otherwise.")
    if agreement:
        try:
            frames["saturation"] = comparison.saturation(runs, by_position=options.by_position)
            frame = pl.concat([frame, timeline.agreement_of(frames["saturation"], runs)])
        except InputError as error:
            notes.append(f"No agreement with the last checkpoint: {error}.")
    summed, alerts = timeline.summary(frame), timeline.alerts(frame)
    return {"timeline": summed, "alerts": alerts, **frames}, notes


def _in_order(runs: list[store.Run], order: str) -> list[store.Run]:
    from app.frames.timeline_order import ordered

    if order == "given":
        return runs
    times = [run.info.created_at.timestamp() for run in runs]
    places = ordered([run.name for run in runs], times, "date" if order == "date" else "step")
    return [runs[place] for place in places]


def _print(frames: dict[str, pl.DataFrame], notes: list[str], last: str) -> None:
    from app.text import table

    titles = {**TITLES, "saturation": f"Router saturation against {last}"}
    parts = []
    for name, frame in frames.items():
        if name == "alerts":
            said = frame["detail"].to_list() or ["No measure is, or was, over its threshold."]
            parts.append("\n".join(["Alerts", *said]))
        elif len(frame):
            parts.append(f"{titles[name]}\n{table(_shortened(name, frame), rows=ROWS.get(name, 60))}")
    print("\n\n".join([*parts, *notes]))


def _shortened(name: str, frame: pl.DataFrame) -> pl.DataFrame:
    """What fits a terminal: margins of all layers together, the experts whose load moves most first."""
    import polars as pl

    if name == "margins":
        return frame.filter(
            (pl.col("label") == "all") & (pl.col("flipped") + pl.col("unchanged").fill_null(0) > 0)
        ).drop("label")
    if name == "load":
        return frame.sort(pl.col("difference").abs(), descending=True).drop("layer", "step")
    if name == "timeline":
        order = "measure", "checkpoint", "worst", "worst_label", "near", "median", "over", "layers"
        return frame.select(*order).rename({"worst_label": "layer", "near": "near_worst"})
    return frame.drop("layer", "step", strict=False)
