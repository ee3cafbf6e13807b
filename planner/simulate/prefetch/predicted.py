"""What a predictor hands over, and what all predictors share: their checks, and the layers that they may look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moescope.errors import PlanError
from planner.simulate.workload import Ids, Workload


@dataclass(frozen=True)
class Predicted:
    """Experts foreseen for every step of a workload.

    Attributes:
        method: its name.
        ids: (layers, passes, width) int16, each expert once, in falling confidence; -1 = none.
        ahead: MoE layers between the step during which a prediction is made and the one that it is for: the experts
            of layer l become known while layer l - ahead runs. The first ``ahead`` layers of a pass have no prediction,
            or one that was made in the pass before, by its last layers.
    """

    method: str
    ids: Ids
    ahead: int

    @property
    def layers(self) -> NDArray[np.bool_]:
        """(layers,) which layers anything was foreseen for."""
        return np.asarray((self.ids >= 0).any(axis=(1, 2)))

    def first(self, width: int) -> Predicted:
        """Only the ``width`` most confident experts of each step."""
        return replace(self, ids=np.ascontiguousarray(self.ids[:, :, :width]))


class Seen(NamedTuple):
    """What a predictor sees of one earlier layer: ids and tokens (passes, width), -1 and 0 where there is nothing."""

    ids: Ids
    tokens: NDArray[np.uint16]


def checked_width(workload: Workload, train: Workload, *, ahead: int, width: int | None, across_passes: bool) -> int:
    """The number of experts to foresee: k of the layer with most, unless one is given.

    Raises:
        PlanError: no layer lies ``ahead``, the width is none, or the two workloads are of different models.
    """
    if (train.num_layers, train.num_experts) != (workload.num_layers, workload.num_experts):
        raise PlanError(
            f"predictions fitted on {train.num_layers} layers of {train.num_experts} experts do not serve"
            f" {workload.num_layers} of {workload.num_experts}: fit on text of the same model"
        )
    most = workload.num_layers if across_passes else workload.num_layers - 1
    if not 1 <= ahead <= most:
        raise PlanError(f"{ahead} layers ahead: a model with {workload.num_layers} MoE layers allows 1 to {most}")
    chosen = max(workload.top_k) if width is None else width
    if not 1 <= chosen <= workload.num_experts:
        raise PlanError(f"{chosen} experts foreseen per layer: 1 to {workload.num_experts} are possible")
    return chosen


def seen_before(workload: Workload, layer: int, distance: int, *, across_passes: bool) -> Seen | None:
    """What was routed ``distance`` MoE layers before ``layer``, for every pass; None where that is another pass.

    across_passes: the last layers of the pass before, of the same request, stand before the first layers of a pass.
    """
    back, at = divmod(layer - distance, workload.num_layers)
    if back == 0:
        return Seen(workload.ids[at], workload.tokens[at])
    if not across_passes:
        return None
    ids, tokens = np.full_like(workload.ids[at], -1), np.zeros_like(workload.tokens[at])
    passes = -back
    owner = workload.request_of_pass
    same = np.flatnonzero(owner[passes:] == owner[: len(owner) - passes])
    ids[same + passes], tokens[same + passes] = workload.ids[at, same], workload.tokens[at, same]
    return Seen(ids, tokens)


def top_experts(scores: NDArray[np.float64], width: int) -> Ids:
    """(..., width) experts of the highest scores (..., E), falling, the smaller id first; -1 for scores of 0."""
    order = np.argsort(-scores, axis=-1, kind="stable")[..., :width]
    positive = np.take_along_axis(scores, order, axis=-1) > 0
    return np.where(positive, order, -1).astype(np.int16)


def foreseeable(workload: Workload, ids: Ids, *, ahead: int, across_passes: bool) -> Ids:
    """``ids`` without what nobody has told yet: the first ``ahead`` layers of a pass, or of a request only."""
    result = np.ascontiguousarray(ids, dtype=np.int16)
    if across_passes:
        result[:ahead, workload.offsets[:-1]] = -1
    else:
        result[:ahead] = -1
    return result


def together(predicted: Predicted, single: Workload, unite: Callable[[Workload], Workload]) -> Predicted:
    """Predictions for single tokens as predictions for passes of several: what most of a pass's tokens foresee first.

    As wide as all that any token foresees; :meth:`Predicted.first` cuts it. Better than to foresee from the union of
    the tokens' experts, which has lost who used what together.

    Args:
        predicted: for every pass of ``single``.
        single: a workload of one token per pass.
        unite: makes the workload of several, as ``lambda work: batched(work, size=8)``.
    """
    votes = unite(replace(single, ids=predicted.ids, tokens=(predicted.ids >= 0).astype(np.uint16), weights=None))
    order = np.argsort(-votes.tokens.astype(np.int64), axis=-1, kind="stable")  # ids ascend already
    return replace(predicted, ids=np.take_along_axis(votes.ids, order, axis=-1))
