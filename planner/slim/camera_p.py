"""CAMERA-P: all neurons of a layer ranked together by the energy that they put into its output.

Source: CAMERA (AAAI 2026) and its published code, which prunes layer after layer; this is the plan from one pass.
"""

from __future__ import annotations

from planner.domains import Mix
from planner.probes import Weigh
from planner.slim.forms import MULTIPLE, slimmed
from planner.slim.neurons import neuron_scores
from planner.task import Draft, Task


def draft(
    task: Task, *, alpha: float = 0.9, multiple: int = MULTIPLE, weigh: Weigh = "influence", mix: Mix = "union"
) -> Draft:
    """Neurons of the least energy go; those of shared experts are ranked with the others.

    Args:
        task: what to plan.
        alpha: part of the maximum in the energy, 0..1; 0.9 is what the published run used.
        multiple: what widths are a multiple of (forms uniform and per_layer).
        weigh: what makes layers comparable in form per_layer, see :func:`planner.probes.layer_weights`.
        mix: how domains come together, where vectors were kept per domain.
    """
    scores, notes = neuron_scores(
        task, "camera", "neuron_activation", scope="layer", mix=mix, shared=True, parameters={"alpha": alpha}
    )
    return slimmed(
        task, "camera_p", scores, scope="layer", multiple=multiple, weigh=weigh, unit="squared activation", notes=notes
    )
