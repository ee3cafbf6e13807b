"""What the page Architecture can say of a run."""

from __future__ import annotations

import store
from app.frames import imbalance, kinds, steps
from profiler.headline.flow import MOST_EXPERTS


def subjects(run: store.Run) -> list[str]:
    """The subjects that a run has data for, in the order of the page; quick to tell."""
    if not run.layers:
        return []
    several = len(run.layers) > 1
    last = run.layers[-1].layer
    traced = run.has_trace
    outputs = run.table("expert_vector", layer=last, columns=["tokens"])
    there = {
        "f against P": not imbalance.spreads(run).is_empty(),
        "Shared": any(layer.num_shared for layer in run.layers) and not run.table("moe_output").is_empty(),
        "Kinds": kinds.has_kinds(run),
        "Steps": len(steps.steps_of(run)) > 1,
        "Axes": traced,
        "Memory": traced and several and max(layer.num_experts for layer in run.layers) <= MOST_EXPERTS,
        "Neighbours": several and not (outputs.is_empty() and run.table("lookahead").is_empty()),
        "Router rows": not run.table("router_row", layer=last, columns=["bias"]).is_empty(),
    }
    return [name for name, here in there.items() if here]
