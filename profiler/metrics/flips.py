"""Routing of a compressed model against its base's, expert numbers of the base throughout.

A selection of the base agrees if the compressed model selects, for the same token in the same layer, an expert that is
made of the selected one. Where it does not, the selection has flipped: by force if nothing is left of the expert, and
freely if the expert is still there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from moescope.errors import MetricError

from .divergence import mean_of_items
from .perplexity import Estimate


@dataclass(frozen=True)
class Flips:
    """What became of the base's selections.

    Attributes:
        agreement: share of all selections that agree.
        forced: share of all selections whose expert is gone.
        free: of the selections whose expert is still there, the share that flipped; NaN where none is.
        selections: how many there are.
    """

    agreement: Estimate
    forced: Estimate
    free: Estimate
    selections: int


def flips(*, selections: ArrayLike, agreed: ArrayLike, gone: ArrayLike, **bootstrap: Any) -> Flips:
    """Agreement, forced and free flips of one layer or several, each with its interval over sequences.

    Args:
        selections: (sequences,) selections of the base.
        agreed: (sequences,) how many of them agree.
        gone: (sequences,) how many are of an expert that is gone.
        bootstrap: num_resamples, confidence and seed of the intervals.

    Raises:
        MetricError: no selection, more agreeing or gone than there are, or shapes that differ.
    """
    count, same, lost = (np.asarray(values, np.float64) for values in (selections, agreed, gone))
    if not count.shape == same.shape == lost.shape or count.ndim != 1:
        raise MetricError(f"selections {count.shape}, agreed {same.shape} and gone {lost.shape}: one per sequence")
    if (same < 0).any() or (lost < 0).any() or (same + lost > count).any():
        raise MetricError("agreed and gone are counts that together do not exceed the selections")
    nothing = Estimate(float("nan"), float("nan"), float("nan"))
    there = count - lost
    return Flips(
        agreement=mean_of_items(sums=same, items=count, **bootstrap),
        forced=mean_of_items(sums=lost, items=count, **bootstrap),
        free=mean_of_items(sums=there - same, items=there, **bootstrap) if there.any() else nothing,
        selections=int(count.sum()),
    )
