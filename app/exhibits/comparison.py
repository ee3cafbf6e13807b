"""Exhibits of the page Compare that show two runs: agreement, margins of flips, and load side by side.

Each takes ``other``, the second run: a path, or a name in the folder of the first.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import store
from app.exhibits.absent import require
from app.exhibits.exhibit import Absent, Entry, Exhibit, Frames, fresh
from app.figures import comparison as figures
from app.figures.style import Theme
from app.frames import comparison as tables
from app.frames import comparison_made
from app.frames.axes import layer_labels
from app.markdown import code
from moescope.errors import InputError

Margin = Literal["boundary_margin", "left_weight", "weight_gap"]

_READ = {
    "boundary_margin": "Small margins are ties that rounding can decide. Tokens that flip at large ones saw another "
    "input, or another router.",
    "left_weight": "How much of the output of these tokens came from experts that the other run does not use.",
    "weight_gap": "Near 0 the expert that came weighs what the one that left did: a tie. Far from 0 the router changed "
    "its mind.",
}


@dataclass(frozen=True)
class Second:
    """The second run of a comparison: its file, what changes with it and with the plans beside both, its name, and the
    plan by which one model was made of the other."""

    path: Path
    version: tuple[object, ...]
    name: str
    link: comparison_made.Link | None

    @property
    def keys(self) -> dict[str, object]:
        """The arguments by which frames read it."""
        return {"other": str(self.path), "version": self.version}


def second(run: store.Run, frames: Frames, other: str | None) -> Second:
    """The second run by its path or name.

    Raises:
        Absent: none is named.
        StoreError: there is no such run.
    """
    if not other:
        raise Absent("A comparison takes a second run, and none was named.", remedy=f"moescope compare {run.name} RUN")
    path = store.Catalog(run.path.parent).resolve(other)
    stamps = tuple(_stamp(store.plan_path(one, "plan", "x").parent) for one in (run.path, path))
    version = (*store.version_of(path), *stamps)
    found = frames(_link, run, other=str(path), version=version)
    return Second(path, version, path.name.partition(".")[0] if path.is_dir() else path.stem, found)


def _stamp(folder: Path) -> int:
    """What changes when a document is put into a folder or taken out of it."""
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return 0


def compared(run: store.Run, frames: Frames, there: Second, *, by_position: bool) -> tables.Tables:
    """The frames of the comparison.

    Raises:
        Absent: the runs cannot be compared token by token, with the reason.
    """
    for subject in ("trace", "order"):
        require("Agreement with another run", run, subject)
    try:
        return frames(tables.tables_with, run, by_position=by_position, link=there.link, **there.keys)
    except InputError as error:
        raise Absent(f"These runs cannot be compared token by token: {error}") from error


def agreement(
    run: store.Run, *, frames: Frames = fresh, theme: Theme = "light", other: str | None = None,
    by_position: bool = False,
) -> Exhibit:  # fmt: skip
    """Share of experts in common, of tokens with the same set and first choice, per layer."""
    found = compared(run, frames, second(run, frames, other), by_position=by_position)
    frame = found["layers"]
    (shared,) = found["agreement"].filter(measure="overlap").iter_rows(named=True)
    chance = f"{shared['chance']:.1%}" if shared["chance"] is not None else "little"
    popular = f"{shared['popularity']:.1%}" if shared["popularity"] is not None else "more"
    return Exhibit(
        figure=figures.agreement_curves(frame, theme=theme),
        frame=frame,
        read="The share of a token's experts that both runs use, of tokens with the same set, and with the same first "
        f"choice. Random selections have {chance} in common, and shuffled tokens, which share what is popular, "
        f"{popular}.",
        rests_on=rests_on(found),
        alt="Curves over the layers: experts in common, same set, same first choice, and their baselines",
    )


def margins(
    run: store.Run, *, frames: Frames = fresh, theme: Theme = "light", other: str | None = None,
    by_position: bool = False, margin: Margin = "weight_gap", layer: str | None = None,
) -> Exhibit:  # fmt: skip
    """How close the tokens were that flip, over all layers or in one."""
    there = second(run, frames, other)
    frame = compared(run, frames, there, by_position=by_position)["margins"].filter(margin=margin)
    if frame.is_empty():
        what = "router scores of the first run (--router-scores)" if margin == "boundary_margin" else "gate weights"
        raise Absent(f"How close flips were needs {what}, and tokens that flip.")
    shown = frame.filter(label=layer or "all")
    where = f"layer {layer}" if layer else "all layers"
    return Exhibit(
        figure=figures.margin_bars(shown, margin=margin, where=where, theme=theme),
        frame=shown,
        read=_READ[margin],
        rests_on=f"{shown['flipped'].sum():,} tokens that flip.",
        alt=f"Bars: {figures.MARGINS[margin][0]}, of tokens whose set of experts differs",
    )


def load_pair(
    run: store.Run, *, frames: Frames = fresh, theme: Theme = "light", other: str | None = None,
    by_position: bool = False,
) -> Exhibit:  # fmt: skip
    """Layer x expert: load in both runs, side by side on one scale."""
    there = second(run, frames, other)
    frame = compared(run, frames, there, by_position=by_position)["load"]
    return Exhibit(
        figure=figures.load_pair_map(
            frame, names=(run.name, there.name), picks_experts=_numbered_as_first(there), theme=theme
        ),
        frame=frame,
        read="Orange experts get less than their uniform share, blue ones more, in factors of two." + numbering(there),
        rests_on=f"{frame['selections'].sum():,} and {frame['other_selections'].sum():,} selections of one text.",
        alt="Two maps of layers and experts: load in the first and in the second run",
    )


def load_difference(
    run: store.Run, *, frames: Frames = fresh, theme: Theme = "light", other: str | None = None,
    by_position: bool = False,
) -> Exhibit:  # fmt: skip
    """Layer x expert: load in the second run minus the first."""
    there = second(run, frames, other)
    frame = compared(run, frames, there, by_position=by_position)["load"]
    return Exhibit(
        figure=figures.load_difference_map(frame, picks_experts=_numbered_as_first(there), theme=theme),
        frame=frame,
        read="Blue experts take more of the layer's selections in the second run, orange ones less." + numbering(there),
        rests_on=f"{frame['selections'].sum():,} selections in the first run.",
        alt="Map of layers and experts: load in the second run minus the first",
    )


def load_moved(
    run: store.Run, *, frames: Frames = fresh, theme: Theme = "light", other: str | None = None,
    by_position: bool = False,
) -> Exhibit:  # fmt: skip
    """Share of the selections that moves to other experts, per layer."""
    frame = compared(run, frames, second(run, frames, other), by_position=by_position)["layers"]
    return Exhibit(
        figure=figures.load_curve(frame, theme=theme),
        frame=frame,
        read="Total variation of the two loads. Where it lies far below the selections changed, flips cancel out: the "
        "load stays, though single tokens go elsewhere.",
        rests_on="Band: 95 %, jackknife over sequences.",
        alt="Curve over the layers: share of the selections that moves to other experts",
    )


def load_evenness(
    run: store.Run, *, frames: Frames = fresh, theme: Theme = "light", other: str | None = None
) -> Exhibit:  # fmt: skip
    """How evenly each run loads its experts, per layer; the runs may be of any shape."""
    there = second(run, frames, other)
    frame = frames(tables.evenness, run, **there.keys)
    return Exhibit(
        figure=figures.evenness_curves(frame, names=(run.name, there.name), theme=theme),
        frame=frame,
        read="How even each run's load is, whatever its experts are: 1 and 0 are even. The texts need not be the same, "
        "but a more uniform text gives a less even load.",
        rests_on=f"{run.info.tokens:,} tokens of the first run; all text of both.",
        alt="Curves over the layers: normalised entropy and MaxVio of both runs",
    )


def load_ranks(
    run: store.Run, *, frames: Frames = fresh, theme: Theme = "light", other: str | None = None,
    layer: str | None = None,
) -> Exhibit:  # fmt: skip
    """Load of one layer's experts from the busiest down, in both runs."""
    there, label = second(run, frames, other), layer or layer_labels(run)[0]
    frame = frames(tables.ranks, run, label=label, **there.keys)
    return Exhibit(
        figure=figures.rank_curves(frame, names=(run.name, there.name), label=label, theme=theme),
        frame=frame,
        read="Experts by their load, the busiest first: a steep curve is a layer that few experts carry. Numbers of "
        "experts do not matter here.",
        rests_on=f"{frame['tokens'].sum():,} selections of both runs.",
        alt=f"Curves: load of the experts of layer {label} by rank, in both runs",
    )


