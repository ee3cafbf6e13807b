"""Rules: from what a router chose to what the experts are called with. The same rules are tried on a running model,
measured by a sweep, and put before the experts of a model that ``compressor.load`` loads.

A rule is called with the router's choice and with the layer's :class:`~compressor.routing.gates.Gate`, which knows how
the layer makes experts and weights of logits. Rules that only drop never ask it, and work in every layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from compressor.plan.routing import RouteWeights
from compressor.routing.choice import Choice
from compressor.routing.gates import Gate


class Rule(Protocol):
    """What makes another choice of a router's."""

    def asks(self, k: int) -> bool:
        """Whether it needs the layer's gate where the router chose ``k`` experts; else it only drops."""

    def __call__(self, choice: Choice, gate: Gate) -> Choice:
        """The experts that are to run; with more slots than before, all tokens get as many, unused ones weight 0."""


@dataclass(frozen=True)
class Ratio:
    """Of those chosen, those with at least so large a part of the largest gate weight.

    Attributes:
        beta: that part, 0..1.
        weights: what becomes of the gate weights of those that stay.
    """

    beta: float
    weights: RouteWeights = "renormalized"

    def asks(self, k: int) -> bool:
        """It only drops."""
        return False

    def __call__(self, choice: Choice, gate: Gate) -> Choice:
        """The choice without experts of small weight; the largest always stays."""
        own = choice.weights.float()
        return dropped(choice, own >= self.beta * own.amax(1, keepdim=True), self.weights)


@dataclass(frozen=True)
class Odp:
    """The skipping rule of MC-MoE's online dynamic pruning: an expert goes whose gate weight is less than the layer's
    median ratio of the second weight to the first, times the first. Published for two experts per token, with a few
    protected tokens, which are not known here.

    Attributes:
        median: of the layer, on calibration text, 0..1.
        weights: what becomes of the gate weights of those that stay.
    """

    median: float
    weights: RouteWeights = "renormalized"

    def asks(self, k: int) -> bool:
        """It only drops."""
        return False

    def __call__(self, choice: Choice, gate: Gate) -> Choice:
        """The choice without experts below the median."""
        return Ratio(self.median, self.weights)(choice, gate)


@dataclass(frozen=True)
class Threshold:
    """Of those chosen, those with at least so large a gate weight; a token may be left without any.

    Attributes:
        tau: least gate weight, as the layer uses it.
        weights: what becomes of the gate weights of those that stay.
    """

    tau: float
    weights: RouteWeights = "renormalized"

    def asks(self, k: int) -> bool:
        """It only drops."""
        return False

    def __call__(self, choice: Choice, gate: Gate) -> Choice:
        """The choice without experts of small weight."""
        return dropped(choice, choice.weights.float() >= self.tau, self.weights)


@dataclass(frozen=True)
class TopK:
    """So many experts per token.

    Attributes:
        k: experts; fewer than the router's are those with the largest gate weights, more are the gate's.
        weights: what becomes of the gate weights. With more experts, ``kept`` is what the gate gives to ``k`` experts.
    """

    k: int
    weights: RouteWeights = "renormalized"

    def asks(self, k: int) -> bool:
        """Only for more than there are."""
        return self.k > k

    def __call__(self, choice: Choice, gate: Gate) -> Choice:
        """The choice with ``k`` experts."""
        if self.k == choice.k:
            return choice
        return dropped(choice, ranks(choice.weights) < self.k, self.weights)


def dropped(choice: Choice, stays: Tensor, weights: RouteWeights) -> Choice:
    """The choice without some of its experts.

    Args:
        choice: of the router.
        stays: (tokens, k) bool; the others keep their place and get weight 0.
        weights: ``renormalized`` = those that stay have the sum that all had before.
    """
    left = choice.weights.where(stays, 0.0)
    if weights == "renormalized":
        left = left * _scale(choice.weights, left).where(~stays.all(1, keepdim=True), 1.0).to(left.dtype)
    return Choice(choice.ids, left, choice.logits)


def ranks(values: Tensor) -> Tensor:
    """(tokens, k) int64 place of each value in its row, 0 for the largest; of equal ones, the first comes first."""
    order = values.argsort(dim=1, descending=True, stable=True)
    return order.argsort(dim=1)


def _scale(before: Tensor, after: Tensor) -> Tensor:
    """(tokens, 1) float32 by what the second weights are multiplied to have the sum of the first; 1 where all are 0."""
    total, left = (values.float().sum(1, keepdim=True) for values in (before, after))
    return (total / left.where(left != 0, 1.0)).where(left != 0, 1.0)
