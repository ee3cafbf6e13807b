"""Exhibits of the page Routing on flow: experts that meet, experts that follow, and what can be foreseen."""

from __future__ import annotations

from typing import Literal

import polars as pl

import store
from app.exhibits.absent import not_yet, require
from app.exhibits.exhibit import Absent, Entry, Exhibit, Frames, fresh
from app.exhibits.routing import where_of
from app.figures import flow as figures
from app.figures.style import Theme, safe
from app.frames import flow as frames_of_flow
from app.frames.axes import layer_labels, most
from app.frames.flow import MEASURES
from app.markdown import plain
from moescope.errors import InputError
from profiler.headline.flow import MOST_EXPERTS

Measure = Literal["attraction", "co_activation", "lift", "jaccard", "pointwise_information"]

_READ = {
    "attraction": "Blue pairs meet more often than their popularity explains, orange ones avoid each other. 1 is "
    "chance.",
    "co_activation": "Of the tokens of the row's expert, how many use the column's too. A dark column is popular with "
    "all.",
    "lift": "Against independent experts. A token's experts differ, so a random router stands below 1.",
    "jaccard": "Dark pairs are nearly one expert: where one is used, so is the other.",
    "pointwise_information": "The lift as bits. A random router stands below 0.",
}


def expert_pairs(
    run: store.Run,
    *,
    frames: Frames = fresh,
    theme: Theme = "light",
    layer: str | None = None,
    measure: Measure = "attraction",
    domain: str | None = None,
) -> Exhibit:
    """Expert x expert of one layer: which are used for the same tokens."""
    label, frame = first_layer(run, layer), pairs_of(run, frames, layer, domain)
    words = MEASURES[measure]
    title = f"{words[0].upper()}{words[1:]}, layer {safe(label)}"
    return Exhibit(
        figure=figures.pair_map(frame, measure=measure, title=title, layer=label, theme=theme),
        frame=frame,
        read=_READ[measure] + " Experts that attract each other stand together.",
        rests_on=_text(frame, domain),
        alt=f"Map of experts by experts of layer {label}: {words}",
    )


def pair_excess(run: store.Run, *, frames: Frames = fresh, theme: Theme = "light") -> Exhibit:
    """Share of the pairs that popularity does not explain, over the layers."""
    _pairs_known("How far pairs of experts are more than popularity", run)
    frame = frames(frames_of_flow.excess, run)
    if frame.is_empty():
        raise not_yet("How far pairs of experts are more than popularity", run)
    return Exhibit(
        figure=figures.excess_curve(frame, theme=theme),
        frame=frame,
        read="How many pairs would have to be others if popularity alone decided who meets. Near the dotted line, "
        "experts are used independently.",
        rests_on="All text; intervals leave out each sixteenth of the sequences.",
        alt="Curve over the layers: share of pairs beyond popularity, with what noise gives",
    )


def transitions(
    run: store.Run,
    *,
    frames: Frames = fresh,
    theme: Theme = "light",
    layer: str | None = None,
    source: str | None = None,
    domain: str | None = None,
) -> Exhibit:
    """Expert x expert of an earlier and a later layer: where the tokens of each go on to."""
    label, source = ends_of(run, layer, source)
    _pairs_known("Which experts follow", run)
    require("Which experts follow", run, "trace")
    if not run.has_trace:
        raise Absent("Which experts follow is counted in the trace, which this run does not keep.")
    frame = frames(frames_of_flow.transitions, run, label=label, source=source, domain=domain)
    title = f"From layer {safe(source)} to layer {safe(label)}"
    return Exhibit(
        figure=figures.pair_map(frame, measure="lift", title=title, layer=label, source=source, theme=theme),
        frame=frame,
        read="Blue: tokens of the row's expert go on to the column's more often than its popularity explains. "
        "Columns stand so that partners face each other: a blue diagonal is a path through both layers.",
        rests_on=_text(frame, domain),
        alt=f"Map of experts of layer {source} by experts of layer {label}: lift",
    )


def transition_information(run: store.Run, *, frames: Frames = fresh, theme: Theme = "light") -> Exhibit:
    """Bits that the experts of the layer before say about a layer's, over the layers."""
    _several_layers(run)
    _pairs_known("What the experts of the layer before say", run)
    frame = frames(frames_of_flow.information, run)
    if frame.is_empty():
        raise not_yet("What the experts of the layer before say", run)
    return Exhibit(
        figure=figures.information_curve(frame, theme=theme),
        frame=frame,
        read="Bits that one expert of a token says about one of the next layer. With experts of another token of the "
        "same text only the topic is left; with those of any other token, what the estimate gives of nothing.",
        rests_on=_sampled(frame),
        alt="Curves over the layers: mutual information of neighbouring layers, with controls",
    )


def foreseen(
    run: store.Run,
    *,
    frames: Frames = fresh,
    theme: Theme = "light",
    extra: int = 0,
    domain: str | None = None,
    phase: str | None = None,
) -> Exhibit:
    """Share of each layer's choices that are foreseen one layer ahead, by transitions, popularity and early routers."""
    frame, fitted, early = _foresight(run, frames, domain, phase)
    rests = f"Fitted on one half of the sequences, tried on the other; all text. {_sampled(fitted)}"
    if early:
        rests += f" Early routers: {plain(where_of(domain, phase))}, counted, not fitted: no interval."
    return Exhibit(
        figure=figures.recall_curves(frame, extra=extra, theme=theme),
        frame=frame,
        read="The part of each layer's choices that is in memory in time if so many experts are fetched while the "
        "layer before still computes: those that follow the earlier layer's experts, the most popular, those of the "
        "token before, or what the layer's own router picks early. What lies above popularity is gained by looking.",
        rests_on=rests,
        alt="Curves over the layers: share of choices foreseen by transitions, popularity, early routers, chance",
    )


