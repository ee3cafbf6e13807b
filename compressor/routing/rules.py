"""Rules: from what a router chose to what the experts are called with. The same rules are tried on a running model,
measured by a sweep, and put before the experts of a model that ``compressor.load`` loads.

A rule is called with the router's choice and with the layer's :class:`~compressor.routing.gates.Gate`, which knows how
the layer makes experts and weights of logits. Rules that only drop never ask it, and work in every layer.

What becomes of the gate weights is said with each rule. ``kept``: every expert has the weight that the router gave it,
and one that the router had not chosen has what its score is worth on the same scale; the sum changes with the number.
``renormalized``: the same, scaled to the sum that the router's own choice had.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from compressor.plan.routing import RouteWeights
from compressor.routing.choice import Choice, compared
from compressor.routing.gates import Gate
from moescope.errors import ModelError

Need = Literal["choice", "scores", "gate"]
"""What a rule reads: the router's choice alone; its logits too; or the layer's gate, which makes another choice."""


class Rule(Protocol):
    """What makes another choice of a router's."""

    def needs(self, k: int) -> Need:
        """What it reads where the router chose ``k`` experts."""

    def __call__(self, choice: Choice, gate: Gate) -> Choice:
        """The experts that are to run; with more slots than before, all tokens get as many, unused ones weight 0."""


@dataclass(frozen=True)
class Ratio:
    """Of those chosen, those with at least so large a part of the largest gate weight.

    Attributes:
        beta: that part, 0..1.
        weights: what becomes of the gate weights.
    """

    beta: float
    weights: RouteWeights = "renormalized"

    def needs(self, k: int) -> Need:
        """It only drops."""
        return "choice"

    def __call__(self, choice: Choice, gate: Gate) -> Choice:
        """The choice without experts of small weight; the largest always stays."""
        own = choice.weights.float()
        return dropped(choice, own >= self.beta * own.amax(1, keepdim=True), self.weights)


@dataclass(frozen=True)
class Odp:
    """Online dynamic pruning of MC-MoE (arXiv 2410.06270): an expert goes whose gate weight is less than the layer's
    median ratio of the second weight to the first, times the first. Published for two experts per token, and with a few
    protected tokens, which are not protected here.

    Attributes:
        median: of the layer, on calibration text, 0..1.
        weights: what becomes of the gate weights.
    """

    median: float
    weights: RouteWeights = "renormalized"

    def needs(self, k: int) -> Need:
        """It only drops."""
        return "choice"

    def __call__(self, choice: Choice, gate: Gate) -> Choice:
        """The choice without experts below the median."""
        return Ratio(self.median, self.weights)(choice, gate)


@dataclass(frozen=True)
class Threshold:
    """Of those chosen, those with at least so large a gate weight; a token may be left without any.

    Attributes:
        tau: least gate weight, as the layer uses it.
        weights: what becomes of the gate weights.
    """

    tau: float
    weights: RouteWeights = "renormalized"

    def needs(self, k: int) -> Need:
        """It only drops."""
        return "choice"

    def __call__(self, choice: Choice, gate: Gate) -> Choice:
        """The choice without experts of small weight."""
        return dropped(choice, choice.weights.float() >= self.tau, self.weights)


@dataclass(frozen=True)
class NullExperts:
    """Of those chosen, those whose logit is above a constant: what they would be if as many experts without output, all
    with that logit, could be chosen too (AdaMoE, arXiv 2406.13233). A token may be left without any.

    Attributes:
        b: the logit; where a router shows probabilities, their logarithm.
        weights: what becomes of the gate weights.
    """

    b: float
    weights: RouteWeights = "renormalized"

    def needs(self, k: int) -> Need:
        """It only drops, by the logits."""
        return "scores"

    def __call__(self, choice: Choice, gate: Gate) -> Choice:
        """The choice without experts of small logits."""
        assert choice.logits is not None
        return dropped(choice, choice.logits.gather(1, choice.ids).float() > self.b, self.weights)


