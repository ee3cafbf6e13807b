"""Hierarchical clustering in which every count can be met: the nearest two clusters merge, one pair at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Linkage = Literal["complete", "average"]
"""How far apart two clusters are: as their most distant members, or as their members on average."""


@dataclass(frozen=True)
class Merge:
    """Two clusters, named by their lowest members, that become one.

    Attributes:
        first: the lower name, which the merged cluster keeps.
        second: the other.
        distance: how far apart they were.
    """

    first: int
    second: int
    distance: float


def merge_sequence(distance: NDArray[np.float64], *, linkage: Linkage = "complete") -> list[Merge]:
    """All merges, from as many clusters as experts down to one. Of equal distances the lower numbers merge first.

    Args:
        distance: (experts, experts), symmetric; its diagonal is not read.
        linkage: how far apart clusters are.
    """
    size = len(distance)
    apart = np.array(distance, dtype=np.float64)
    np.fill_diagonal(apart, np.inf)
    members = np.ones(size)
    merges = []
    for _ in range(size - 1):
        first, second = sorted(divmod(int(apart.argmin()), size))
        merges.append(Merge(first, second, float(apart[first, second])))
        if linkage == "complete":
            joined = np.maximum(apart[first], apart[second])
        else:
            weight = members[[first, second]] / members[[first, second]].sum()
            joined = weight[0] * apart[first] + weight[1] * apart[second]
        apart[first], apart[:, first] = joined, joined
        apart[second], apart[:, second] = np.inf, np.inf
        apart[first, first] = np.inf
        members[first] += members[second]
    return merges


def labels_after(merges: list[Merge], size: int, count: int) -> NDArray[np.int64]:
    """(experts,) lowest member of each expert's cluster after the first ``count`` merges."""
    label = np.arange(size)
    for merge in merges[:count]:
        label[label == merge.second] = merge.first
    return label
