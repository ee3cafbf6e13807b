"""Experts rebuilt from few numbers: a thin product and some rows, or a shared centre and a sparse residual.

Sources: MC-SMoE (arXiv 2310.01334, ICLR 2024) for ``low_rank_sparse``, ComPEFT (arXiv 2311.13171) for
``ternary_residual``. Both are one shot on the weights here. MC-SMoE trains its sparse part, scored by gradients
(PLATON), and distils the whole; ComPEFT compresses what fine-tuning changed, here it is what a member differs by from
its group's centre.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from compressor.edits.aligned import matching
from compressor.edits.average import average
from compressor.plan import PARTS, FactorGroup, FactorLayer, FactorStep
from compressor.weights import ExpertWeights

Read = Callable[[int], ExpertWeights]


@dataclass(eq=False)
class Factoring:
    """The factored experts of one layer.

    Attributes:
        step: the step that factors.
        layer: its groups here.
    """

    step: FactorStep
    layer: FactorLayer
    _orders: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _centre: tuple[int, ExpertWeights] | None = field(default=None, repr=False)

    def touches(self, expert: int) -> bool:
        """Whether the weights of an expert become others; a residual needs a second member in its group."""
        group = self._group(expert)
        return group is not None and (self.step.method == "low_rank_sparse" or len(group.members) > 1)

    def expert(self, expert: int, read: Read) -> ExpertWeights:
        """An expert rebuilt from its factors, in its own types; biases are exact.

        A member of a group has its neurons in the order of the lead's, which changes nothing of what it computes.

        Args:
            expert: its number.
            read: weights of one expert as they are before this step.
        """
        own, group = read(expert), self._group(expert)
        if group is None or not self.touches(expert):
            return own
        if self.step.method == "low_rank_sparse":
            assert self.step.rank is not None
            return _rebuilt(own, lambda part, weight: low_rank_sparse(weight, self.step.rank or 1, self.step.density))
        scale = self.step.scale or 1.0
        centre = dict(self._centre_of(group, read).parts())
        member = self._ordered(group, expert, own, read)
        return _rebuilt(
            member,
            lambda part, weight: centre[part] + ternary(weight - centre[part], density=self.step.density, scale=scale),
        )

    def _group(self, expert: int) -> FactorGroup | None:
        return next((group for group in self.layer.groups if expert in group.members), None)

    def _centre_of(self, group: FactorGroup, read: Read) -> ExpertWeights:
        """The weighted mean of the members; that of one group is kept at a time."""
        if self._centre is None or self._centre[0] != group.lead:

            def members() -> Iterator[tuple[ExpertWeights, float]]:
                for member, part in zip(group.members, group.weights, strict=True):
                    yield self._ordered(group, member, read(member), read).exact(), part

            self._centre = group.lead, average(members())
        return self._centre[1]

    def _ordered(self, group: FactorGroup, expert: int, own: ExpertWeights, read: Read) -> ExpertWeights:
        """A member with its neurons in the order of the lead's; the order is found once."""
        if expert == group.lead:
            return own
        if expert not in self._orders:
            self._orders[expert] = matching(read(group.lead).exact(), own.exact())
        return own.neurons(self._orders[expert])


def low_rank_sparse(weight: Tensor, rank: int, density: float) -> Tensor:
    """(R, C) ``U V + S``: the best product of that rank, and the rows that it misses most, exact.

    ``S`` is what is left of those rows, so that they come out as they were: round(density x R) rows, by the norm of
    what is left, of equal ones the first. MC-SMoE prunes its S by rows as well, and finds them by training.

    Args:
        weight: (R, C), rows are outputs.
        rank: columns of U, 1 to min(R, C).
        density: part of the rows that stay.
    """
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    product = (left[:, :rank] * values[:rank]) @ right[:rank]
    kept = largest((weight - product).norm(dim=1), round(density * len(weight)))
    return torch.where(kept[:, None], weight, product)


def ternary(residual: Tensor, *, density: float, scale: float) -> Tensor:
    """``scale x std x sign`` on the entries of largest magnitude, 0 elsewhere (ComPEFT).

    The standard deviation is that of all entries, before any is left out. ComPEFT takes both, the deviation and the
    largest entries, over the whole model; here each matrix has its own.

    Args:
        residual: of any shape.
        density: part of the entries that stay.
        scale: alpha.
    """
    kept = largest(residual.abs().flatten(), round(density * residual.numel())).reshape(residual.shape)
    return torch.where(kept, residual.sign() * (scale * residual.std(correction=0)), torch.zeros_like(residual))


def largest(values: Tensor, count: int) -> Tensor:
    """(n,) bool, true for so many of the largest values; of equal ones the first."""
    if count <= 0:
        return torch.zeros_like(values, dtype=torch.bool)
    least = torch.kthvalue(values, len(values) - count + 1).values
    above, equal = values > least, values == least
    return above | (equal & (equal.cumsum(0) <= count - above.sum()))


def _rebuilt(weights: ExpertWeights, change: Callable[[str, Tensor], Tensor]) -> ExpertWeights:
    """The same expert with other matrices, computed exactly and rounded once."""
    exact, own = dict(weights.exact().parts()), dict(weights.parts())
    return replace(weights, **{part: change(part, exact[part]).to(own[part].dtype) for part in PARTS if part in own})
