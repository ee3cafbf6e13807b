"""Whether the router's scores and the selections tell the same story: looked at in sampled forwards.

What a router returns is not always what its name says: probabilities where logits are promised, scores before a
correction that the choice was made with, or of another layer. Three signs give that away. Values that all lie in [0, 1]
are hardly logits. Within a selection, a larger gate weight belongs to a larger score, whether by softmax, sigmoid or
sigmoid with a selection bias. And without such a bias or groups, the selection is the largest scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from profiler.capture.check_rows import CheckRow, measured
from profiler.capture.discovery import MoELayer

ROUNDING = 2.0**-7
"""Scores closer than this, relative to their size and at least absolutely, may have changed places when they were
rounded to bfloat16 (8 significant bits) on the way to the choice."""

TIES = 0.02
"""Share of selections that ties may decide. A router that rounds its logits to bfloat16 leaves about 1 % of them to
ties at top-8 of 256 experts, less with fewer experts, at any scale (normally distributed logits). Twice that is more
than rounding, and shares and hit rates, which are read to a percent, begin to depend on the order in which a kernel
looks at experts."""

_REORDERING = {
    "PhimoeTopKRouter": "each choice is weighted by a softmax of its own",
    "Gemma4TextRouter": "weights are multiplied by a scale per expert",
    "DiffusionGemmaTextRouter": "weights are multiplied by a scale per expert",
}
_GROUP_FIELDS = ("n_group", "n_groups", "num_expert_group", "num_expert_groups")


def steering(layer: MoELayer, model: nn.Module) -> str:
    """What else than the scores decides in this layer of a model; empty where nothing is known that does."""
    if layer.rerouted:
        return "a rule after the router"
    if "Hash" in type(layer.router).__name__:
        return "a table of token ids"
    sources: list[Any] = [layer.router, layer.experts, getattr(layer.experts, "config", None)]
    sources.append(getattr(layer.router, "config", None))
    if any((getattr(source, name, 1) or 1) > 1 for source in sources for name in _GROUP_FIELDS):
        return "groups of experts"
    block = model.get_submodule(_common(layer.name, layer.router_name))
    for name, tensor in (*block.named_buffers(), *block.named_parameters()):
        last = name.rpartition(".")[2]
        of_experts = tensor.squeeze().ndim == 1 and layer.num_experts <= tensor.numel() <= layer.num_experts + 1
        if of_experts and last not in ("weight", "bias") and "scale" not in last:
            return f"a selection bias ({last})"
    return ""


@dataclass
class ScoreEvidence:
    """What sampled tokens of one layer showed.

    Attributes:
        tokens: tokens looked at.
        shown: of which the router showed one score per expert.
        compared: of which all scores are finite numbers.
        outside: whether a score was seen that no probability can have, or scores that are all alike.
        unordered: tokens with a larger gate weight on a smaller score.
        unexplained: tokens for which a larger score was left out.
    """

    tokens: int = 0
    shown: int = 0
    compared: int = 0
    outside: bool = False
    unordered: int = 0
    unexplained: int = 0

    def update(self, logits: Tensor | None, ids: Tensor, weights: Tensor) -> None:
        """Add tokens: logits (tokens, classes) or None, ids and weights (tokens, k)."""
        self.tokens += len(ids)
        if logits is None or not len(ids):
            return
        self.shown += len(ids)
        scores = logits.float()
        sound = torch.isfinite(scores).all(1) & ((ids >= 0) & (ids < scores.shape[1])).all(1)
        scores, ids, weights = scores[sound], ids[sound], weights[sound].float()
        self.compared += len(ids)
        if not len(ids):
            return
        self.outside |= bool(((scores < 0) | (scores > 1)).any()) or bool(scores.amax() == scores.amin())
        chosen = scores.gather(1, ids)
        lost = scores.scatter(1, ids, -torch.inf).amax(1)
        self.unexplained += int((lost > chosen.amin(1) + _slack(lost)).sum())
        heavier = weights[:, :, None] > weights[:, None, :] * (1 + ROUNDING)
        smaller = chosen[:, :, None] + _slack(chosen)[:, :, None] < chosen[:, None, :]
        self.unordered += int((heavier & smaller).any(2).any(1).sum())

    def rows(self, layer: MoELayer, steered_by: str) -> list[CheckRow]:
        """The rows of table ``check``; none where the layer has no router of its own or was not sampled."""
        if layer.router is None or not self.tokens:
            return []
        router = type(layer.router).__name__
        hidden = self.tokens - self.shown
        detail = f"{router} showed a score per expert for all but {hidden} of {self.tokens} sampled tokens"
        detail += ": entropy, margins and probabilities lack them" if hidden else ""
        rows = [measured("scores shown", hidden, 0, detail, layer=layer, otherwise="warning")]
        if not self.compared:
            return rows
        if not layer.traits.holds_probabilities:
            detail = "scores lie outside [0, 1], as logits do"
            if not self.outside:
                detail = f"all scores of {router} lie in [0, 1]: they look like probabilities but are read as logits"
            doubt = float(not self.outside)
            rows.append(measured("scores are logits", doubt, 0, detail, layer=layer, otherwise="warning"))
        return [*rows, self._order_row(layer, router), self._choice_row(layer, steered_by)]

    def _order_row(self, layer: MoELayer, router: str) -> CheckRow:
        name = "weights follow scores"
        detail = f"{self.unordered} of {self.compared} sampled tokens have a larger gate weight on a smaller score"
        if router in _REORDERING:
            return CheckRow(name, "skipped", self.unordered, None, f"{detail}: {_REORDERING[router]}", layer)
        detail += ": these are not the scores that the router chose by" if self.unordered else ""
        return measured(name, self.unordered, 0, detail, layer=layer, otherwise="warning")

    def _choice_row(self, layer: MoELayer, steered_by: str) -> CheckRow:
        name = "selection follows scores"
        detail = f"{self.unexplained} of {self.compared} sampled tokens left out an expert with a larger score"
        if steered_by:
            return CheckRow(name, "pass", self.unexplained, None, f"{detail}, as {steered_by} may", layer)
        detail += ", though no bias, groups or table are known to decide here" if self.unexplained else ""
        return measured(name, self.unexplained, 0, detail, layer=layer, otherwise="warning")


def tie_row(layer: MoELayer, ties: int, tokens: int, top_k: int, steered_by: str) -> CheckRow:
    """The row on ties between the last expert taken and the next.

    Args:
        layer: the MoE layer.
        ties: tokens whose k-th and (k + 1)-th logit are equal.
        tokens: tokens with logits.
        top_k: k; a tie leaves one of k selections open.
        steered_by: what else decides; equal logits decide nothing there.
    """
    share = ties / (tokens * top_k)
    detail = f"{ties} of {tokens} tokens tie between the last expert taken and the next"
    if steered_by:
        detail += f", where {steered_by} decides"
        return CheckRow("ties at the boundary", "pass", share, None, detail, layer)
    detail += f": {share:.2%} of the selections hang on the order in which a kernel looks at experts"
    return measured("ties at the boundary", share, TIES, detail, layer=layer, otherwise="warning")


def _common(first: str, second: str) -> str:
    """The path of the module around two others."""
    if not second:
        return first.rpartition(".")[0]
    same = takewhile(lambda pair: pair[0] == pair[1], zip(first.split("."), second.split("."), strict=False))
    return ".".join(part for part, _ in same)


def _slack(scores: Tensor) -> Tensor:
    return ROUNDING * scores.abs().clamp_min(1.0)
