"""Exhibits of a sweep's studies: self-contrast, rerouting fitted on the text so far, items solved over several k."""

from __future__ import annotations

from typing import Any

import polars as pl

import store
from app.exhibits.exhibit import Absent, Entry, Exhibit, Frames, fresh
from app.exhibits.sweep import PAGE, PAIRED, chosen, command, tokens_of
from app.figures import sweep_studies as figures
from app.figures.style import Theme, safe
from app.frames import sweep_studies as frames_of
from app.frames.sweep import of_a_document


@of_a_document
def contrast_kl(run: store.Run, *, frames: Frames = fresh, theme: Theme = "light", sweep: str | None = None) -> Exhibit:
    """KL of the model's own routing from the weak one, per domain and rank."""
    frame = _study(chosen(run, sweep), run, "contrast")
    return Exhibit(
        figure=figures.contrast_kl(frame, theme=theme),
        frame=frame,
        read="Strong is the model as it is; weak is the model with the expert of one rank alone. Contrast has "
        "something to work with where they differ, and the weak one still predicts.",
        rests_on=f"{tokens_of(frame)} predicted tokens; 95 % intervals over sequences.",
        alt="Bars per domain and rank: KL divergence of strong from weak routing",
    )


@of_a_document
def contrast_accuracy(
    run: store.Run,
    *,
    frames: Frames = fresh,
    theme: Theme = "light",
    sweep: str | None = None,
    domain: str | None = None,
) -> Exhibit:
    """Accuracy of the contrasted next token less the model's own."""
    every = _study(chosen(run, sweep), run, "contrast")
    frame = every.filter(pl.col("domain") == (domain or "all"))
    if frame.is_empty():
        raise Absent(f"This sweep has no text of domain {domain}.")
    return Exhibit(
        figure=figures.contrast_accuracy(frame, theme=theme),
        frame=frame,
        read="Above 0, contrast finds the next token of the text more often than the model alone. It is judged on "
        "given text; gains in reasoning over the model's own words may differ.",
        rests_on=f"{tokens_of(frame)} predicted tokens; {PAIRED}",
        alt="Curves over the strength of the contrast: change of the accuracy, one per rank",
    )


@of_a_document
def rerouting(run: store.Run, *, frames: Frames = fresh, theme: Theme = "light", sweep: str | None = None) -> Exhibit:
    """Loss of what follows, with fitted vectors and both controls."""
    frame = _study(chosen(run, sweep), run, "rerouting")
    return Exhibit(
        figure=figures.rerouting(frame, theme=theme),
        frame=frame,
        read="Left of 0, the vectors help. Fitted ones are worth their cost only where they lie left of both controls: "
        "random ones as long, and those fitted on another sequence.",
        rests_on=f"{tokens_of(frame)} tokens behind the fits; {PAIRED}",
        alt="Marks per domain: change of the loss with fitted, foreign and random vectors",
    )


@of_a_document
def search(
    run: store.Run,
    *,
    frames: Frames = fresh,
    theme: Theme = "light",
    sweep: str | None = None,
    domain: str | None = None,
) -> Exhibit:
    """Items solved by each number of experts, by any, and by samples at equal FLOPs."""
    every = _study(chosen(run, sweep), run, "search")
    frame = every.filter(pl.col("domain") == (domain or "all"))
    if frame.is_empty():
        raise Absent(f"This sweep has no items of domain {domain}.")
    return Exhibit(
        figure=figures.search(frame, where=safe(domain or "all items"), theme=theme),
        frame=frame,
        read="Trying several k pays where their union solves more than samples at the model's own k that cost as many "
        "FLOPs. Samples are counted exactly, by the probability that one of them is the answer.",
        rests_on=f"{frame['items'][0]:,} items; 95 % intervals over items; both sides know the right answer.",
        alt="Bars: share of items solved by each number of experts, their union, and samples",
    )


def _study(document: dict[str, Any], run: store.Run, name: str) -> pl.DataFrame:
    if document[name] is None:
        words = {"contrast": "Self-contrast was", "rerouting": "Rerouting was", "search": "Items were"}[name]
        option = {"contrast": "--contrast", "rerouting": "--rerouting", "search": "--items text"}[name]
        raise Absent(f"{words} not tried on this model.", remedy=command(run, option))
    frame: pl.DataFrame = getattr(frames_of, name)(document)
    return frame


EXHIBITS = (
    Entry("sweep-contrast-kl", contrast_kl, "Strong against weak routing", page=PAGE, report=False),
    Entry("sweep-contrast", contrast_accuracy, "The contrasted next token", page=PAGE, report=False),
    Entry("sweep-rerouting", rerouting, "Rerouting fitted on the text so far", page=PAGE, report=False),
    Entry("sweep-items", search, "Items solved over several k", page=PAGE, report=False),
)
