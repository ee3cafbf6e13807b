"""Sub-MoE's groups: k-means on what the experts put out for the same tokens.

Source: Sub-MoE (arXiv 2506.23266, AAAI 2026). Its merge without truncation is the plain frequency average, by algebra;
truncated, it is that average projected on the leading directions of the members' own outputs.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from compressor.plan import LayerKey
from moescope.errors import PlanError
from planner.domains import Mix, expert_scores
from planner.merge.groups import clustered, inner_similarity, merge_step, pair_matrices
from planner.task import Array, Draft, Task
from profiler.metrics.similarity import normalised_gram

STARTS = 10
"""Starts of k-means, of which the best counts."""


def draft(
    task: Task, *, seed: int = 0, truncation: float | None = None, rank: int | None = None, mix: Mix = "union"
) -> Draft:
    """Every group becomes the frequency average of its members, truncated where that is asked for.

    Args:
        task: what to plan.
        seed: of k-means++.
        truncation: part of the directions that goes, below 1; None = no truncation.
        rank: directions that stay, instead of ``truncation``.
        mix: how the frequencies of domains come together.

    Raises:
        PlanError: statistics that the run lacks, or a share or rank that cannot be.
    """
    grams, notes = pair_matrices(task, "expert_similarity", "product_sum", level="similarity")
    tokens, _ = expert_scores(task, "frequency", mix, {})
    kept = _rank(task, truncation, rank)
    missing = [name for name in ("moment", "neuron_activation") if task.run.table(name).is_empty()]
    if kept is not None and missing:
        raise PlanError(
            f"run {task.run.name!r} has no table {missing[0]}, which truncation needs: collect it with --level"
            " activations,similarity,moments"
        )

    def cluster(key: LayerKey, experts: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        return kernel_kmeans(grams[key][np.ix_(experts, experts)], count, seed=seed)

    groups = clustered(task, cluster)
    similarity = {key: normalised_gram(gram=gram) for key, gram in grams.items()}
    method = "average" if kept is None else "subspace"
    step = merge_step(task, "sub_moe", method, groups, tokens, rank=kept)  # type: ignore[arg-type]
    return Draft(
        steps=(step,), score="frequency", unit="selections, or share of the layer summed over domains", values=tokens,
        notes=(*notes, inner_similarity(groups, similarity)),
    )  # fmt: skip


def kernel_kmeans(gram: Array, clusters: int, *, seed: int = 0) -> NDArray[np.int64]:
    """(experts,) labels 0.. of exactly so many clusters: k-means on vectors of which scalar products alone are known.

    The squared distance of i to the mean of a cluster C is G_ii - 2 mean_j G_ij + mean_jk G_jk. Begins with k-means++,
    ``STARTS`` times, and takes the least sum of squared distances; a cluster that runs empty takes the expert that is
    farthest from its own. Labels are numbered by their lowest member.

    Args:
        gram: (experts, experts) scalar products.
        clusters: 1 to the number of experts.
        seed: of the starts.
    """
    generator = np.random.default_rng(seed)
    best, least = np.zeros(len(gram), dtype=np.int64), np.inf
    for _ in range(STARTS):
        label = _lloyd(gram, _plus_plus(gram, clusters, generator), clusters)
        spread = float(_distances(gram, label, clusters)[np.arange(len(gram)), label].sum())
        if spread < least * (1 - 1e-12) or not np.isfinite(least):
            best, least = label, spread
    _, first = np.unique(best, return_index=True)
    place = np.argsort(np.argsort(first))
    _, compact = np.unique(best, return_inverse=True)
    return np.asarray(place[compact.reshape(-1)], dtype=np.int64)


def _plus_plus(gram: Array, clusters: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Labels by the nearest of centres drawn one after another, farther experts more likely."""
    diagonal = np.diag(gram)
    chosen = [int(generator.integers(len(gram)))]
    while len(chosen) < clusters:
        squared = (diagonal[:, None] - 2 * gram[:, chosen] + diagonal[chosen]).min(1).clip(min=0)
        squared[chosen] = 0
        if squared.sum() <= 0:  # all that are left are copies of a centre
            squared = np.ones(len(gram))
            squared[chosen] = 0
        chosen.append(int(generator.choice(len(gram), p=squared / squared.sum())))
    label = (diagonal[:, None] - 2 * gram[:, chosen] + diagonal[chosen]).argmin(1)
    label[chosen] = np.arange(clusters)
    return np.asarray(label, dtype=np.int64)


def _lloyd(gram: Array, label: NDArray[np.int64], clusters: int) -> NDArray[np.int64]:
    for _ in range(100):
        distances = _distances(gram, label, clusters)
        after = distances.argmin(1)
        for empty in np.setdiff1d(np.arange(clusters), after).tolist():
            own = distances[np.arange(len(gram)), after].copy()
            own[np.bincount(after, minlength=clusters)[after] < 2] = -np.inf
            after[int(own.argmax())] = empty
        if (after == label).all():
            break
        label = after
    return label


def _distances(gram: Array, label: NDArray[np.int64], clusters: int) -> Array:
    """(experts, clusters) squared distance of each expert to each cluster's mean."""
    member = np.eye(clusters)[label]
    mean = member / np.maximum(member.sum(0), 1)
    crossed = gram @ mean
    inner = (mean * crossed).sum(0)
    distances: Array = np.diag(gram)[:, None] - 2 * crossed + inner
    distances[:, member.sum(0) == 0] = np.inf
    return distances


def _rank(task: Task, truncation: float | None, rank: int | None) -> int | None:
    most = min(task.source.expert_size, *(shape.width for shape in task.layers))
    if rank is not None:
        if not 1 <= rank <= most:
            raise PlanError(f"rank {rank} is outside 1..{most}, the directions that every matrix of the experts has")
        return rank
    if truncation is None:
        return None
    if not 0 < truncation < 1:
        raise PlanError(f"truncation {truncation:g} is outside (0, 1): give the part of the directions that goes")
    return max(1, round(most * (1 - truncation)))
