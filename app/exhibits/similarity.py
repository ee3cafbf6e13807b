"""Exhibits of the page Similarity: pairs of experts by kind, over the layers, and how far the kinds agree."""

from __future__ import annotations

from typing import Literal

import polars as pl

import store
from app.exhibits.absent import needs_level, not_yet
from app.exhibits.exhibit import Absent, Entry, Exhibit, Frames, fresh
from app.figures import similarity as figures
from app.figures.style import Theme, safe
from app.frames import similarity as frames_of_similarity
from app.frames.axes import layer_labels
from moescope.errors import InputError
from profiler.headline.similarity_kinds import BY_NAME

Scale = Literal["similarity", "angular", "shifted"]
PREFERRED = ("debiased_cka", "router_logit")
BESIDE = ("weight_matched", "router_row")

_READ = {
    "router_row": "Blue pairs: the router looks for the same thing in a token, so both experts compete for it.",
    "router_logit": "Blue pairs: the router wants both for the same tokens; orange ones exclude each other.",
    "output_cosine": "Blue pairs answer the same token in the same direction, whether or not it was routed to them.",
    "output_product": "As the cosine, with long outputs counting more: a single massive activation can colour a row.",
    "cka": "Pairs that tell the same tokens apart. With few tokens everything looks alike: read the debiased form.",
    "debiased_cka": "Blue pairs tell the same tokens apart, in whatever directions; 0 is what unrelated experts give.",
    "gated_output": "Blue pairs stand in for each other in the layer's sum. Pairs that never meet are 0 however alike.",
    "weight": "Neurons have no order, so only experts that began as copies of each other stand out here.",
    "weight_mean": "Means over neurons need no order, and say little: they leave most of the weights out.",
    "weight_matched": "After the neurons were matched: a best of many orders, so no pair is at 0. Empty cells were too "
    "costly to match.",
}
_PART = "One matrix of the weights by itself, neurons in the order in which they stand."


def pairs(
    run: store.Run,
    *,
    frames: Frames = fresh,
    theme: Theme = "light",
    layer: str | None = None,
    kind: str | None = None,
    order: str | None = None,
    scale: Scale = "similarity",
) -> Exhibit:
    """Expert x expert of one layer; ``order``: the kind that groups the experts, None = the kind itself."""
    name, label = kind_of(run, frames, kind), layer_of(run, layer)
    by = kind_of(run, frames, order) if order is not None else name
    frame = frames(frames_of_similarity.matrix, run, label=label, kind=name, order_by=by)
    words = title(name)
    if frame.is_empty():
        raise Absent(f"This run says nothing of {words} in layer {label}.")
    return Exhibit(
        figure=figures.similarity_map(
            frame, title=f"{_upper(words)}, layer {safe(label)}", layer=label, value=scale, theme=theme
        ),
        frame=frame,
        read=_READ.get(name, _PART)
        + (" Experts stand in the order in which this kind groups them." if by == name else " Same order."),
        rests_on=f"{len(frame.drop_nulls('similarity')) // 2:,} pairs.",
        alt=f"Map of experts by experts: {words}",
    )


def over_layers(run: store.Run, *, frames: Frames = fresh, theme: Theme = "light", kind: str | None = None) -> Exhibit:
    """How alike the pairs of each layer are."""
    name = kind_of(run, frames, kind)
    frame = frames(frames_of_similarity.redundancy, run, kind=name)
    counts = frame.select("above_50", "above_70", "above_90").sum().row(0)
    known = len(frame["chance"].drop_nulls()) > 0
    chance = " Below the dotted line pairs are as random as vectors drawn by lot." if known else ""
    return Exhibit(
        figure=figures.redundancy_band(frame, title=f"{_upper(title(name))} of all pairs", theme=theme),
        frame=frame,
        read="A band far above 0 means that all experts of a layer share something; single pairs far above the band "
        f"are redundant.{chance}",
        rests_on=f"Pairs above 0.5: {counts[0]:,}; above 0.7: {counts[1]:,}; above 0.9: {counts[2]:,}.",
        alt=f"Band over the layers: {title(name)} of pairs of experts",
    )


