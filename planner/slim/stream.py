"""Slim by the stream: all neurons of the model ranked together by what their silence does to the residual stream. Ours.

The energy that a neuron puts into its layer's output, as a part of the squared stream that it is added to: so neurons
of different layers compare (:mod:`planner.estimate.stream`).
"""

from __future__ import annotations

from planner.domains import Mix
from planner.estimate.stream import streams
from planner.slim.forms import MULTIPLE, slimmed
from planner.slim.neurons import LayerNeurons, neuron_scores
from planner.task import Draft, Task


def draft(task: Task, *, multiple: int = MULTIPLE, mix: Mix = "tokens") -> Draft:
    """The neurons of routed experts that turn the stream least go; shared experts keep theirs.

    Args:
        task: what to plan.
        multiple: what widths are a multiple of (forms uniform and per_layer).
        mix: how domains come together, where vectors were kept per domain.

    Raises:
        PlanError: the run did not see the stream, or as the other ways to slim.
    """
    known = streams(task)
    energies, notes = neuron_scores(
        task, "camera", "neuron_activation", scope="model", mix=mix, shared=False, parameters={"alpha": 0.0}
    )
    scores = {}
    for key, one in energies.items():
        whole = one.routed.sum(1, keepdims=True)
        parts = one.routed / whole.clip(1e-300) * known[key].part[:, None] * task.layer_factors[key]
        scores[key] = LayerNeurons(routed=parts, shared=one.shared)
    unit = "part of the squared stream"
    return slimmed(task, "stream_slim", scores, scope="model", multiple=multiple, weigh="equal", unit=unit, notes=notes)
