"""Exhibits of the page Routing on what experts are for: domains or tokens, beside controls, and against SRP."""

from __future__ import annotations

from typing import Literal

import polars as pl

import store
from app.exhibits.absent import not_yet, require
from app.exhibits.exhibit import Absent, Entry, Exhibit, Frames, fresh
from app.figures import specialization as figures
from app.figures.style import Theme
from app.frames import specialization as frames_of_specialization
from app.frames.specialization import KINDS

Kind = Literal["domain", "input", "predicted", "next"]
Form = Literal["expert", "largest"]

_UNITS = {
    ("domain", "expert"): "spread over domains / mean",
    ("domain", "largest"): "largest share of a domain",
    ("", "expert"): "share of an expert's own tokens",
    ("", "largest"): "largest share of a token id",
}
_READ = {
    ("domain", "expert"): "0: the expert takes the same share of every domain. Mean over the experts of a layer.",
    ("domain", "largest"): "The share of a domain's tokens that its busiest expert takes, averaged over domains.",
    ("", "expert"): "Of the token ids whose first choice an expert mostly is: the part that goes to it. Ids with 20 "
    "occurrences or more.",
    ("", "largest"): "The part of a token id's occurrences that goes to its busiest expert, averaged over ids with 10 "
    "occurrences or more.",
}
LEAST_OCCURRENCES = 10
"""Token ids that occur less often say little and are not drawn."""


def specialization(
    run: store.Run,
    *,
    frames: Frames = fresh,
    theme: Theme = "light",
    kind: Kind | None = None,
    form: Form = "expert",
) -> Exhibit:
    """How far experts are for domains or tokens, over the layers, beside controls."""
    which = _kind(run, kind, frames)
    known = frames(frames_of_specialization.specialization, run)
    frame = known.filter((pl.col("kind") == which) & (pl.col("form") == form))
    frame = frame.filter(pl.col("at").is_null() | (pl.col("at") >= LEAST_OCCURRENCES))
    words = ("domain" if which == "domain" else "", form)
    rest = frame.select("tokens", "sequences").drop_nulls("tokens").head(1).rows()
    tokens, sequences = rest[0] if rest else (0, None)
    return Exhibit(
        figure=figures.layer_curve(frame, title=f"Specialization in {KINDS[which]}", y=_UNITS[words], theme=theme),
        frame=frame,
        read=f"{_READ[words]} Only what lies above the dotted line is specialization.",
        rests_on=f"{tokens:,} tokens" + (f", {sequences:,} sequences; 95 % intervals." if sequences else "."),
        alt="Curve over the layers: specialization of the experts, with controls",
    )


def specialization_srp(
    run: store.Run, *, frames: Frames = fresh, theme: Theme = "light", kind: Kind | None = None
) -> Exhibit:
    """SRP of every expert against its specialization."""
    which = _kind(run, kind, frames)
    frame = frames(frames_of_specialization.experts, run, kind=which)
    found = frames(frames_of_specialization.correlations, run).filter(pl.col("kind") == which)
    words = "Too few experts have both figures for a correlation."
    if not found.is_empty():
        row = found.row(0, named=True)
        words = (
            f"Correlation over {len(frame):,} experts {row['value']:.2f}; experts renamed inside their layers give "
            f"{row['low']:.2f} to {row['high']:.2f}."
        )
    unit = _UNITS["domain" if which == "domain" else "", "expert"]
    return Exhibit(
        figure=figures.srp_scatter(frame, title="Do specialised experts serve segments?", x=unit, theme=theme),
        frame=frame,
        read="Points that rise to the right: experts that are for one kind of text stay in use over a segment, which "
        "a cache likes.",
        rests_on=words,
        alt="Points: SRP of every expert against its specialization",
    )


def kinds_of(run: store.Run, frames: Frames = fresh) -> list[str]:
    """What experts of this run can be said to be for, in the order of ``KINDS``.

    Raises:
        Absent: nothing.
    """
    known = frames(frames_of_specialization.specialization, run)["kind"].unique().to_list()
    here = [kind for kind in KINDS if kind in known]
    if here:
        return here
    if len(run.domains) > 1 or (run.has_trace and run.has_tokens):
        raise not_yet("Specialization", run)
    require("Specialization", run, "trace", "text")
    raise Absent("Specialization takes text of several domains, or its token ids; this run has neither.")


def _kind(run: store.Run, kind: str | None, frames: Frames) -> str:
    here = kinds_of(run, frames)
    if kind is not None and kind not in here:
        raise Absent(f"This run says nothing of what experts are for by {KINDS[kind]}.")
    return kind or here[0]


EXHIBITS = (
    Entry("specialization", specialization, "What experts are for", page="routing"),
    Entry("specialization-srp", specialization_srp, "SRP against specialization", page="routing"),
)
