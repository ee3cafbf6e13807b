"""Exhibits of the page Compare that show several checkpoints in order.

Each takes ``others``, the other checkpoints: paths, or names in the folder of the run, with commas between them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import polars as pl

import store
from app.exhibits.exhibit import Absent, Entry, Exhibit, Frames, fresh
from app.figures import timeline as figures
from app.figures.style import Theme
from app.frames import timeline
from app.frames.axes import layer_labels
from app.frames.timeline_measures import MEASURES, collapse, shares
from app.frames.timeline_order import Order, ordered
from moescope.errors import InputError, StoreError

Made = TypeVar("Made")


@dataclass(frozen=True)
class Checkpoints:
    """Runs in order: their files, and what changes with them."""

    paths: tuple[str, ...]
    versions: tuple[tuple[object, ...], ...]

    @property
    def keys(self) -> dict[str, object]:
        """The arguments by which frames read them."""
        return {"paths": self.paths, "versions": self.versions}


def checkpoints(run: store.Run, frames: Frames, others: str | None, *, order: Order = "step") -> Checkpoints:
    """The run and the others in order.

    Raises:
        Absent: no other is named.
        StoreError: there is no such run.
    """
    catalog = store.Catalog(run.path.parent)
    named = [name.strip() for name in (others or "").split(",") if name.strip()]
    paths = list(dict.fromkeys([_place(run.path), *(_place(catalog.resolve(name)) for name in named)]))
    if len(paths) < 2:
        raise Absent(
            "A timeline takes several checkpoints, and only one was named.",
            remedy=f"moescope compare {run.name} RUN RUN",
        )
    if order == "chosen" and _place(run.path) in (chosen := [_place(catalog.resolve(name)) for name in named]):
        paths = list(dict.fromkeys(chosen))
    found = Checkpoints(tuple(map(str, paths)), tuple(store.version_of(path) for path in paths))
    places = ordered([path.stem for path in paths], frames(_times, run, **found.keys), order)
    return Checkpoints(
        tuple(found.paths[place] for place in places), tuple(found.versions[place] for place in places)
    )  # fmt: skip


def _place(path: Path) -> Path:
    """Where a run is, by its own name: a copy of a remote one is a link to a file of another name."""
    return Path(os.path.abspath(path))


def measured(run: store.Run, frames: Frames, found: Checkpoints, *, measure: str = "") -> pl.DataFrame:
    """``over_checkpoints`` of the runs; of measure "agreement", the agreement with the last one.

    Raises:
        Absent: their shapes differ, or for the agreement their texts, with the reason.
    """
    maker = _agreement if measure == "agreement" else _collapse
    try:
        return frames(maker, run, **found.keys)
    except StoreError:
        raise
    except InputError as error:
        raise Absent(str(error)) from error


def texts(run: store.Run, frames: Frames, found: Checkpoints) -> int:
    """How many different texts the runs were recorded on."""
    return frames(_texts, run, **found.keys)


def over_time(
    run: store.Run, *, frames: Frames = fresh, theme: Theme = "light", others: str | None = None,
    measure: str = "max_violation", order: str = "step", layer: str | None = None,
) -> Exhibit:  # fmt: skip
    """One measure over the checkpoints: worst layer, percentile, median, and the threshold."""
    frame, found = _part(run, frames, others, order, measure), MEASURES[measure]
    summed = timeline.summary(frame)
    side = "highest" if found.worst == "high" else "lowest"
    return Exhibit(
        figure=figures.lines(summed, frame, measure=measure, label=layer, theme=theme),
        frame=summed,
        read=f"The {side} layer is what counts: an average over layers hides one that collapses. Threshold: "
        f"{found.reason[0].lower() if found.reason[:2] == 'On' else found.reason[0]}{found.reason[1:]}",
        rests_on=_layers(frame),
        alt=f"Lines over the checkpoints: {found.title}, worst, median and threshold",
    )


def by_layer(
    run: store.Run, *, frames: Frames = fresh, theme: Theme = "light", others: str | None = None,
    measure: str = "max_violation", order: str = "step",
) -> Exhibit:  # fmt: skip
    """Layer x checkpoint: one measure."""
    frame, found = _part(run, frames, others, order, measure), MEASURES[measure]
    return Exhibit(
        figure=figures.layer_map(frame, measure=measure, theme=theme),
        frame=frame,
        read=f"The stronger the colour, the {found.worst}er the value; diamonds are over the threshold. A click picks "
        "the layer.",
        rests_on=_layers(frame),
        alt=f"Map of layers and checkpoints: {found.title}",
    )


def load_and_probability(
    run: store.Run, *, frames: Frames = fresh, theme: Theme = "light", layer: str | None = None
) -> Exhibit:  # fmt: skip
    """f against P of one layer's experts, in this run."""
    label = layer or layer_labels(run)[0]
    frame = frames(shares, run, label=label)
    values: dict[str, float | None] = dict(
        frames(collapse, run).filter(label=label).select("measure", "value").iter_rows()
    )
    return Exhibit(
        figure=figures.load_against_probability(frame, label=label, checkpoint=run.name, theme=theme),
        frame=frame,
        read="Each point is an expert. At the cross, all of them, the router is balanced; far up on the dotted line, "
        "load and probability concentrate on the same experts, which is what the load-balance loss punishes.",
        rests_on=f"{run.info.tokens:,} tokens; f = load, P = mean router probability{_figures(values)}.",
        alt=f"Scatter of the experts of layer {label}: load against router probability",
    )  # fmt: skip


