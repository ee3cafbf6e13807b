"""How a layer's router makes experts and gate weights of its logits: found by trial, and held to what the model does.

The families differ in the score (softmax over all experts, sigmoid, square root of softplus), in whether the weights of
the chosen are divided by their sum, in a constant factor, in a bias that counts for choosing only, in a factor per
expert, and in groups of experts of which a token may use a few. All combinations that a layer may have are tried on the
tokens that pass; one that gives other experts or other weights than the model itself is out.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from compressor.routing.choice import Choice
from moescope.errors import ModelError

ScoreName = Literal["softmax", "sigmoid", "sqrtsoftplus"]
GroupBy = Literal["best", "two best"]

SURE = 256
"""Tokens after which a gate that never erred is believed; until then every call is held against it."""

ROUNDINGS = 4
"""Weights may differ by so many roundings of the coarser of their type and the logits'."""

LEAST = 2e-5
"""Relative difference of weights that is always allowed: some families add 1e-6 to the sum by which they divide."""


@dataclass(frozen=True, eq=False)
class Gate:
    """Logits -> experts and gate weights, as one layer does it.

    Attributes:
        score: what becomes of a logit before it is compared and weighed.
        renormalized: the weights of the chosen are divided by their sum.
        scale: by which they are multiplied then.
        bias: (E,) added for choosing only; None without.
        factors: (E,) by which the weight of each expert is multiplied last; None without.
        groups: blocks of experts; 1 = none.
        chosen_groups: of which a token may use so many.
        group_by: score of a group.
        biased: what the bias is added to.
        experts: E; rows of the router behind them stand for no expert.
    """

    score: ScoreName
    renormalized: bool
    experts: int
    scale: float = 1.0
    bias: Tensor | None = field(default=None, repr=False)
    factors: Tensor | None = field(default=None, repr=False)
    groups: int = 1
    chosen_groups: int = 1
    group_by: GroupBy = "best"
    biased: Literal["scores", "logits"] = "scores"
    weightless: int = 0

    @property
    def weighted(self) -> int:
        """Experts that hold weights."""
        return self.experts - self.weightless

    def scores(self, logits: Tensor) -> Tensor:
        """(tokens, E) float32 scores of all rows."""
        logits = logits.float()
        if self.score == "softmax":
            return logits.softmax(-1)
        return logits.sigmoid() if self.score == "sigmoid" else torch.nn.functional.softplus(logits).sqrt()

    def probabilities(self, logits: Tensor) -> Tensor:
        """(tokens, E) float32 scores, divided by their sum."""
        scores = self.scores(logits)
        return scores / scores.sum(-1, keepdim=True)

    def order(self, logits: Tensor) -> Tensor:
        """(tokens, E) float32 by which experts are chosen, the largest first; -inf for those out of reach."""
        logits = logits.detach().float()
        by_logits = self.bias is not None and self.biased == "logits"
        return self._order(logits if by_logits else self.scores(logits))

    def select(self, logits: Tensor, k: int, *, without: Tensor | None = None) -> Tensor:
        """(tokens, k) int64 rows that the gate chooses, best first.

        Args:
            logits: (tokens, E).
            k: how many.
            without: (tokens, E) bool rows that may not be chosen.

        Raises:
            ModelError: the gate cannot choose so many.
        """
        order = self.order(logits)
        if without is not None:
            order = order.masked_fill(without, -torch.inf)
        reachable = int((order > -torch.inf).sum(1).min()) if len(order) else order.shape[1]
        if k > reachable:
            raise ModelError(f"a router that can reach {reachable} experts per token cannot choose {k}")
        return order.topk(k, dim=1).indices

    def weigh(self, logits: Tensor, ids: Tensor) -> Tensor:
        """(tokens, k) float32 gate weights of rows that are chosen together; gradients flow to the logits."""
        weights = self._scores_of(logits, ids)
        if self.renormalized:
            weights = weights / weights.sum(1, keepdim=True).clamp_min(1e-20)
        return self._factored(weights * self.scale, ids)

    def worth(self, logits: Tensor, ids: Tensor) -> Tensor:
        """(tokens, k) float32 what rows weigh beside each other, whatever else is chosen."""
        return self._factored(self._scores_of(logits, ids), ids)

    def choose(self, logits: Tensor, k: int, *, without: Tensor | None = None) -> Choice:
        """The choice of ``k`` experts."""
        ids = self.select(logits, k, without=without)
        return self.settled(Choice(ids, self.weigh(logits, ids), logits))

    def settled(self, choice: Choice) -> Choice:
        """The same with a valid id where a row stands for no expert; its weight is 0."""
        return replace(choice, ids=choice.ids.masked_fill(choice.ids >= self.experts, 0))

    def misses(self, choice: Choice) -> str:
        """What of a model's own choice this gate would have done otherwise; empty where nothing."""
        assert choice.logits is not None
        logits = choice.logits.detach()
        near = tolerance(choice)
        weights = self.weigh(logits, choice.ids)
        own = choice.weights.detach().float()
        order = self.order(logits)
        if self.experts < logits.shape[1]:  # a slot that chose nobody does not say which row it was
            chose = own != 0
            weights, order = weights.where(chose, 0.0), order.where(self._compared(order, choice), -torch.inf)
        else:
            chose = torch.ones_like(choice.ids, dtype=torch.bool)
        least = order.topk(choice.k, dim=1).values.amin(1, keepdim=True)
        taken = order.gather(1, choice.ids)
        if bool((chose & (taken < least - near * least.abs().clamp_min(1e-3))).any()):
            return "other experts"
        if bool(((weights - own).abs() > near * own.abs().clamp_min(float(own.abs().amax()) * 1e-3)).any()):
            return "other gate weights"
        return ""

    def _scores_of(self, logits: Tensor, ids: Tensor) -> Tensor:
        scores = self.scores(logits).gather(1, ids)
        return scores.masked_fill(ids >= self.experts, 0.0) if self.experts < logits.shape[1] else scores

    def _factored(self, weights: Tensor, ids: Tensor) -> Tensor:
        return weights if self.factors is None else weights * self.factors.to(weights.device).float()[ids]

    def _compared(self, order: Tensor, choice: Choice) -> Tensor:
        """(tokens, E) all rows of experts, and those behind them only where a slot is empty."""
        empty = (choice.weights == 0).any(1, keepdim=True)
        behind = torch.arange(order.shape[1], device=order.device) >= self.experts
        return ~behind | empty

    def _order(self, scores: Tensor) -> Tensor:
        if self.bias is not None:
            scores = scores + self.bias.to(scores.device).float()
        if self.groups == 1:
            return scores
        blocks = scores.view(len(scores), self.groups, -1)
        best = blocks.amax(2) if self.group_by == "best" else blocks.topk(2, dim=2).values.sum(2)
        inside = torch.zeros_like(best, dtype=torch.bool).scatter(1, best.topk(self.chosen_groups, dim=1).indices, True)
        return blocks.masked_fill(~inside[:, :, None], -torch.inf).view_as(scores)


