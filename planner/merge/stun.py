"""STUN's first stage: experts whose router rows are near, and which are used together, form a cluster.

Source: STUN (ACL 2025) and its published code. The second stage (Wanda or OWL on what is left) needs the input norms
``wanda_input`` and ``wanda_down`` of :mod:`planner.importance`.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

import store
from moescope.errors import PlanError
from planner.importance.statistics import EXPERT, Statistics, layers_of
from planner.merge.groups import clustered, equal_weights, merge_step, pair_matrices
from planner.merge.linkage import labels_after, merge_sequence
from planner.task import Draft, Task


def draft(task: Task, *, coactivation_weight: float = 1.0) -> Draft:
    """Every layer keeps one expert per cluster: the one whose weights are nearest to the cluster's mean.

    Args:
        task: what to plan.
        coactivation_weight: see :func:`router_distance`.

    Raises:
        PlanError: statistics that the run lacks, or a share that cannot be met.
    """
    rows = dict(Statistics(task.run, level="activations").matrices("router_row", "weights"))
    together, notes = pair_matrices(task, "expert_pair", "selections", level="activations")

    def cluster(key: tuple[int, int], experts: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        coactivation = together[key][np.ix_(experts, experts)]
        distance = router_distance(rows[key][experts], coactivation, coactivation_weight=coactivation_weight)
        return agglomerate(distance, count)

    step = merge_step(task, "stun", "nearest", clustered(task, cluster), equal_weights(task))
    return Draft(steps=(step,), score="none", unit="", values={}, notes=notes)


def stun(
    run: store.Run,
    *,
    clusters: int,
    coactivation_weight: float = 1.0,
    domain: str | None = None,
    phase: Literal["prompt", "decode"] | None = None,
) -> pl.DataFrame:
    """The clusters of each layer that STUN keeps one expert of.

    Which member represents a cluster is decided by the weights (the one nearest to their mean), when a plan is applied.

    Args:
        run: a run of level activations (router rows; co-activation is of level routing).
        clusters: clusters per layer, 1 to the number of experts.
        coactivation_weight: see :func:`router_distance`.
        domain: co-activation from this domain only, where vectors were kept per domain.
        phase: co-activation from prompt or generated tokens only.

    Returns:
        Columns layer, step, expert, kind, cluster; a cluster has the number of its lowest expert.

    Raises:
        PlanError: a number of clusters that cannot be, or statistics that the run lacks.
    """
    statistics = Statistics(run, level="activations", domain=domain, phase=phase)
    rows = dict(statistics.matrices("router_row", "weights"))
    together = dict(statistics.matrices("expert_pair", "selections"))
    parts = []
    for key, part in layers_of(statistics.routed):
        experts = part["expert"].to_numpy()
        if not 1 <= clusters <= len(experts):
            raise PlanError(f"clusters {clusters} is outside 1..{len(experts)}, the experts of layer {key[0]}")
        coactivation = together[key][np.ix_(experts, experts)]
        distance = router_distance(rows[key][experts], coactivation, coactivation_weight=coactivation_weight)
        numbers = experts[agglomerate(distance, clusters)]
        parts.append(part.with_columns(cluster=pl.Series(numbers, dtype=pl.Int32)).select(*EXPERT, "cluster"))
    return pl.concat(parts)


def router_distance(
    rows: NDArray[np.float64], coactivation: NDArray[np.float64], *, coactivation_weight: float = 1.0
) -> NDArray[np.float64]:
    """(experts, experts) Euclidean distance of router rows, less the weight times how often both are used together.

    Co-activation counts over its mean over pairs, so that the weight does not depend on the number of tokens. It is of
    all pairs of a token's selection; the published code has the first two choices only, and takes the mean with the
    diagonal. The diagonal of the result is 0 and means nothing.

    Args:
        rows: (experts, hidden) the router's matrix.
        coactivation: (experts, experts) tokens that used both.
        coactivation_weight: 0 = router rows alone.
    """
    squares = (rows**2).sum(1)
    distance: NDArray[np.float64] = np.sqrt(np.maximum(squares[:, None] + squares[None] - 2 * rows @ rows.T, 0.0))
    pairs = ~np.eye(len(rows), dtype=bool)
    mean = coactivation[pairs].mean() if len(rows) > 1 else 0.0
    if mean > 0:
        distance = distance - coactivation_weight * coactivation / mean
    np.fill_diagonal(distance, 0.0)
    return distance


def agglomerate(distance: NDArray[np.float64], clusters: int) -> NDArray[np.int64]:
    """(experts,) lowest member of each expert's cluster, after merging the nearest clusters until so many are left.

    Two clusters are as far apart as their most distant members (complete linkage). The published code merges the
    nearest pair below a threshold, refuses a merge by some of the distances between both clusters, and searches the
    threshold that leaves the wanted number over all layers; here every layer meets its number. Of equal distances the
    pair with the lower numbers merges first.
    """
    return labels_after(merge_sequence(distance), len(distance), len(distance) - clusters)