def rests_on(found: tables.Tables) -> str:
    """What was compared, as a sentence for captions."""
    row = found["alignment"].row(0, named=True)
    of = f" of {row['of_tokens']:,}" if row["of_tokens"] else ""
    return f"{row['compared']:,} sequences, {row['tokens']:,} tokens{of}; bands: 95 %, sequences drawn anew."


def numbering(there: Second) -> str:
    """How experts are numbered where a plan has renumbered them, as the end of a sentence."""
    if comparison_made.made_by(there.link) is None:
        return ""
    base = "the first run" if _numbered_as_first(there) else code(there.name)
    return f" Experts have their numbers in {base}, the original; of those that became one, the lowest."


def _numbered_as_first(there: Second) -> bool:
    return there.link is None or there.link.base == "first" or comparison_made.made_by(there.link) is None


def _link(run: store.Run, *, other: str, version: object) -> comparison_made.Link | None:
    with store.open_run(other) as opened:
        return comparison_made.link(run, opened)


EXHIBITS = (
    Entry("agreement", agreement, "Agreement of two runs", page="compare", report=False),
    Entry("flip-margins", margins, "How close flips were", page="compare", report=False),
    Entry("load-in-both", load_pair, "Load in two runs", page="compare", report=False),
    Entry("load-difference", load_difference, "Load of one run against another", page="compare", report=False),
    Entry("load-moved", load_moved, "Load that moves between two runs", page="compare", report=False),
    Entry("evenness-in-both", load_evenness, "Evenness of the load in two runs", page="compare", report=False),
    Entry("load-ranks", load_ranks, "Load by rank in two runs", page="compare", report=False),
)
