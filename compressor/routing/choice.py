"""What a router chose, token by token, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Choice:
    """The experts of some tokens. A slot with gate weight 0 holds nobody, whatever id stands there.

    Attributes:
        ids: (tokens, k) int64 rows of the router; all of them valid.
        weights: (tokens, k) gate weights.
        logits: (tokens, E) of all rows of the router, as it gave them; None where it showed none.
    """

    ids: Tensor
    weights: Tensor
    logits: Tensor | None = None

    @property
    def k(self) -> int:
        """Slots per token."""
        return int(self.ids.shape[1])


@dataclass(frozen=True, eq=False)
class Taken:
    """What a rule did to some tokens of one layer, padding included, in the order in which they passed.

    Attributes:
        active: (tokens,) int64 experts that ran with a gate weight.
        changed: (tokens,) bool whether they are others than those of the router.
        kept: (tokens,) float32 part of the router's own gate weight that lay on experts which still run, 0..1.
    """

    active: Tensor
    changed: Tensor
    kept: Tensor


def compared(before: Choice, after: Choice) -> Taken:
    """What lies between two choices for the same tokens."""
    runs, ran = after.weights.detach() != 0, before.weights.detach() != 0
    same = (before.ids[:, :, None] == after.ids[:, None, :]) & ran[:, :, None] & runs[:, None, :]
    stays = same.any(2)
    own = before.weights.detach().float().abs()
    total = own.sum(1)
    kept = (own * stays).sum(1) / total.where(total > 0, 1.0)
    changed = (stays != ran).any(1) | (same.any(1) != runs).any(1)
    return Taken(runs.sum(1), changed, kept.where(total > 0, 1.0).clamp(max=1.0))
