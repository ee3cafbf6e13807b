"""Width: how strongly a neuron fires, times what it can do with it; ranked within the layer.

Source: SparseUnifiedModel (arXiv 2512.02351), for dense layers.
"""

from __future__ import annotations

from planner.domains import Mix
from planner.probes import Weigh
from planner.slim.forms import MULTIPLE, slimmed
from planner.slim.neurons import neuron_scores
from planner.task import Draft, Task


def draft(task: Task, *, multiple: int = MULTIPLE, weigh: Weigh = "influence", mix: Mix = "union") -> Draft:
    """Neurons of routed experts with the lowest width score go; shared experts keep theirs.

    Args:
        task: what to plan.
        multiple: what widths are a multiple of (forms uniform and per_layer).
        weigh: what makes layers comparable in form per_layer, see :func:`planner.probes.layer_weights`.
        mix: how domains come together, where vectors were kept per domain.
    """
    scores, notes = neuron_scores(
        task, "width", "neuron_activation", scope="layer", mix=mix, shared=False, parameters={}
    )
    return slimmed(task, "width", scores, scope="layer", multiple=multiple, weigh=weigh, unit="activation", notes=notes)
