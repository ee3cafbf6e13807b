"""Exhibits of the page Architecture: f against P, shared experts, memory of layers, neighbours, router rows."""

from __future__ import annotations

import polars as pl

import store
from app.exhibits.absent import needs_level, not_yet, require
from app.exhibits.exhibit import Absent, Entry, Exhibit, Frames, fresh
from app.exhibits.flow import first_layer
from app.figures import architecture as figures
from app.figures.style import Theme, safe
from app.frames import imbalance as frames_of_imbalance
from app.frames import layer_memory as frames_of_memory
from app.frames import neighbours as frames_of_neighbours
from app.frames import router_rows as frames_of_rows
from app.frames import shared_output as frames_of_shared
from app.frames.axes import most
from app.markdown import plain
from profiler.headline.flow import MOST_EXPERTS


def load_probability(run: store.Run, *, frames: Frames = fresh, theme: Theme = "light") -> Exhibit:
    """Load of every expert against its mean router probability."""
    spreads = spreads_of(run, frames)
    frame = frames(frames_of_imbalance.experts, run)
    return Exhibit(
        figure=figures.load_against_probability(frame, theme=theme),
        frame=frame,
        read="On the dotted line an expert gets as many tokens as its probability promises. A column of points above "
        "and below 1 is what a balance loss cannot lower: probabilities are flat, and the load is not.",
        rests_on=f"{most(spreads['tokens']):,.0f} tokens per layer. For k > 1 the tokens count as f / k.",
        alt="Points, one per expert: mean router probability across, load upwards",
    )


def load_spread(run: store.Run, *, frames: Frames = fresh, theme: Theme = "light") -> Exhibit:
    """How uneven load and probability are, over the layers."""
    frame = spreads_of(run, frames)
    return Exhibit(
        figure=figures.spread_curves(frame, theme=theme),
        frame=frame,
        read="Load far above probability: the balance loss is satisfied and the layer is not balanced. The check is "
        "Sigma-MoE-Tiny's, for models of one expert per token; it holds for any k.",
        rests_on=f"{most(frame['tokens']):,.0f} tokens per layer.",
        alt="Curves over the layers: coefficient of variation of load, of router probability, and by chance",
    )


def shared_output(
    run: store.Run, *, frames: Frames = fresh, theme: Theme = "light", domain: str | None = None
) -> Exhibit:
    """Norms of what shared and routed experts add, over the layers."""
    frame = shared_of(run, frames, domain)
    frame = frame.filter(pl.col("domain").is_null() if domain is None else pl.col("domain") == domain)
    return Exhibit(
        figure=figures.shared_curves(frame, where=safe(domain or "all text"), theme=theme),
        frame=frame,
        read="Root mean squares over the tokens, gates included. Who speaks louder is not who is needed: `moescope "
        "sweep` masks the largest share of the routed experts and measures the loss.",
        rests_on=f"{most(frame['tokens']):,.0f} tokens per layer.",
        alt="Curves over the layers: norm of the shared and of the routed experts' output",
    )


def shared_ratio(run: store.Run, *, frames: Frames = fresh, theme: Theme = "light") -> Exhibit:
    """Shared over routed output by domain, over the layers."""
    frame = shared_of(run, frames, None)
    return Exhibit(
        figure=figures.ratio_curves(frame, theme=theme),
        frame=frame,
        read="Where a domain lies above the others, the shared experts carry more of it.",
        rests_on=f"{most(frame['tokens']):,.0f} tokens per layer.",
        alt="Curves over the layers: norm of the shared over the routed output, by domain",
    )


def layer_entropy(run: store.Run, *, frames: Frames = fresh, theme: Theme = "light") -> Exhibit:
    """What is open of a layer's choice when earlier ones are known, over the layers."""
    frame = entropies_of(run, frames)
    return Exhibit(
        figure=figures.entropy_curves(frame, theme=theme),
        frame=frame,
        read="Bits of one of a token's experts. What a known earlier choice takes away is what a table of the next "
        "layer's experts can use. With another token's choice the estimate loses nothing but its error.",
        rests_on=_sampled(frame),
        alt="Curves over the layers: entropy of a choice, alone and given earlier layers",
    )


