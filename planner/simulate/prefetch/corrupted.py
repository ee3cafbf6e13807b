"""True routes with mistakes in them: what a predictor of a given accuracy would tell, whatever it is made of.

For predictors that cannot be run on a trace, such as the trained ones of ExpertFlow (arXiv 2410.17954), at the accuracy
that they report or that one asks for. At accuracy 1 the routes are known beforehand, as in Read-ME (arXiv 2410.19123),
whose one router runs before the model does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.errors import PlanError
from planner.simulate.prefetch.predicted import Predicted, checked_width, foreseeable
from planner.simulate.workload import Ids, Workload


def predict(
    workload: Workload,
    *,
    train: Workload,
    accuracy: float,
    ahead: int = 1,
    width: int | None = None,
    across_passes: bool = False,
    fixed: bool = False,
    seed: int = 0,
) -> Predicted:
    """As many experts as each step needs, each right with probability ``accuracy``, independently; in random order.

    Real predictors are not as even: they miss rare experts and whole tokens, and know how sure they are.

    Args:
        workload: its true routes are corrupted.
        train: wrong experts are drawn by their popularity here.
        accuracy: share of right ones, 0..1.
        ahead: layers between prediction and use; it does not change the accuracy.
        width: experts foreseen at most; None = all that a step needs.
        across_passes: the first layers of a pass are foreseen too, but for the first pass of a request.
        fixed: every step has the same number of right ones, up to one: accuracy x needed, rounded up or down by lot.
        seed: of all draws; the same seed gives the same predictions.

    Raises:
        PlanError: an accuracy outside 0..1, or as :func:`~planner.simulate.prefetch.predicted.checked_width`.
    """
    if not 0.0 <= accuracy <= 1.0:
        raise PlanError(f"accuracy {accuracy:g} is no share of the experts: give 0 to 1")
    places = workload.ids.shape[2] if width is None else width
    checked_width(workload, train, ahead=ahead, width=places, across_passes=across_passes)
    generator = np.random.default_rng([seed, 1])
    rank = np.arange(workload.ids.shape[2])
    flags = np.empty(workload.ids.shape, np.int8)
    for layer, needed in enumerate(workload.needed):
        if fixed:
            right = np.floor(accuracy * needed + generator.random(len(needed)))
            marks = _fixed(generator, right, needed, len(rank))
        else:
            marks = generator.random((len(needed), len(rank))) < accuracy
        flags[layer] = np.where(rank < needed[:, None], marks, -1)
    ids = drawn(workload, flags, train=train, seed=seed)
    return Predicted(
        "corrupted", foreseeable(workload, ids[:, :, :places], ahead=ahead, across_passes=across_passes), ahead
    )


def drawn(workload: Workload, flags: NDArray[np.int8], *, train: Workload, seed: int) -> Ids:
    """Needed experts where flags (layers, passes, places) are 1, others drawn by their popularity where they are 0.

    Nothing where flags are -1, or where no expert is left to draw.
    """
    from planner.simulate._prefetch import place_experts

    ids = np.empty(flags.shape, np.int16)
    seeds = np.random.SeedSequence([seed, 2]).generate_state(workload.num_layers)
    for layer, popular in enumerate(train.counts().astype(np.float64)):
        place_experts(workload.ids[layer], flags[layer], popular, int(seeds[layer]), ids[layer])
    return ids


def _fixed(generator: np.random.Generator, right: NDArray[Any], needed: NDArray[np.int64], width: int) -> Any:
    """(passes, width) marks of exactly ``right`` of the first ``needed`` places, chosen by lot."""
    lots = np.where(np.arange(width) < needed[:, None], generator.random((len(needed), width)), 2.0)
    return np.argsort(np.argsort(lots, axis=1), axis=1) < right[:, None]