@dataclass(frozen=True)
class TopK:
    """So many experts per token.

    A family whose gate divides by the sum (:attr:`Gate.renormalized`) with another k of its configuration does what
    ``renormalized`` does; one whose gate does not, what ``kept`` does.

    Attributes:
        k: experts; fewer than the router's are those with the largest gate weights, more are the gate's.
        weights: what becomes of the gate weights.
    """

    k: int
    weights: RouteWeights = "renormalized"

    def needs(self, k: int) -> Need:
        """The gate only for more than there are."""
        return "gate" if self.k > k else "choice"

    def __call__(self, choice: Choice, gate: Gate) -> Choice:
        """The choice with ``k`` experts."""
        if self.k == choice.k:
            return choice
        if self.k < choice.k:
            return dropped(choice, ranks(choice.weights.float()) < self.k, self.weights)
        assert choice.logits is not None
        return chosen(choice, gate, gate.select(choice.logits, self.k), None, self.weights)


@dataclass(frozen=True)
class TopP:
    """The fewest experts whose router probability adds up to more than a value (arXiv 2403.07652); at least one, and
    more than the router's k where that is not enough.

    Attributes:
        p: the value, 0..1.
        weights: what becomes of the gate weights.
    """

    p: float
    weights: RouteWeights = "renormalized"

    def needs(self, k: int) -> Need:
        """The gate, for its probabilities and for experts beyond the router's."""
        return "gate"

    def __call__(self, choice: Choice, gate: Gate) -> Choice:
        """The choice by probability, in the order in which the gate chooses."""
        assert choice.logits is not None
        order, rows = gate.order(choice.logits).sort(dim=1, descending=True)
        mass = gate.probabilities(choice.logits.detach()).gather(1, rows).cumsum(1)
        reachable = (order > -torch.inf).sum(1)
        count = torch.minimum(1 + (mass <= self.p).sum(1), reachable)
        slots = int(count.max()) if len(count) else 1
        inside = torch.arange(slots, device=count.device) < count[:, None]
        return chosen(choice, gate, rows[:, :slots], inside, self.weights)


@dataclass(frozen=True)
class Rank:
    """The expert of one rank alone, such as the weak side of self-contrast (arXiv 2405.14507).

    Attributes:
        r: 1 = the expert that the router chooses first.
        weights: what becomes of its gate weight.
    """

    r: int
    weights: RouteWeights = "renormalized"

    def needs(self, k: int) -> Need:
        """The gate, which ranks all experts."""
        return "gate"

    def __call__(self, choice: Choice, gate: Gate) -> Choice:
        """One expert per token."""
        assert choice.logits is not None
        ids = gate.select(choice.logits, self.r)[:, self.r - 1 :]
        return chosen(choice, gate, ids, None, self.weights)


@dataclass(frozen=True)
class MaskTop:
    """The best experts of each token are out of reach, and the gate chooses as many as ever from the rest: how well
    others stand in for them (arXiv 2401.06066).

    Attributes:
        share: of all experts, those with the largest scores, 0..1; rounded to whole experts.
    """

    share: float

    def needs(self, k: int) -> Need:
        """The gate, which chooses others."""
        return "gate"

    def __call__(self, choice: Choice, gate: Gate) -> Choice:
        """As many experts, of the rest, with the weights that the gate gives them."""
        assert choice.logits is not None
        count = round(self.share * gate.experts)
        if not count:
            return choice
        order = gate.order(choice.logits)
        best = torch.zeros_like(order, dtype=torch.bool).scatter(1, order.topk(count, dim=1).indices, True)
        return gate.choose(choice.logits, choice.k, without=best)