def layer_memory(run: store.Run, *, frames: Frames = fresh, theme: Theme = "light") -> Exhibit:
    """What a second layer back adds, over the layers."""
    _several_layers(run, 3)
    frame = frames(frames_of_memory.memory, run)
    if frame.is_empty():
        raise not_yet("What a second layer back adds", run)
    return Exhibit(
        figure=figures.memory_curves(frame, theme=theme),
        frame=frame,
        read="What the first choice two layers back says beyond that of the layer before: the most that a router with "
        "a memory, or a table of two layers, gains by it. Only what lies above the shuffled choices is knowledge.",
        rests_on=_sampled(frame),
        alt="Curves over the layers: information of a second layer back, and of shuffled choices",
    )


def neighbour_affinity(run: store.Run, *, frames: Frames = fresh, theme: Theme = "light") -> Exhibit:
    """What a layer's router finds on the input of the layer before, over the layers."""
    _several_layers(run, 2, counted=False)
    frame = frames(frames_of_neighbours.recalls, run)
    if frame.is_empty():
        raise needs_level("How a router does on its neighbour's input", "lookahead", run)
    return Exhibit(
        figure=figures.affinity_curves(frame, theme=theme),
        frame=frame,
        read="Layers whose router chooses alike on the input of the layer before see nearly the same stream: there "
        "experts of one could serve the other, as ReXMoE lets them. That they would do as well was not tried.",
        rests_on=f"{most(frame['tokens']):,.0f} tokens per layer, first positions left out; counted, not fitted.",
        alt="Curves over the layers: choices found on the earlier input, by popularity, and by chance",
    )


def neighbour_similarity(run: store.Run, *, frames: Frames = fresh, theme: Theme = "light") -> Exhibit:
    """Cosine of an expert's mean output with the nearest of the layer before, over the layers."""
    _several_layers(run, 2, counted=False)
    frame = similarity_of(run, frames)
    return Exhibit(
        figure=figures.similarity_curves(frame, names=frames_of_neighbours.CONTROLS, theme=theme),
        frame=frame,
        read="Whether experts push the stream as one of the layer before does, on average over each one's own tokens. "
        "Alike means are no proof that one can stand in for the other; a mean that all share lifts every curve.",
        rests_on="Sums over all text; mean over a layer's experts.",
        alt="Curves over the layers: cosine with the nearest expert of the layer before, the own layer, and by chance",
    )


def router_rows(run: store.Run, *, frames: Frames = fresh, theme: Theme = "light", layer: str | None = None) -> Exhibit:
    """Cosines of a router's rows beside those of random rows."""
    spreads = rows_of(run, frames)
    label = first_layer(run, layer)
    frame = frames(frames_of_rows.cosines, run, label=label)
    if frame.is_empty():
        raise Absent(f"The rows of the router of layer {label} were not recorded.")
    size = int(spreads.filter(pl.col("label") == label)["size"][0])
    return Exhibit(
        figure=figures.row_histogram(frame, label=label, theme=theme),
        frame=frame,
        read=f"Random rows of {size:,} channels have cosines around 0 with a standard deviation of "
        f"{size**-0.5:.3f}. A router that chooses by chance alone, as SMoE-Dropout's frozen one does, looks like the "
        "curve; a long right end are rows that want the same tokens.",
        rests_on=f"{frame['pairs'].sum():,} pairs of rows.",
        alt=f"Histogram: cosines of the rows of the router of layer {plain(label)}, beside random rows",
    )


def router_row_spread(run: store.Run, *, frames: Frames = fresh, theme: Theme = "light") -> Exhibit:
    """How far router rows are from random ones, over the layers."""
    frame = rows_of(run, frames)
    return Exhibit(
        figure=figures.row_curves(frame, theme=theme),
        frame=frame,
        read="1 is what random rows of normal entries give. Cosines above it: rows share directions or oppose each "
        "other. Norms above it: some experts' logits swing more than others'.",
        rests_on=f"{frame['experts'].sum():,} rows.",
        alt="Curves over the layers: spread of cosines and norms of router rows, times chance",
    )


