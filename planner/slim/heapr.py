"""HEAPr: all neurons of the model ranked together by what the loss gains, to second order, when one falls silent.

Source: HEAPr (ICLR 2026).
"""

from __future__ import annotations

from typing import Literal

from planner.domains import Mix
from planner.slim.forms import MULTIPLE, slimmed
from planner.slim.neurons import neuron_scores
from planner.task import Draft, Task


def draft(
    task: Task, *, weighting: Literal["mean", "total"] = "mean", multiple: int = MULTIPLE, mix: Mix = "union"
) -> Draft:
    """The neurons of routed experts that matter least to the loss go; shared experts keep theirs.

    Args:
        task: what to plan.
        weighting: ``mean`` as published, where how often an expert is used does not count; ``total`` multiplies by its
            tokens.
        multiple: what widths are a multiple of (forms uniform and per_layer).
        mix: how domains come together, where vectors were kept per domain.
    """
    scores, notes = neuron_scores(
        task, "heapr", "neuron_gradient", scope="model", mix=mix, shared=False, parameters={"weighting": weighting}
    )
    return slimmed(
        task, "heapr", scores, scope="model", multiple=multiple, weigh="equal", unit="squared loss", notes=notes
    )
