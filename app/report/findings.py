"""What a run says, in plain sentences with their evidence: the report's first page, and the Overview's.

A "no" is a finding too, and so is what the run cannot say. Nothing is computed here that needs the trace.
"""

from __future__ import annotations

from collections.abc import Callable

import store
from app.exhibits.exhibit import Frames, fresh
from app.report import about_documents, about_experts, about_routing, about_text
from app.report.finding import Evidence, Finding
from app.sample import remarks
from moescope.errors import MoescopeError

Subject = Callable[[store.Run, Frames], list[Finding]]

SUBJECTS: tuple[tuple[str, Subject], ...] = (
    ("Capture", about_text.capture),
    ("Balance", about_routing.balance),
    ("Dead experts", about_routing.dead),
    ("Confidence", about_routing.confidence),
    ("Domains", about_routing.domains),
    ("Local consistency", about_routing.consistency),
    ("Caching", about_documents.caching),
    ("Foresight", about_routing.foresight),
    ("Super experts", about_experts.super_experts),
    ("Redundancy", about_experts.redundancy),
    ("Importance", about_experts.importance),
    ("Coverage", about_text.coverage),
    ("Plans", about_documents.plans),
    ("Experiments", about_documents.ablations),
    ("Not known", about_text.unknown),
)
"""What findings are about, in their order; each makes those of its subject."""


def findings(run: store.Run, *, frames: Frames = fresh) -> list[Finding]:
    """All findings of a run, in the order of the subjects.

    Args:
        run: finished, or still being collected.
        frames: where frames come from, such as a page's cache.
    """
    found: list[Finding] = []
    for name, subject in SUBJECTS:
        try:
            found += subject(run, frames)
        except MoescopeError as error:
            found.append(Finding(name, f"This could not be worked out: {error}", tone="unknown"))
    return found + [
        Finding("Sample", remark, (Evidence("model", run.info.model, source="table run"),), tone="attention")
        for remark in remarks(run)
    ]