def spreads_of(run: store.Run, frames: Frames) -> pl.DataFrame:
    """``frames.imbalance.spreads``.

    Raises:
        Absent: no layer's probabilities were seen.
    """
    require("Load against router probability", run, "logits")
    frame = frames(frames_of_imbalance.spreads, run)
    if frame.is_empty():
        raise Absent("The router's probabilities were not seen in this run: there is nothing to hold the load against.")
    return frame


def shared_of(run: store.Run, frames: Frames, domain: str | None) -> pl.DataFrame:
    """``frames.shared_output.norms``.

    Raises:
        Absent: the model has no shared experts, or their outputs were not recorded.
    """
    if not any(layer.num_shared for layer in run.layers):
        raise Absent("No shared experts stand beside the routed ones of this model.")
    frame = frames(frames_of_shared.norms, run, domain=domain)
    if frame.is_empty():
        raise needs_level("How much shared experts add", "activations", run)
    return frame


def entropies_of(run: store.Run, frames: Frames) -> pl.DataFrame:
    """``frames.layer_memory.entropies``.

    Raises:
        Absent: there is one layer, no trace, too many experts, or it was not computed.
    """
    _several_layers(run, 2)
    frame = frames(frames_of_memory.entropies, run)
    if frame.is_empty():
        raise not_yet("What earlier layers say about a choice", run)
    return frame


def similarity_of(run: store.Run, frames: Frames) -> pl.DataFrame:
    """``frames.neighbours.similarity``.

    Raises:
        Absent: mean outputs were not recorded, or it was not computed.
    """
    frame = frames(frames_of_neighbours.similarity, run)
    if frame.is_empty():
        if "activations" not in run.info.levels:
            raise needs_level("How alike experts of neighbouring layers are", "activations", run)
        raise not_yet("How alike experts of neighbouring layers are", run)
    return frame


def rows_of(run: store.Run, frames: Frames) -> pl.DataFrame:
    """``frames.router_rows.spreads``.

    Raises:
        Absent: the routers' weights were not recorded.
    """
    frame = frames(frames_of_rows.spreads, run)
    if frame.is_empty():
        raise needs_level("Whether router rows look random", "activations", run)
    return frame


def _several_layers(run: store.Run, least: int, *, counted: bool = True) -> None:
    """Refuse where there are fewer layers, or, of what is counted in a trace, none or too many experts."""
    if len(run.layers) < least:
        few = "one MoE layer" if len(run.layers) == 1 else f"{len(run.layers)} MoE layers"
        raise Absent(f"This run has {few}: it takes {least} to look back.")
    if counted and not run.has_trace and not run.live:
        require("What earlier layers say", run, "trace")
        raise Absent("What earlier layers say is counted in the trace, which this run does not keep.")
    if counted and any(layer.num_experts > MOST_EXPERTS for layer in run.layers):
        raise Absent(f"Pairs are counted in layers of at most {MOST_EXPERTS:,} experts; this model has more.")


def _sampled(frame: pl.DataFrame) -> str:
    tokens, sequences = most(frame["tokens"]), most(frame["sequences"])
    return f"{tokens:,.0f} tokens of {sequences:,.0f} sequences; 95 % intervals leave out each sixteenth of them."


EXHIBITS = (
    Entry("load-probability", load_probability, "Load against router probability", page="architecture"),
    Entry("load-spread", load_spread, "How uneven load and probability are", page="architecture"),
    Entry("shared-output", shared_output, "Shared and routed output", page="architecture"),
    Entry("shared-ratio", shared_ratio, "Shared over routed output, by domain", page="architecture"),
    Entry("layer-entropy", layer_entropy, "What is open of a layer's choice", page="architecture"),
    Entry("layer-memory", layer_memory, "What a second layer back adds", page="architecture"),
    Entry("neighbour-affinity", neighbour_affinity, "A router on its neighbour's input", page="architecture"),
    Entry("neighbour-similarity", neighbour_similarity, "Nearest expert by mean output", page="architecture"),
    Entry("router-rows", router_rows, "Cosines of router rows", page="architecture", layers=True),
    Entry("router-row-spread", router_row_spread, "Router rows against random ones", page="architecture"),
)
