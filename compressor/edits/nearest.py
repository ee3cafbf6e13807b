"""Method ``nearest``: the member that is nearest to the group's mean stands for all.

Source: STUN (arXiv 2409.06211), its representative of a cluster: no weight is changed, so the kept expert and its
router row still belong together. We weight the mean as the plan says; STUN's weights are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from compressor.edits.average import average
from compressor.weights import ExpertWeights


def nearest(lead: int, members: Sequence[int], parts: Sequence[float], read: Callable[[int], ExpertWeights]) -> int:
    """The member whose flattened weights have the least Euclidean distance to the weighted mean.

    Args:
        lead: taken where no other is nearer beyond rounding, as with two members of equal parts.
        members: expert numbers, ascending.
        parts: of the mean.
        read: weights of an expert; called twice for each, one expert at a time.
    """
    mean = average((read(member), part) for member, part in zip(members, parts, strict=True))
    distances = {member: _distance(read(member), mean) for member in members}
    least = min(distances.values())
    return next(member for member in (lead, *members) if distances[member] <= least * (1 + 1e-6))


def _distance(weights: ExpertWeights, mean: ExpertWeights) -> float:
    centre = dict(mean.parts())
    return sum(float((tensor - centre[name]).square().sum()) for name, tensor in weights.exact().parts())
