"""The experts that the token before used in the same layer: what an LRU cache keeps without any prediction."""

from __future__ import annotations

import numpy as np

from planner.simulate.prefetch.predicted import Predicted, checked_width, foreseeable, seen_before
from planner.simulate.workload import Workload


def predict(
    workload: Workload, *, train: Workload, ahead: int = 1, width: int | None = None, across_passes: bool = False
) -> Predicted:
    """The experts of the same layer one pass before, in their order there; nothing in the first pass of a request.

    ``train`` is not looked at; it is taken as by all methods. Wider than a step's experts it stays empty.

    Raises:
        PlanError: as :func:`~planner.simulate.prefetch.predicted.checked_width`.
    """
    width = checked_width(workload, train, ahead=ahead, width=width, across_passes=across_passes)
    ids = np.full((workload.num_layers, workload.num_passes, width), -1, np.int16)
    kept = min(width, workload.ids.shape[2])
    for layer in range(workload.num_layers):
        before = seen_before(workload, layer, workload.num_layers, across_passes=True)
        assert before is not None  # across passes there always is one
        ids[layer, :, :kept] = before.ids[:, :kept]
    return Predicted("previous_token", foreseeable(workload, ids, ahead=ahead, across_passes=across_passes), ahead)
