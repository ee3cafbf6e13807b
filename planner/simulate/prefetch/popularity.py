"""Always the experts that are used most: what a predictor must beat to know anything about the token at hand."""

from __future__ import annotations

import numpy as np

from planner.simulate.prefetch.predicted import Predicted, checked_width, foreseeable, top_experts
from planner.simulate.workload import Workload


def predict(
    workload: Workload,
    *,
    train: Workload,
    ahead: int = 1,
    width: int | None = None,
    across_passes: bool = False,
    by_domain: bool = False,
) -> Predicted:
    """The ``width`` experts of each layer that most tokens of ``train`` used; ties go to the smaller id.

    Popularity could tell the experts of all layers at any time. The first ``ahead`` layers are left out all the same,
    so that its figures stand beside those of the other methods; experts that ``train`` never used are not foreseen.

    Args:
        workload: what is foreseen.
        train: what popularity is counted on: other requests.
        ahead: layers between prediction and use.
        width: experts foreseen per step; None = k.
        across_passes: the first layers of a pass are foreseen too, but for the first pass of a request.
        by_domain: requests get the popular experts of their own domain, where ``train`` has it.

    Raises:
        PlanError: as :func:`~planner.simulate.prefetch.predicted.checked_width`.
    """
    width = checked_width(workload, train, ahead=ahead, width=width, across_passes=across_passes)
    popular = top_experts(train.counts().astype(np.float64), width)
    best = np.repeat(popular[:, None], workload.num_passes, axis=1)
    if by_domain:
        domains = np.array(workload.domains)[workload.request_of_pass]
        for name in set(workload.domains) & set(train.domains):
            counts = train.of_domain(name).counts().astype(np.float64)
            best[:, domains == name] = top_experts(counts, width)[:, None]
    return Predicted("popularity", foreseeable(workload, best, ahead=ahead, across_passes=across_passes), ahead)
