"""All that a run says of one expert, section by section: what ``moescope show RUN expert`` prints."""

from __future__ import annotations

from typing import Any

import polars as pl

import store
from app.frames import expert as frames
from app.frames import expert_tokens as tokens


def sections(run: store.Run, *, label: str, expert: int) -> dict[str, pl.DataFrame]:
    """Frames of ``app.frames.expert`` and ``expert_tokens`` by title; what the run says nothing of is left out.

    Raises:
        InputError: there is no such MoE layer, or it has no such expert.
    """
    where: dict[str, Any] = {"label": label, "expert": expert}
    found = {"figures": frames.figures(run, **where), "domains": frames.domain_load(run, **where)}
    for kind in ("input", "predicted", "next"):
        found[f"tokens, {kind}, most its own"] = tokens.top_tokens(run, **where, tokens=kind)
    found["tokens, input, most often"] = tokens.top_tokens(run, **where, by="count")
    found["contexts"] = tokens.contexts(run, **where, by="random" if "weights" in run.omissions else "weight")
    found["neighbours"] = frames.partners(run, **where)
    found["importance"] = frames.importance_of(run, **where)
    found["outliers"] = frames.outliers(run, **where)
    found["ablations"] = frames.ablations(run, **where)
    return {title: frame for title, frame in found.items() if not frame.is_empty() and len(frame.columns) > 1}
