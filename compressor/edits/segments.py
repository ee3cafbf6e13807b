"""Method ``segments``: the neurons of experts that go move to the kept experts that have the most similar ones.

Source: DERN (EMNLP Findings 2025), of which no code is known; this follows its description and is "DERN-style". A
segment is one neuron: gate row, up row and down column. Choices that the description leaves open, or that we made:

- Similarity is the cosine over up row and down column (and up bias); the gate row is left out, as the paper finds
  slightly better. Of equal cosines the lower expert gets the segment.
- Clustering is by the cosine over all of the segment. A centre's direction is that of the weighted sum of its segments'
  unit vectors, and its length their weighted mean length ("norms equalised").
- A cluster stands in the place of its nearest own neuron, so that what is said of neuron n of the kept expert holds
  afterwards as far as can be. A neuron of zeros takes part in nothing.
- The first centres are the segments with the largest gate weight, as described, but never a segment and its near copy:
  else a neuron stands twice, and two others are made one for it. A copy that comes in counts for the neuron it copies.
- Router rows do not change. Down biases belong to no neuron: the kept expert's stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.weights import ExpertWeights

THRESHOLD = 0.6
"""Least cosine at which a segment moves: best in the paper; lower mixes too much, higher moves too little."""

_COPY = 0.95
"""Cosine from which two segments are one and the same for the choice of the first centres."""

_ITERATIONS = 20
_BLOCK = 2**27
"""Numbers that one block may hold: 512 MiB in float32."""

Read = Callable[[int], ExpertWeights]


@dataclass(frozen=True)
class Moved:
    """Segments that one expert gives to another.

    Attributes:
        source: the expert that goes.
        target: the kept expert.
        neurons: (n,) numbers in the source.
    """

    source: int
    target: int
    neurons: Tensor


def assign(kept: Sequence[int], given_up: Sequence[int], read: Read, *, threshold: float = THRESHOLD) -> list[Moved]:
    """Which segments move where.

    Args:
        kept: experts that may receive, ascending.
        given_up: experts that go.
        read: weights of an expert; kept ones are read once for every block of given-up ones.
        threshold: least cosine; segments below it are lost.
    """
    moved: list[Moved] = []
    if not kept:
        return moved
    for experts, segments in _blocks(given_up, read):
        best, target = segments.new_full((len(segments),), -2.0), torch.zeros(len(segments), dtype=torch.long)
        target = target.to(segments.device)
        for expert in kept:
            cosine = _largest_cosine(segments, _compared(read(expert)))
            better = cosine > best
            best = torch.where(better, cosine, best)
            target = torch.where(better, expert, target)
        width = len(segments) // len(experts)
        for place, source in enumerate(experts):
            part = slice(place * width, (place + 1) * width)
            moves = best[part] >= threshold
            for receiver in sorted(set(target[part][moves].tolist())):
                neurons = (moves & (target[part] == receiver)).nonzero()[:, 0]
                moved.append(Moved(source, int(receiver), neurons))
    return moved


def rebuild(own: ExpertWeights, weight: float, received: Sequence[tuple[ExpertWeights, float]]) -> ExpertWeights:
    """A kept expert made of its own segments and those that it received, by weighted spherical k-means.

    Args:
        own: the kept expert.
        weight: importance of its segments.
        received: (segments, importance of the expert they come from); as experts of a few neurons.

    Returns:
        As wide as ``own``, in the type that arithmetic is done in.
    """
    pool = [(own.exact(), weight), *((part.exact(), importance) for part, importance in received)]
    vectors = torch.cat([_whole(part) for part, _ in pool])
    weights = torch.cat([vectors.new_full((part.width,), importance) for part, importance in pool])
    gates = torch.cat([(part.up if part.gate is None else part.gate).abs().amax(1) for part, _ in pool])
    if not weights.any():
        weights = torch.ones_like(weights)
    norms = vectors.norm(dim=1)
    numbers = (norms > 0).nonzero()[:, 0]  # a neuron of zeros does nothing, and has no direction
    vectors, norms, weights = vectors[numbers], norms[numbers], weights[numbers]
    units = vectors / norms[:, None]
    centres = _initial(units, gates[numbers], int((numbers < own.width).sum()), own.width)
    labels = _cluster(units, weights, centres)
    rows = _centroids(units, norms, weights, labels, len(centres))
    return _split(_in_place(rows, units, labels, numbers, own.width), own)


def _compared(weights: ExpertWeights) -> Tensor:
    """(I, 2 H) unit vectors of what similarity is taken over, in float32."""
    parts = [weights.up.float(), weights.down.T.float()]
    if weights.up_bias is not None:
        parts.append(weights.up_bias.float()[:, None])
    return torch.nn.functional.normalize(torch.cat(parts, dim=1), dim=1)


def _blocks(experts: Sequence[int], read: Read) -> Iterator[tuple[list[int], Tensor]]:
    """The segments of several experts at a time, as many as memory may hold."""
    waiting: list[int] = []
    held: list[Tensor] = []
    for expert in experts:
        segments = _compared(read(expert))
        if held and (len(held) + 1) * segments.numel() > _BLOCK:
            yield waiting, torch.cat(held)
            waiting, held = [], []
        waiting.append(expert)
        held.append(segments)
    if held:
        yield waiting, torch.cat(held)


def _largest_cosine(segments: Tensor, others: Tensor) -> Tensor:
    """(n,) the largest cosine of each segment to any of the others."""
    rows = max(1, _BLOCK // max(1, len(others)))
    return torch.cat([(part @ others.T).amax(1) for part in segments.split(rows)])


def _whole(weights: ExpertWeights) -> Tensor:
    """(I, 3 H and biases) the segments of an expert."""
    columns = [weights.up, weights.down.T]
    if weights.gate is not None:
        columns.append(weights.gate)
    columns += [bias[:, None] for bias in (weights.up_bias, weights.gate_bias) if bias is not None]
    return torch.cat(columns, dim=1)


def _split(vectors: Tensor, like: ExpertWeights) -> ExpertWeights:
    """The expert whose segments are ``vectors``; its down bias is that of ``like``."""
    hidden = like.up.shape[1]
    up, down, rest = vectors[:, :hidden], vectors[:, hidden : 2 * hidden], vectors[:, 2 * hidden :]
    gate = None
    if like.gate is not None:
        gate, rest = rest[:, :hidden], rest[:, hidden:]
    biases = iter(rest.unbind(1))
    return ExpertWeights(
        up=up.contiguous(),
        down=down.T.contiguous(),
        gate=None if gate is None else gate.contiguous(),
        up_bias=None if like.up_bias is None else next(biases),
        gate_bias=None if like.gate_bias is None else next(biases),
        down_bias=like.exact().down_bias,
    )


def _initial(units: Tensor, gates: Tensor, own: int, count: int) -> Tensor:
    """The segments to begin with, ascending: those with the largest gate weight in absolute value, without copies.

    Args:
        units: (n, ...) unit vectors, the own ones first.
        gates: (n,) largest gate weight of each.
        own: how many are own ones; those are never taken for copies of each other.
        count: centres wanted.
    """
    free = torch.ones(len(units), dtype=torch.bool, device=units.device)
    if own and own < len(units):
        cosine, nearest = _closest(units[own:], units[:own])
        copied = cosine >= _COPY
        gates = gates.scatter_reduce(0, nearest[copied], gates[own:][copied], "amax")
        free[own:] = ~copied & ~_copies(units[own:], gates[own:])
    candidates = free.nonzero()[:, 0]
    order = gates[candidates].argsort(descending=True, stable=True)[:count]
    return candidates[order].sort().values


def _copies(units: Tensor, gates: Tensor) -> Tensor:
    """(n,) whether a segment nearly agrees with one of larger gate weight."""
    order = gates.argsort(descending=True, stable=True)
    ranked = units[order]
    found = torch.zeros(len(units), dtype=torch.bool, device=units.device)
    rows = max(1, _BLOCK // max(1, len(units)))
    for start in range(0, len(units), rows):
        cosine = ranked[start : start + rows] @ ranked.T
        found[order[start : start + rows]] = (cosine.tril(start - 1) >= _COPY).any(1)
    return found


def _cluster(units: Tensor, weights: Tensor, centres: Tensor) -> Tensor:
    """(n,) cluster of each unit vector, by weighted spherical k-means.

    A cluster that loses all its segments, as one of two equal centres does, takes the one that fits worst where it is:
    else a neuron would stand twice and another be lost.
    """
    middle = units[centres]
    labels = units.new_full((len(units),), -1).long()
    for _ in range(_ITERATIONS):
        cosine, found = _closest(units, middle)
        _fill_empty(cosine, found, len(middle))
        if torch.equal(found, labels):
            break
        labels = found
        sums = _sums(units * weights[:, None], labels, len(middle))
        # Where nothing that counts is left, or it cancels out, the centre stays.
        middle = torch.where(sums.norm(dim=1, keepdim=True) > 1e-12, torch.nn.functional.normalize(sums, dim=1), middle)
    return labels


def _closest(units: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    rows = max(1, _BLOCK // max(1, len(centres)))
    found = [(part @ centres.T).max(1) for part in units.split(rows)]
    return torch.cat([best.values for best in found]), torch.cat([best.indices for best in found])


def _fill_empty(cosine: Tensor, labels: Tensor, count: int) -> None:
    """In place: a segment for every empty cluster, as long as there are any that are not at their centre."""
    sizes = torch.bincount(labels, minlength=count)
    for cluster in (sizes == 0).nonzero()[:, 0].tolist():
        movable = torch.where(sizes[labels] > 1, cosine, 2.0)
        worst = int(movable.argmin())
        if movable[worst] > 1 - 1e-6:
            return
        sizes[labels[worst]] -= 1
        sizes[cluster] += 1
        labels[worst], cosine[worst] = cluster, 1.0


def _centroids(units: Tensor, norms: Tensor, weights: Tensor, labels: Tensor, count: int) -> Tensor:
    """(count, ...) direction of the weighted sum of unit vectors, times the weighted mean length; zeros if empty."""
    # A cluster whose segments all come from experts without importance still has to be something.
    weights = torch.where(_sums(weights, labels, count)[labels] > 0, weights, 1.0)
    lengths = _sums(norms * weights, labels, count) / _sums(weights, labels, count).clamp_min(1e-30)
    return torch.nn.functional.normalize(_sums(units * weights[:, None], labels, count), dim=1) * lengths[:, None]


def _sums(values: Tensor, labels: Tensor, count: int) -> Tensor:
    """(count, ...) sum over each cluster."""
    return values.new_zeros(count, *values.shape[1:]).index_add_(0, labels, values)


def _in_place(rows: Tensor, units: Tensor, labels: Tensor, numbers: Tensor, width: int) -> Tensor:
    """(width, ...) every cluster in the place of the own neuron in it that is nearest to it; those without, where left.

    Args:
        rows: (clusters, ...) centroids.
        units: (n, ...) segments.
        labels: (n,) cluster of each.
        numbers: (n,) number of each; those below ``width`` are own neurons in their places.
    """
    cosine = (units * torch.nn.functional.normalize(rows, dim=1)[labels]).sum(1)
    place = torch.full((len(rows),), -1, dtype=torch.long, device=rows.device)
    own = (numbers < width).nonzero()[:, 0]
    for segment in own[cosine[own].argsort(stable=True)].tolist():  # the nearest comes last, and stays
        place[labels[segment]] = numbers[segment]
    free = torch.ones(width, dtype=torch.bool, device=rows.device)
    free[place[place >= 0]] = False
    place[place < 0] = free.nonzero()[:, 0][: int((place < 0).sum())]
    result = rows.new_zeros(width, rows.shape[1])
    result[place] = rows
    return result