def foreseen_widths(
    run: store.Run,
    *,
    frames: Frames = fresh,
    theme: Theme = "light",
    layer: str | None = None,
    domain: str | None = None,
    phase: str | None = None,
) -> Exhibit:
    """Share of one layer's choices that are foreseen, by experts fetched and layers ahead."""
    label, _ = ends_of(run, layer, None)
    frame, _, _ = _foresight(run, frames, domain, phase)
    mine = frame.filter(pl.col("label") == label)
    return Exhibit(
        figure=figures.width_curves(mine, label=label, theme=theme),
        frame=mine,
        read="What fetching more experts buys, and what looking further ahead costs: solid lines look one layer "
        "ahead, dashed ones two, dotted ones three.",
        alt=f"Curves over experts fetched: share of the choices of layer {label} foreseen",
    )


def pairs_of(run: store.Run, frames: Frames, layer: str | None, domain: str | None) -> pl.DataFrame:
    """The pairs of experts of a layer (``frames.flow.pairs``), the first where none is given.

    Raises:
        Absent: the run cannot say it, or no token uses two experts.
    """
    if not run.layers:  # a live run before its first shard
        raise not_yet("Which experts meet", run)
    _pairs_known("Which experts meet", run)
    label = first_layer(run, layer)
    frame = frames(frames_of_flow.pairs, run, label=label, domain=domain)
    if not frame["joint_tokens"].sum():
        raise Absent(f"No token of this choice uses two experts of layer {label}: there are no pairs.")
    return frame


def first_layer(run: store.Run, layer: str | None) -> str:
    """The layer, or the run's first."""
    return layer if layer is not None else layer_labels(run)[0]


def ends_of(run: store.Run, layer: str | None, source: str | None) -> tuple[str, str]:
    """A layer and an earlier one: the second and the layer before it where none is given.

    Raises:
        Absent: nothing comes before the layer.
        InputError: ``source`` is no earlier layer.
    """
    _several_layers(run)
    label = layer if layer is not None else layer_labels(run)[1]
    earlier = frames_of_flow.sources(run, label)
    if not earlier:
        raise Absent(f"Layer {label} is the first MoE layer: nothing comes before it. Choose a later one.")
    if source is not None and source not in earlier:
        raise InputError(f"source {source!r} is no MoE layer before layer {label}; there are {', '.join(earlier[:12])}")
    return label, source or earlier[0]


def together(held_out: pl.DataFrame, early: pl.DataFrame) -> pl.DataFrame:
    """Transitions, popularity and early routers as rows of one frame."""
    routers = early.rename({"input": "predictor"}).with_columns(
        pl.lit("observed").alias("control"), *(pl.lit(None, pl.Float64).alias(name) for name in ("low", "high"))
    )
    columns = [name for name in held_out.columns if name in routers.columns]
    return pl.concat([held_out.select(columns), routers.select(columns)], how="vertical_relaxed")


def _foresight(
    run: store.Run, frames: Frames, domain: str | None, phase: str | None
) -> tuple[pl.DataFrame, pl.DataFrame, bool]:
    """Everything that foresees, what was fitted on the trace, and whether routers were run early."""
    _several_layers(run)
    _pairs_known("What can be foreseen", run)
    held_out = frames(frames_of_flow.predictability, run)
    early = frames(frames_of_flow.lookaheads, run, domain=domain, phase=phase)
    fitted = held_out.filter(pl.col("predictor") == "transition")
    if fitted.is_empty() and early.is_empty():
        raise not_yet("How far experts can be foreseen", run)
    return together(held_out, early), fitted, not early.is_empty()


def _several_layers(run: store.Run) -> None:
    if len(run.layers) < 2:
        raise Absent("This model has one MoE layer: nothing comes before it, and nothing follows.")


def _pairs_known(what: str, run: store.Run) -> None:
    """Refuse where pairs are not counted."""
    if frames_of_flow.lacks_pairs(run):
        require(what, run, "trace")
    if any(layer.num_experts > MOST_EXPERTS for layer in run.layers):
        raise Absent(
            f"Pairs are counted in layers of at most {MOST_EXPERTS:,} experts; this model has more: a table of all "
            "pairs would be larger than the trace."
        )


def _sampled(frame: pl.DataFrame) -> str:
    if frame.is_empty():
        return ""
    tokens, sequences = most(frame["tokens"]), most(frame["sequences"])
    return f"{tokens:,.0f} tokens of {sequences:,.0f} sequences; 95 % intervals over sequences."


def _text(frame: pl.DataFrame, domain: str | None) -> str:
    return f"{most(frame['tokens']):,.0f} tokens{f' of {plain(domain)}' if domain else ''}."


EXHIBITS = (
    Entry("expert-pairs", expert_pairs, "Experts that meet", page="routing", layers=True),
    Entry("pair-excess", pair_excess, "Pairs of experts beyond popularity", page="routing"),
    Entry("transitions", transitions, "Experts that follow", page="routing", layers=True),
    Entry("transition-information", transition_information, "What the layer before says", page="routing"),
    Entry("foreseen", foreseen, "Experts foreseen one layer ahead", page="routing"),
    Entry("foreseen-widths", foreseen_widths, "Experts foreseen, by experts fetched", page="routing", layers=True),
)