@dataclass(frozen=True, eq=False)
class Bias:
    """A vector is added to the logits before the gate chooses, and its weights move with it (arXiv 2510.14853).

    Gradients flow to the vector through the gate weights, not through the choice.

    Attributes:
        delta: (E,) of any floating type; may require a gradient.
    """

    delta: Tensor = field(repr=False)

    def needs(self, k: int) -> Need:
        """The gate, which chooses again."""
        return "gate"

    def __call__(self, choice: Choice, gate: Gate) -> Choice:
        """As many experts by the shifted logits. Where they are the same ones, the model's own weights are scaled by
        what the shift does to each, so that a vector of zeros changes nothing, bit for bit."""
        assert choice.logits is not None
        logits = choice.logits.float()
        shifted = logits + _of_rows(self.delta, logits.shape[1], gate).to(logits.device)
        new = gate.choose(shifted, choice.k)
        other = compared(choice, new).changed[:, None]
        moved, own = gate.weigh(shifted, choice.ids), gate.weigh(logits, choice.ids)
        scaled = choice.weights.float() * (moved / own.where(own != 0, 1.0)).where(own != 0, 1.0)
        return Choice(new.ids.where(other, choice.ids), new.weights.where(other, scaled), choice.logits)


def dropped(choice: Choice, stays: Tensor, weights: RouteWeights) -> Choice:
    """The choice without some of its experts.

    Args:
        choice: of the router.
        stays: (tokens, k) bool; the others keep their place and get weight 0.
        weights: what becomes of the gate weights.
    """
    left = choice.weights.where(stays, 0.0)
    if weights == "renormalized":
        scale = _ratio(choice.weights, left).where(~stays.all(1, keepdim=True), 1.0)
        left = left * scale.to(left.dtype)
    return Choice(choice.ids, left, choice.logits)


def chosen(choice: Choice, gate: Gate, ids: Tensor, inside: Tensor | None, weights: RouteWeights) -> Choice:
    """Other rows of the router. Tokens with the same experts as before keep the model's own weights.

    Args:
        choice: of the router.
        gate: of the layer.
        ids: (tokens, slots) rows, best first.
        inside: (tokens, slots) bool slots that are used, the first one always; None = all.
        weights: what becomes of the gate weights.
    """
    assert choice.logits is not None
    worth = gate.worth(choice.logits, ids)
    worth = worth if inside is None else worth.where(inside, 0.0)
    scale = _ratio(choice.weights, worth if weights == "renormalized" else gate.worth(choice.logits, choice.ids))
    ids = ids if inside is None else ids.where(inside, ids[:, :1])
    slots = max(choice.k, ids.shape[1])
    new = _widened(gate.settled(Choice(ids, worth * scale, choice.logits)), slots)
    same, own = ~compared(choice, new).changed[:, None], _widened(choice, slots)
    return Choice(own.ids.where(same, new.ids), own.weights.float().where(same, new.weights), choice.logits)


def _widened(choice: Choice, slots: int) -> Choice:
    """The same with unused slots behind: never fewer than the router has, which single families cannot run."""
    more = slots - choice.k
    if not more:
        return choice
    weights = torch.nn.functional.pad(choice.weights, (0, more))
    return Choice(torch.cat([choice.ids, choice.ids[:, :1].expand(-1, more)], 1), weights, choice.logits)


def ranks(values: Tensor) -> Tensor:
    """(tokens, k) int64 place of each value in its row, 0 for the largest; of equal ones, the first comes first."""
    order = values.argsort(dim=1, descending=True, stable=True)
    return order.argsort(dim=1)


def _ratio(before: Tensor, after: Tensor) -> Tensor:
    """(tokens, 1) float32 by what the second weights are multiplied to have the sum of the first; 1 where all are 0."""
    total, left = (values.float().sum(1, keepdim=True) for values in (before, after))
    return (total / left.where(left != 0, 1.0)).where(left != 0, 1.0)


def _of_rows(delta: Tensor, rows: int, gate: Gate) -> Tensor:
    """(rows,) float32: rows that stand for no expert with weights get nothing."""
    if len(delta) not in (gate.weighted, gate.experts, rows):
        raise ModelError(f"a bias of {len(delta)} numbers does not fit a router of {gate.weighted} experts")
    return torch.nn.functional.pad(delta.float(), (0, rows - len(delta)))
