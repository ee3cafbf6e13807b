"""ComPEFT's residuals, for experts: each member of a group is the group's centre and a sparse ternary difference.

Source: ComPEFT (arXiv 2311.13171) and its published code, which compress what fine-tuning added to a model: the largest
entries, all with one magnitude. Here what is compressed is how an expert differs from experts that put out nearly the
same, so that they can share a centre. No expert goes, and routing stays as it is.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from compressor.plan import FactorGroup, FactorLayer, FactorStep, LayerKey
from moescope.errors import PlanError
from planner.domains import Mix, expert_scores
from planner.factor.stored import saved_note
from planner.merge.copies import output_similarity
from planner.merge.groups import clustered, inner_similarity, merge_step, pair_matrices
from planner.merge.linkage import labels_after, merge_sequence
from planner.source import value_bytes
from planner.task import Draft, Task


def draft(task: Task, *, density: float = 0.2, scale: float | None = 1.0, mix: Mix = "union") -> Draft:
    """Groups of experts that put out alike, by complete linkage; the share is how many have no centre of their own.

    A share of 0.75 of 64 experts leaves 16 centres. ComPEFT searches densities of 0.05 to 0.5 and scales of 0.5 to 10
    on validation text (ranges unverified); residuals between experts may want others.

    Args:
        task: what to plan.
        density: part of each matrix's entries that differ from the centre, 0..1.
        scale: magnitude of the difference as a multiple of its standard deviation; None = :func:`least_squares_scale`.
        mix: how the frequencies of domains, by which members count in the centre, come together.

    Raises:
        PlanError: statistics that the run lacks, or a share, density or scale that cannot be met.
    """
    if not 0 <= density <= 1:
        raise PlanError(f"density {density:g} is outside [0, 1]: give the part of the entries that differs (0.2)")
    scale = least_squares_scale(density) if scale is None else scale
    if not scale > 0:
        raise PlanError(f"scale {scale:g} is not above 0: give a multiple of the standard deviation, such as 1")
    # No expert goes, so neither k nor the router's groups bind: as where the router stays (form shared).
    free = replace(task, form="shared")
    grams, notes = pair_matrices(free, "expert_similarity", "product_sum", level="similarity")
    tokens, _ = expert_scores(free, "frequency", mix, {})
    similarity = {
        shape.key: output_similarity(grams[shape.key])[: shape.num_experts, : shape.num_experts]
        for shape in free.layers
    }

    def cluster(key: LayerKey, experts: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        merges = merge_sequence(1 - similarity[key][np.ix_(experts, experts)])
        return labels_after(merges, len(experts), len(experts) - count)

    groups = clustered(free, cluster)
    layers = tuple(
        FactorLayer(
            layer=layer.layer,
            step=layer.step,
            groups=tuple(
                FactorGroup(lead=group.lead, members=group.members, weights=group.weights) for group in layer.groups
            ),
        )
        for layer in merge_step(free, "compeft", "aligned", groups, tokens).layers
    )
    step = FactorStep(grouping="compeft", method="ternary_residual", density=density, scale=scale, layers=layers)
    saved = saved_note(task.source, step, value_bytes=value_bytes(task.run))
    return Draft(
        steps=(step,), score="frequency", unit="selections, or share of the layer summed over domains", values=tokens,
        notes=(*notes, inner_similarity(groups, similarity), saved),
    )  # fmt: skip


def least_squares_scale(density: float) -> float:
    """The scale with the least squared error where the entries of a difference are normally distributed.

    That is the mean magnitude, in standard deviations, of the part ``density`` of the entries that are largest: 2
    phi(t) / density, t the least magnitude among them. 1.75 for 0.2, 0.8 for all entries.
    """
    if not density:
        return 1.0
    least = ndtri(1 - density / 2)
    return float(f"{2 * np.exp(-(least**2) / 2) / np.sqrt(2 * np.pi) / density:.6g}")
