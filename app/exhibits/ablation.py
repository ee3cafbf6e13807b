"""Exhibits of what switching experts off did, from the documents beside a run."""

from __future__ import annotations

import shlex
from typing import Any

import polars as pl

import store
from app.exhibits.exhibit import Absent, Entry, Exhibit, Frames, fresh
from app.figures import ablation as figures
from app.figures.style import Theme
from app.frames import ablation as frames_of_ablation
from app.frames import super_experts
from moescope.errors import InputError


def perplexity(
    run: store.Run, *, frames: Frames = fresh, theme: Theme = "light", ablation: str | None = None
) -> Exhibit:
    """Perplexity with experts switched off, beside controls; ``ablation``: name of the file, None = the newest."""
    passes = frames_of_ablation.passes(chosen(run, ablation))
    tokens = int(passes["tokens"].max() or 0)  # type: ignore[arg-type]
    return Exhibit(
        figure=figures.perplexity_ratios(passes, theme=theme),
        frame=passes,
        read="Each mark is one reading of the same text with other experts switched off; 1 is the unchanged model. The "
        "chosen experts matter if their mark lies clear of all controls: as many random experts, and as many of the "
        "same layers.",
        rests_on=f"{tokens:,} predicted tokens; unchanged perplexity {passes['perplexity'][0]:,.4g}; 95 % intervals of "
        "pairs of sequences.",
        alt="Perplexity ratios of the chosen experts and of every control",
    )


def sinks(run: store.Run, *, frames: Frames = fresh, theme: Theme = "light", ablation: str | None = None) -> Exhibit:
    """Attention sinks before and after."""
    layers = frames_of_ablation.layers(chosen(run, ablation))
    if layers["sink"].drop_nulls().is_empty():
        raise Absent("No layer of this model has softmax attention, so there is no attention sink to compare.")
    return Exhibit(
        figure=figures.sinks_before_and_after(layers, theme=theme),
        frame=layers,
        read="Attention that falls on position 0. Where the experts feed an attention sink, the dashed line drops; "
        "hover for the decay, and for that of the controls.",
        rests_on=_decay(layers),
        alt="Attention on the first position per layer, before and after",
    )


def residual(run: store.Run, *, frames: Frames = fresh, theme: Theme = "light", ablation: str | None = None) -> Exhibit:
    """Massive activations before and after."""
    layers = frames_of_ablation.layers(chosen(run, ablation))
    return Exhibit(
        figure=figures.residual_before_and_after(layers, theme=theme),
        frame=layers,
        read="Where the experts make the massive activations, the dashed line stays far below. Diamonds mark layers "
        "above 100 and 1,000 times the median.",
        alt="Largest hidden state per layer, before and after",
    )


def chosen(run: store.Run, name: str | None) -> dict[str, Any]:
    """The document of that name beside a run; the newest for None.

    Raises:
        Absent: there is no ablation yet.
        InputError: none has that name.
        StoreError: it cannot be read.
    """
    found = {path.stem: path for path in store.list_evaluations(run.path, "ablation")}
    if not found:
        raise Absent(
            "No experts have been switched off yet. The command sets the down_proj of chosen experts to zero without "
            "telling the router, and measures the perplexity on held-out text beside two kinds of controls.",
            remedy=command(run),
        )
    if name is not None and name not in found:
        raise InputError(f"run {run.name!r} has no ablation {name!r}; it has {', '.join(found)}")
    return store.read_evaluation(found[name] if name is not None else next(iter(found.values())))


def command(run: store.Run) -> str:
    """What switches experts off: the super experts of a run where a rule names some, else experts by choice."""
    name = shlex.quote(store.shown(run.path))
    marked = super_experts.super_experts(run).filter(pl.col("tokens") == "all")["rule"].to_list()
    which = f"--super-experts {name}" if marked else f"--experts LAYER:EXPERT,... --beside {name}"
    which += " --rule code" if marked and "paper" not in marked else ""
    return f"moescope ablate MODEL {which} --data PATH"


def _decay(layers: pl.DataFrame) -> str:
    seen = layers.filter(pl.col("sink_decay").is_not_null())
    if seen.is_empty():
        return ""
    top = seen.sort("sink_decay").row(-1, named=True)
    beside = top["control_sink_decay"]
    controls = "" if beside is None else f", at most {beside:.1%} for any control there"
    return f"Largest decay {top['sink_decay']:.1%} in layer {top['layer']}{controls}."


EXHIBITS = (
    Entry("ablation", perplexity, "Perplexity with experts switched off", page="super-experts"),
    Entry("ablation-sinks", sinks, "Attention sinks with experts switched off", page="super-experts"),
    Entry("ablation-residual", residual, "Massive activations with experts switched off", page="super-experts"),
)