def agreement(run: store.Run, *, frames: Frames = fresh, theme: Theme = "light", layer: str | None = None) -> Exhibit:
    """How far all kinds of similarity agree in one layer."""
    label = layer_of(run, layer)
    frame = _agreement(run, frames).filter(pl.col("label") == label)
    if frame.is_empty():
        raise Absent(f"The kinds of similarity were not compared in layer {label}.")
    titles = {name: one.title for name, one in BY_NAME.items()}
    return Exhibit(
        figure=figures.agreement_map(frame, titles, title=f"Agreement of the kinds, layer {safe(label)}", theme=theme),
        frame=frame,
        read="Blue: both kinds find the same pairs alike. In brackets: no more than when the experts of one kind are "
        "renamed at random.",
        rests_on="Spearman's rank correlation over pairs of experts.",
        alt="Map of kinds by kinds: rank correlation of the similarities of pairs",
    )


def agreement_over_layers(
    run: store.Run,
    *,
    frames: Frames = fresh,
    theme: Theme = "light",
    kind: str | None = None,
    beside: str | None = None,
) -> Exhibit:
    """How far two kinds of similarity agree over the layers."""
    frame = _agreement(run, frames)
    first, second = kind_of(run, frames, kind), kind_of(run, frames, beside, preferred=BESIDE)
    if first == second:
        raise Absent("Choose two different kinds: one kind always agrees with itself.")
    both = frame.filter(pl.col("first").is_in([first, second]) & pl.col("second").is_in([first, second]))
    if both.is_empty():
        words = f"{_upper(title(first))} and {title(second)}"
        raise Absent(f"{words} were not compared: one matrix of the weights by itself is left out.")
    return Exhibit(
        figure=figures.agreement_curve(both, title=f"Agreement of {title(first)} and {title(second)}", theme=theme),
        frame=both,
        read="Above the band, one kind can stand in for the other when experts are grouped. Inside it, what one calls "
        "alike is chance to the other.",
        rests_on="499 renamings of the experts (Mantel test).",
        alt="Curve over the layers: rank correlation of two kinds, with the band of renamed experts",
    )


def kinds_here(run: store.Run, frames: Frames) -> list[str]:
    """The kinds of similarity that a run says something of.

    Raises:
        Absent: it has none.
    """
    known = frames(frames_of_similarity.kinds, run)
    here = known.filter(pl.col("here"))["kind"].to_list()
    if here:
        return here
    reasons = known["missing"].drop_nulls().unique(maintain_order=True).to_list()
    if run.live:
        raise Absent("No similarity has been recorded yet.")
    if reasons:
        raise Absent(f"This run cannot say which experts are alike: {reasons[0].rstrip('.')}.")
    raise needs_level("Similarity of experts", "similarity", run)


def kind_of(run: store.Run, frames: Frames, kind: str | None, *, preferred: tuple[str, ...] = PREFERRED) -> str:
    """A kind that the run has; for None the first of the preferred ones, else the last of all.

    Raises:
        Absent: the run has no kind, or not this one.
        InputError: there is no such kind.
    """
    here = kinds_here(run, frames)
    if kind is None:
        return next((name for name in preferred if name in here), here[-1])
    if kind not in BY_NAME:
        raise InputError(f"no kind of similarity {kind!r}; there are {', '.join(BY_NAME)}")
    if kind not in here:
        raise needs_level(f"Similarity of {title(kind)}", BY_NAME[kind].level, run)
    return kind


def layer_of(run: store.Run, layer: str | None) -> str:
    """A layer's label; None = the first."""
    return layer if layer is not None else layer_labels(run)[0]


def title(kind: str) -> str:
    """A kind in words."""
    return BY_NAME[kind].title


def _agreement(run: store.Run, frames: Frames) -> pl.DataFrame:
    kinds_here(run, frames)
    frame = frames(frames_of_similarity.agreement, run)
    if frame.is_empty():
        known = frames(frames_of_similarity.kinds, run)
        if known.filter(pl.col("here") & ~pl.col("part")).height < 2:
            raise Absent("This run has one kind of similarity only: there is nothing to compare it with.")
        raise not_yet("How far the kinds of similarity agree", run)
    return frame


def _upper(text: str) -> str:
    return text[0].upper() + text[1:]


EXHIBITS = (
    Entry("similarity", pairs, "Experts that are alike", page="similarity", layers=True),
    Entry("similarity-over-layers", over_layers, "Similar pairs over the layers", page="similarity"),
    Entry("similarity-agreement", agreement, "Agreement of the kinds", page="similarity", layers=True, report=False),
    Entry(
        "similarity-agreement-over-layers", agreement_over_layers, "Agreement of two kinds over the layers",
        page="similarity",
    ),
)  # fmt: skip
