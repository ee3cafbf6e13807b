"""HC-SMoE's groups: hierarchical clustering of the experts' mean outputs, average linkage.

Source: "Retraining-free merging of sparse MoE via hierarchical clustering" (arXiv 2410.08589).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from compressor.plan import LayerKey
from planner.domains import Mix, expert_scores
from planner.merge.groups import clustered, inner_similarity, merge_step, pair_matrices, sampled_tokens
from planner.merge.linkage import labels_after, merge_sequence
from planner.task import Array, Draft, Task
from profiler.metrics.similarity import cosine_matrix


def draft(task: Task, *, mix: Mix = "union") -> Draft:
    """Every group becomes the frequency average of its members, neuron by neuron.

    Args:
        task: what to plan.
        mix: how the frequencies of domains come together.

    Raises:
        PlanError: statistics that the run lacks, or a share that cannot be met.
    """
    sums, notes = pair_matrices(task, "expert_similarity", "output_sum", level="similarity")
    count = sampled_tokens(task, "expert_similarity")
    tokens, _ = expert_scores(task, "frequency", mix, {})
    means = {key: values / max(count[key], 1) for key, values in sums.items()}

    def cluster(key: LayerKey, experts: NDArray[np.int64], clusters: int) -> NDArray[np.int64]:
        merges = merge_sequence(_euclidean(means[key][experts]), linkage="average")
        return labels_after(merges, len(experts), len(experts) - clusters)

    groups = clustered(task, cluster)
    similarity = {key: cosine_matrix(rows=values) for key, values in means.items()}
    return Draft(
        steps=(merge_step(task, "hc_smoe", "average", groups, tokens),),
        score="frequency",
        unit="selections, or share of the layer summed over domains",
        values=tokens,
        notes=(*notes, inner_similarity(groups, similarity)),
    )


def _euclidean(rows: Array) -> Array:
    """(experts, experts) distance of rows."""
    return np.asarray(np.linalg.norm(rows[:, None] - rows[None], axis=2), dtype=np.float64)
