"""Workloads with one property destroyed, and how much of a hit rate each of them explains.

What survives shuffling inside requests is due to each text's topic, what survives shuffling over all is due to popular
experts, and uniformly random experts show what the size of the cache alone gives: with them a verdict must be "no".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moescope.errors import PlanError
from planner.simulate.workload import Workload
from profiler.metrics._arrays import FloatArray, ratio
from profiler.metrics.controls import uniform_tokens

SHUFFLED_WITHIN = "shuffled_within_requests"
SHUFFLED_OVER_ALL = "shuffled_over_all"
UNIFORM = "uniform_experts"
CONTROLS = (SHUFFLED_WITHIN, SHUFFLED_OVER_ALL, UNIFORM)


def controls(workload: Workload, *, seed: int, first: int = 0) -> dict[str, Workload]:
    """The three controls of a workload by name, of its shape and with as many experts in every step: :func:`control`.

    Args:
        workload: passes in order.
        seed: of the shuffles and draws.
        first: place of its first layer in the model: a layer is drawn alike whether others are there or not.
    """
    return {name: control(workload, name, seed=seed, first=first) for name in CONTROLS}


def control(workload: Workload, name: str, *, seed: int, first: int = 0) -> Workload:
    """One control of a workload.

    ``shuffled_within_requests``: the passes of each request in random order. ``shuffled_over_all``: all passes in
    random order; requests keep their lengths. All layers of a pass stay together, and so do weights and tokens.
    ``uniform_experts``: distinct experts drawn anew for every step; weights and tokens stay where they are.

    Take the controls of single tokens and put batches together afterwards: shuffling whole batches leaves their tokens
    together.

    Args:
        workload: passes in order.
        name: one of :data:`CONTROLS`.
        seed, first: as :func:`controls`.
    """
    if name == SHUFFLED_WITHIN:
        keys = workload.request_of_pass + np.random.default_rng([seed, 0]).random(workload.num_passes)
        return _reordered(workload, np.argsort(keys, kind="stable"))
    if name == SHUFFLED_OVER_ALL:
        return _reordered(workload, np.random.default_rng([seed, 1]).permutation(workload.num_passes))
    drawn = [
        uniform_tokens(ids, workload.num_experts, seed=[seed, 2, layer])
        for layer, ids in enumerate(workload.ids, first)
    ]
    return replace(workload, ids=np.stack(drawn))


def _reordered(workload: Workload, order: NDArray[np.int64]) -> Workload:
    """The passes in another order; requests keep their places."""
    weights = workload.weights
    return replace(
        workload, ids=workload.ids[:, order], tokens=workload.tokens[:, order],
        weights=None if weights is None else weights[:, order], pass_tokens=workload.pass_tokens[order],
    )  # fmt: skip


@dataclass(frozen=True)
class Decomposition:
    """Hit rates in four parts that sum to the one observed; each of the shape of the rates given.

    Attributes:
        random: with uniformly random experts: what the size of the cache gives.
        popularity: on top, because some experts are used more by all text (shuffled over all).
        topic: on top, because a request uses some experts more (shuffled inside requests).
        locality: on top, because neighbouring tokens use the same experts. A part may be negative: then the policy is
            better off without it.
    """

    random: FloatArray
    popularity: FloatArray
    topic: FloatArray
    locality: FloatArray

    @property
    def gain(self) -> FloatArray:
        """Observed hit rate above random."""
        return self.popularity + self.topic + self.locality

    def shares(self) -> dict[str, FloatArray]:
        """Part of the gain by cause; NaN where there is none."""
        parts = {"popularity": self.popularity, "topic": self.topic, "locality": self.locality}
        return {name: ratio(part, self.gain) for name, part in parts.items()}


def decompose(observed: ArrayLike, by_control: Mapping[str, ArrayLike]) -> Decomposition:
    """Why a cache hits: how much of its hit rate is size, popularity, topic and locality.

    Args:
        observed: hit rate of a policy, or one per size.
        by_control: of the same policy and sizes on each of :func:`controls`, by name.

    Raises:
        PlanError: a control is missing.
    """
    missing = [name for name in (SHUFFLED_WITHIN, SHUFFLED_OVER_ALL, UNIFORM) if name not in by_control]
    if missing:
        raise PlanError(f"hit rates of control {', '.join(missing)} are missing: replay all that controls() gives")
    within, over, uniform = (
        np.asarray(by_control[name], np.float64) for name in (SHUFFLED_WITHIN, SHUFFLED_OVER_ALL, UNIFORM)
    )
    return Decomposition(uniform, over - uniform, within - over, np.asarray(observed, np.float64) - within)
