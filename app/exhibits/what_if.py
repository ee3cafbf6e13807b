"""Exhibits of the page What-if routing: rules that change how many experts a token uses, or which, on the trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import polars as pl

import store
from app.exhibits.exhibit import Absent, Entry, Exhibit, Frames, fresh
from app.figures import what_if as figures
from app.figures.style import Theme
from app.frames import what_if as frames_of
from app.markdown import plain
from planner.simulate.what_if import Certainty, Refused, WhatIf

Rule = Literal["top_p", "ratio", "odp", "threshold", "null_experts", "null_left", "top_k"]
Weights = Literal["renormalized", "kept"]

COLLECT = "moescope collect MODEL --data PATH --router-scores"


def looked(
    run: store.Run,
    frames: Frames = fresh,
    *,
    method: str | None = None,
    weights: str = "renormalized",
    domain: str | None = None,
    whole: bool = False,
    **options: Any,
) -> WhatIf:
    """What a method makes of a run; without a name, the first that changes the number of experts and makes sense.

    Raises:
        Absent: it makes no sense on this run, or the run lacks the data.
    """
    require_finished(run)
    name = first_method(run, frames) if method is None else method
    try:
        return frames(frames_of.found, run, method=name, weights=weights, domain=domain, whole=whole, **options)
    except Refused as refused:
        raise absent(refused) from refused


def require_finished(run: store.Run) -> None:
    """Refuse a run that is still being collected.

    Raises:
        Absent: it is.
    """
    if run.live:
        raise Absent("Other routing is tried on the whole trace: it can be when the collection ends.")


def absent(refused: Refused) -> Absent:
    """Why a method is not shown; with the command, where router scores would help."""
    reason = str(refused).partition(": collect it again")[0]
    return Absent(f"{reason[0].upper()}{reason[1:]}.", remedy=COLLECT if "router scores" in str(refused) else "")


def first_method(run: store.Run, frames: Frames = fresh) -> str:
    """The first method that changes the number of experts and makes sense on this run.

    Raises:
        Absent: none does.
    """
    table = frames(frames_of.methods, run).filter(pl.col("name").is_in(frames_of.CURVES))
    here = table.filter("here")["name"].to_list()
    if not here:
        raise Absent(f"No rule can be tried on this run: {table['missing'][0]}.")
    return str(here[0])


def value_in(result: WhatIf, value: float | None) -> float:
    """The value nearest to what was asked for; without, the first that is proposed."""
    wanted = frames_of.proposed(frames_of.curve(result)) if value is None else value
    return float(result.values[frames_of.place_of(result, wanted)])


def fixed_beside(
    run: store.Run, frames: Frames, result: WhatIf, domain: str | None, whole: bool, *, method: str | None
) -> pl.DataFrame | None:
    """The curve of a fixed number of experts, by the same mass, on the same tokens and layers; None for the method that
    is that curve, and for those that are judged on one half of the text."""
    if result.method == "top_k" or method in frames_of.FITTED:
        return None
    by_probability = result.mass_of == "router probability"
    return frames(
        frames_of.fixed, run, domain=domain, whole=whole, by_probability=by_probability,
        scored=result.method == "null_experts", layers=tuple(sorted({layer for layer, _ in result.layers})),
    )  # fmt: skip


def certainty_at(result: WhatIf, value: float) -> Certainty:
    """How far the figures at one value can be trusted."""
    return result.certainties[frames_of.place_of(result, value)]


def kept(
    run: store.Run, *, frames: Frames = fresh, theme: Theme = "light", method: Rule | None = None,
    weights: Weights = "renormalized", domain: str | None = None, value: float | None = None, whole: bool = False,
) -> Exhibit:  # fmt: skip
    """Kept mass against mean active experts, beside a fixed number of experts."""
    result = looked(run, frames, method=method, weights=weights, domain=domain, whole=whole)
    frame, about = frames_of.curve(result), frames_of.about(method or result.method)
    beside = fixed_beside(run, frames, result, domain, whole, method=method)
    read = f"Each point is a value of the rule; the ring marks the chosen one. Mass is {plain(result.mass_of)}."
    if beside is not None:
        read += " Squares are the same number of experts for every token: where the line lies above them, it pays to"
        read += " let the number vary."
    return Exhibit(
        figure=figures.kept_against_active(
            frame, beside, title=f"{about.title}: what is kept", name=about.title, value=value_in(result, value),
            theme=theme,
        ),
        frame=frame, read=read, rests_on=rests_on(result),
        alt=f"Curve: kept mass against mean active experts, {about.title}",
    )  # fmt: skip


def active(
    run: store.Run, *, frames: Frames = fresh, theme: Theme = "light", method: Rule | None = None,
    weights: Weights = "renormalized", domain: str | None = None, value: float | None = None, whole: bool = False,
) -> Exhibit:  # fmt: skip
    """Mean and 95th percentile of active experts over the values."""
    result = looked(run, frames, method=method, weights=weights, domain=domain, whole=whole)
    frame, about = frames_of.curve(result), frames_of.about(method or result.method)
    return Exhibit(
        figure=figures.active_over_values(
            frame, name=about.title, axis=about.value, value=value_in(result, value), theme=theme
        ),
        frame=frame, read="The distance of both lines says how much tokens differ; the slowest ones set the pace of a "
        "batch. The ring marks the chosen value.",
        rests_on=rests_on(result), alt=f"Curves over the values of {about.title}: mean and 95th percentile of experts",
    )  # fmt: skip


def by_layer(
    run: store.Run, *, frames: Frames = fresh, theme: Theme = "light", method: Rule | None = None,
    weights: Weights = "renormalized", domain: str | None = None, whole: bool = False,
) -> Exhibit:  # fmt: skip
    """Layer x value: mean active experts."""
    result = looked(run, frames, method=method, weights=weights, domain=domain, whole=whole)
    frame, about = frames_of.by_value(result), frames_of.about(method or result.method)
    return Exhibit(
        figure=figures.layers_by_value(frame, axis=about.value, theme=theme), frame=frame,
        read="Layers whose numbers stay low have decided routers: few experts hold most of the weight. Hovering says "
        "what is kept.",
        rests_on=rests_on(result), alt=f"Map of layers and values of {about.title}: mean active experts",
    )  # fmt: skip


Draw = Callable[[pl.DataFrame, WhatIf, Theme], Exhibit]


def _of_layers(draw: Draw) -> Callable[..., Exhibit]:
    """An exhibit of the layers at one value: what it can be told is the same for all of them."""

    def make(
        run: store.Run, *, frames: Frames = fresh, theme: Theme = "light", method: Rule | None = None,
        weights: Weights = "renormalized", domain: str | None = None, value: float | None = None, whole: bool = False,
    ) -> Exhibit:  # fmt: skip
        result = looked(run, frames, method=method, weights=weights, domain=domain, whole=whole)
        return draw(frames_of.layers(result, value_in(result, value)), result, theme)

    make.__name__, make.__qualname__, make.__doc__ = draw.__name__, draw.__qualname__, draw.__doc__
    return make


@_of_layers
def layers(frame: pl.DataFrame, result: WhatIf, theme: Theme) -> Exhibit:
    """Active experts per layer."""
    return Exhibit(
        figure=figures.layer_active(frame, theme=theme), frame=frame,
        read="Layers below the dotted line use fewer experts than the model does.", rests_on=rests_on(result),
        alt="Curves over the layers: mean and 95th percentile of active experts",
    )  # fmt: skip


@_of_layers
def mass(frame: pl.DataFrame, result: WhatIf, theme: Theme) -> Exhibit:
    """Kept mass and changed tokens per layer."""
    return Exhibit(
        figure=figures.layer_mass(frame, mass_of=result.mass_of, theme=theme), frame=frame,
        read=f"Kept is {plain(result.mass_of)}; a token counts as changed where its set of experts is another.",
        rests_on=rests_on(result), alt="Curves over the layers: kept mass and changed tokens",
    )  # fmt: skip


@_of_layers
def balance(frame: pl.DataFrame, result: WhatIf, theme: Theme) -> Exhibit:
    """Evenness of the load per layer, before and after."""
    return balance_exhibit(frame, result, theme)


def change(
    run: store.Run, *, frames: Frames = fresh, theme: Theme = "light", method: Rule | None = None,
    weights: Weights = "renormalized", domain: str | None = None, value: float | None = None, whole: bool = False,
) -> Exhibit:  # fmt: skip
    """Layer x expert: how the load changes."""
    result = looked(run, frames, method=method, weights=weights, domain=domain, whole=whole)
    return change_exhibit(result, value_in(result, value), theme)


def rests_on(result: WhatIf) -> str:
    """On what a chart rests: how far it can be trusted, and on how many tokens."""
    certain = result.certainty
    return f"{certain[0].upper()}{certain[1:]}; {frames_of.tokens_of(result)}."


def balance_exhibit(frame: pl.DataFrame, result: WhatIf, theme: Theme) -> Exhibit:
    return Exhibit(
        figure=figures.layer_balance(frame, theme=theme), frame=frame,
        read="0 is an even load; hovering says how far the busiest expert lies above the mean.",
        rests_on=rests_on(result), alt="Curves over the layers: coefficient of variation of the load, before and after",
    )  # fmt: skip


def change_exhibit(result: WhatIf, value: float, theme: Theme) -> Exhibit:
    frame = frames_of.loads(result, value)
    return Exhibit(
        figure=figures.change_map(frame, theme=theme), frame=frame,
        read="Blue experts get more tokens than before, orange ones fewer.", rests_on=rests_on(result),
        alt="Map of layers and experts: change of the load",
    )  # fmt: skip


EXHIBITS = (
    Entry("what-if-kept", kept, "Other routing: kept mass against active experts", page="what-if"),
    Entry("what-if-active", active, "Active experts by value", page="what-if", report=False),
    Entry("what-if-by-layer", by_layer, "Active experts, layer by layer", page="what-if", report=False),
    Entry("what-if-layers", layers, "Active experts per layer", page="what-if", report=False),
    Entry("what-if-mass", mass, "Kept mass and changed tokens per layer", page="what-if", report=False),
    Entry("what-if-balance", balance, "Balance of the load per layer", page="what-if", report=False),
    Entry("what-if-change", change, "How the load of each expert changes", page="what-if", report=False),
)