@dataclass(frozen=True)
class Known:
    """What is known of a layer's router before it is tried.

    Attributes:
        experts: E that the experts module has, or rows of its router where several stand for one; 0 = unknown.
        weightless: how many of them have no weights.
        score: which score its family is said to have, tried first.
        groups: of its configuration.
        chosen_groups: of its configuration.
        biases: tensors per expert that may count for choosing.
        factors: tensors per expert that may multiply weights.
        table: experts are chosen by a table of token ids.
        scales: constant factors that its router or configuration names.
    """

    experts: int
    weightless: int = 0
    score: str = "softmax"
    groups: int = 1
    chosen_groups: int = 1
    biases: tuple[Tensor, ...] = field(default=(), repr=False)
    factors: tuple[Tensor, ...] = field(default=(), repr=False)
    table: bool = False
    scales: tuple[float, ...] = ()

    def candidates(self, rows: int) -> list[Gate]:
        """All gates that such a layer may have, the likely ones first.

        Args:
            rows: of the router.
        """
        names: list[ScoreName] = ["softmax", "sigmoid", "sqrtsoftplus"]
        names.sort(key=lambda name: name != self.score)
        fitting = lambda tensors: [one.detach().reshape(-1) for one in tensors if one.numel() == rows]  # noqa: E731
        groups: list[tuple[int, int, GroupBy]] = [(1, 1, "best")]
        if self.groups > 1 and rows % self.groups == 0:
            sizes = (self.groups, self.chosen_groups)
            groups = [(*sizes, "two best"), (*sizes, "best"), *groups] if rows >= 2 * self.groups else groups
        biases: list[tuple[Tensor | None, Literal["scores", "logits"]]] = [(None, "scores")]
        biases = [*((bias, to) for bias in fitting(self.biases) for to in ("scores", "logits")), *biases]
        return [
            Gate(
                name,
                renormalized,
                min(self.experts or rows, rows),
                1.0,
                bias,
                factors,
                *grouping,
                biased,
                self.weightless,
            )
            for name, (bias, biased), factors, grouping, renormalized in product(
                names, biases, [*fitting(self.factors), None], groups, (True, False)
            )
        ]


