"""All findings of a run, in their order: those that a decision rests on come first.

A "no" is a finding too, and so is what the run cannot say. Nothing is computed here that needs the trace.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import polars as pl

import store
from app.exhibits.exhibit import Frames, fresh
from app.findings import about_documents, about_experts, about_routing, about_text
from app.findings.finding import Evidence, Finding
from app.sample import remarks
from moescope.errors import MoescopeError


@dataclass(frozen=True)
class Subject:
    """What findings are about.

    Attributes:
        name: in a word or two.
        make: the findings of a run, most often one.
        headline: whether the Overview tells of it; quick to make, and from the run's own file.
    """

    name: str
    make: Callable[[store.Run, Frames], list[Finding]]
    headline: bool = False


SUBJECTS = (
    Subject("Capture", about_text.capture),
    Subject("Super experts", about_experts.super_experts, headline=True),
    Subject("Balance", about_routing.balance, headline=True),
    Subject("Balance loss", about_routing.unseen),
    Subject("Dead experts", about_routing.dead),
    Subject("Domains", about_routing.domains, headline=True),
    Subject("Tokens", about_routing.tokens, headline=True),
    Subject("Local consistency", about_routing.consistency, headline=True),
    Subject("Cache", about_routing.cache, headline=True),
    Subject("Caching", about_documents.caching),
    Subject("Foresight", about_routing.foresight),
    Subject("Redundancy", about_experts.redundancy, headline=True),
    Subject("Confidence", about_routing.confidence, headline=True),
    Subject("Importance", about_experts.importance),
    Subject("Coverage", about_text.starved),
    Subject("Rankings", about_text.rankings, headline=True),
    Subject("Plans", about_documents.plans),
    Subject("Experiments", about_documents.ablations),
    Subject("Not known", about_text.unknown),
)
"""What findings are about, in their order."""

SCHEMA = {
    "subject": pl.String, "finding": pl.String, "evidence": pl.String, "page": pl.String, "layer": pl.String,
    "expert": pl.Int64,
}  # fmt: skip


def findings(run: store.Run, *, frames: Frames = fresh) -> list[Finding]:
    """All findings of a run, in the order of the subjects.

    Args:
        run: finished, or still being collected.
        frames: where frames come from, such as a page's cache.
    """
    return _of(SUBJECTS, run, frames) + [
        Finding("Sample", remark, evidence=(Evidence("model", run.info.model, source="table run"),), tone="attention")
        for remark in remarks(run)
    ]


def headlines(run: store.Run, *, frames: Frames = fresh) -> list[Finding]:
    """The findings that the Overview shows; what the run cannot say is left out."""
    found = _of(tuple(subject for subject in SUBJECTS if subject.headline), run, frames)
    return [one for one in found if one.tone != "unknown"]


def as_frame(found: list[Finding]) -> pl.DataFrame:
    """One row per finding: subject, finding = its answer, evidence = its first number in one line, page, layer (its
    label), expert; empty or null where there is none."""
    rows = [
        (one.subject, one.answer, one.evidence[0].line if one.evidence else "", one.page, one.layer, one.expert)
        for one in found
    ]
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def table(run: store.Run) -> pl.DataFrame:
    """All findings of a run as :func:`as_frame` has them."""
    return as_frame(findings(run))


def _of(subjects: tuple[Subject, ...], run: store.Run, frames: Frames) -> list[Finding]:
    found: list[Finding] = []
    for subject in subjects:
        try:
            found += subject.make(run, frames)
        except MoescopeError as error:
            found.append(Finding(subject.name, f"This could not be worked out: {error}", tone="unknown"))
    return found