def _part(run: store.Run, frames: Frames, others: str | None, order: str, measure: str) -> pl.DataFrame:
    if measure not in MEASURES:
        raise InputError(f"no measure {measure!r} over checkpoints; there are {', '.join(MEASURES)}")
    by: Order = "date" if order == "date" else "chosen" if order == "chosen" else "step"
    frame = measured(run, frames, checkpoints(run, frames, others, order=by), measure=measure)
    return frame.filter(measure=measure)


def _figures(values: dict[str, float | None]) -> str:
    """Load-balance loss and correlation of a layer, as the end of a sentence."""
    named = {"balance_loss": "load-balance loss", "correlation": "Pearson's r"}
    return "".join(
        f"; {words} {value:.2f}" for name, words in named.items() if (value := values[name]) is not None
    )  # fmt: skip


def _layers(frame: pl.DataFrame) -> str:
    layers = frame["label"].n_unique()
    return f"{frame['place'].n_unique()} checkpoints, {layers} layer{'s' if layers != 1 else ''}."


def _collapse(run: store.Run, *, paths: tuple[str, ...], versions: object) -> pl.DataFrame:
    return _with_runs(paths, timeline.over_checkpoints)


def _agreement(run: store.Run, *, paths: tuple[str, ...], versions: object) -> pl.DataFrame:
    return _with_runs(paths, timeline.agreement)


def _times(run: store.Run, *, paths: tuple[str, ...], versions: object) -> list[float]:
    return _with_runs(paths, lambda runs: [one.info.created_at.timestamp() for one in runs])


def _texts(run: store.Run, *, paths: tuple[str, ...], versions: object) -> int:
    return _with_runs(paths, timeline.texts)


def _with_runs(paths: tuple[str, ...], make: Callable[[Sequence[store.Run]], Made]) -> Made:
    with ExitStack() as opened:
        return make([opened.enter_context(store.open_run(path)) for path in paths])


EXHIBITS = (
    Entry("timeline", over_time, "A measure of collapse over checkpoints", page="compare", report=False),
    Entry("timeline-map", by_layer, "A measure of collapse by layer and checkpoint", page="compare", report=False),
    Entry("load-and-probability", load_and_probability, "Load against probability", page="compare", report=False,
          layers=True),
)  # fmt: skip