class Trial:
    """Finds the gate of one layer, and goes on looking until it is sure.

    Attributes:
        reason: why the layer follows no known rule; empty while one fits.
    """

    def __init__(self, known: Known) -> None:
        self._known, self._seen, self.reason = known, 0, ""
        self._left: list[Gate] | None = None

    @property
    def gate(self) -> Gate | None:
        """The likeliest of those that fit what was seen; None before anything was, or where none fits."""
        return self._left[0] if self._left else None

    def see(self, choice: Choice) -> None:
        """Hold a model's own choice against what is left of the candidates."""
        if self.reason or (self._left is not None and self._seen >= SURE):
            return
        if choice.logits is None:
            self.reason = "its router showed no score per expert"
        elif self._known.table:
            self.reason = "it chooses by a table of token ids"
        if self.reason:
            return
        choice = _sound(choice)
        assert choice.logits is not None
        if not len(choice.ids):
            return
        if self._left is None:
            self._left = [scaled(gate, choice) for gate in self._known.candidates(choice.logits.shape[1])]
            # A few tokens alike fit several gates, each with a factor of its own: one that is known comes first.
            self._left.sort(key=lambda gate: gate.scale != 1 and gate.scale not in self._known.scales)
        said = [gate.misses(choice) for gate in self._left]
        left = [gate for gate, miss in zip(self._left, said, strict=True) if not miss]
        if not left:
            weights = "other gate weights" in said
            self.reason = f"no known rule gives its {'gate weights' if weights else 'experts'} from its scores"
        self._left = left
        self._seen += len(choice.ids)


def scaled(gate: Gate, choice: Choice) -> Gate:
    """The gate with the constant factor that a model's own weights show, rounded to four digits where they allow it."""
    assert choice.logits is not None
    weights = gate.weigh(choice.logits.detach(), choice.ids)
    own = choice.weights.detach().float()
    ratios = (own / weights)[(own != 0) & (weights != 0)]
    if not ratios.numel():
        return gate
    found = float(ratios.double().median())
    near = float(f"{found:.4g}")
    return replace(gate, scale=near if abs(found - near) <= tolerance(choice) * abs(near) else found)


def tolerance(choice: Choice) -> float:
    """Relative difference of weights, and of scores that change places, which rounding explains."""
    assert choice.logits is not None
    types = (choice.weights.dtype, choice.logits.dtype)
    return max(LEAST, ROUNDINGS * max(torch.finfo(one).eps for one in types))


def _sound(choice: Choice) -> Choice:
    """The first tokens whose scores are all numbers: padding may have none."""
    assert choice.logits is not None
    sound = torch.isfinite(choice.logits).all(1) & torch.isfinite(choice.weights).all(1)
    keep = sound.nonzero()[:SURE, 0]
    return Choice(choice.ids[keep], choice.weights[keep], choice.logits[keep])


def require(gate: Gate | None, where: str, reason: str) -> Gate:
    """A gate that rules may ask.

    Raises:
        ModelError: the layer follows no known rule.
    """
    if gate is None:
        raise ModelError(
            f"{where} cannot be rerouted to other experts: {reason}. Rules that only leave experts out work there"
        )
    return gate


def describe(gate: Gate) -> str:
    """The gate in a few words."""
    words = [gate.score, "renormalized" if gate.renormalized else "as it is"]
    words += [f"times {gate.scale:g}"] if gate.scale != 1 else []
    words += ["selection bias"] if gate.bias is not None else []
    words += ["a factor per expert"] if gate.factors is not None else []
    words += [f"{gate.chosen_groups} of {gate.groups} groups"] if gate.groups > 1 else []
    return ", ".join(words)
