"""Self-contrast as in SCMoE: the model as it is, less the same model routed to an expert that it ranks lower.

z = (1 + beta) z_strong - beta z_weak over the candidates z_strong >= max z_strong + ln(alpha); all others are out.
Strong is the model's own routing; weak is the same text read with each token's rank-r expert alone. Both read the text
that was given, not their own words. See docs/sweep.md for what is made of tokens that are no candidates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compressor.routing import Rank, rerouted
from moescope.errors import InputError
from profiler import evaluate
from profiler.corpus import TokenBatch
from profiler.evaluation.distribution import aligned, log_softmax, tensors_of
from profiler.metrics.divergence import mean_of_items
from profiler.running import evaluating
from profiler.sweep.estimates import plain
from profiler.sweep.reading import Progress

ALPHA, BETA, RANK = 0.1, 0.5, 2
"""The defaults of the authors' code; rank as its README counts it for GSM8K, 1 being the best expert here."""


@dataclass(frozen=True)
class Contrast:
    """What is tried.

    Attributes:
        ranks: of the weak routing's only expert, 1 = the router's best.
        betas: strengths, each > 0.
        alpha: candidates have at least so large a part of the likeliest token's probability, in (0, 1].
    """

    ranks: tuple[int, ...] = (RANK,)
    betas: tuple[float, ...] = (BETA,)
    alpha: float = ALPHA

    def require_sense(self, num_experts: int) -> None:
        """Refuse what cannot be tried.

        Raises:
            InputError: a rank that no expert has, a strength that is none, or a part outside (0, 1].
        """
        for rank in self.ranks:
            if not 1 <= rank <= num_experts:
                raise InputError(f"--contrast-rank {rank}: the router ranks experts from 1 to {num_experts}")
        for beta in self.betas:
            if not (math.isfinite(beta) and beta > 0):
                raise InputError(f"--contrast-beta {beta:g}: give a strength above 0, such as 0.5")
        if not 0 < self.alpha <= 1:
            raise InputError(f"--contrast-alpha {self.alpha:g}: give a part above 0, and 1 at most")


def contrasted(strong: Tensor, weak: Tensor, *, alpha: float, beta: float) -> Tensor:
    """Contrasted scores of logits (..., vocabulary); -inf for what is no candidate."""
    candidates = strong >= strong.amax(-1, keepdim=True) + math.log(alpha)
    return torch.where(candidates, (1 + beta) * strong - beta * weak, -torch.inf)


def contrast(
    model: nn.Module,
    batches: Sequence[TokenBatch],
    *,
    rank: int,
    betas: Sequence[float],
    alpha: float,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Strong against weak, and every strength of contrast, on one text.

    Returns:
        ``rank``, ``alpha``; ``kl``: KL(strong || weak) per token, nats, and ``agreement`` of their likeliest tokens,
        with intervals, over all text and ``per_domain``; ``betas``: per strength ``accuracy`` of the contrasted
        likeliest token, ``base_accuracy`` of strong's, ``difference`` of the two, paired; ``candidates``: share of
        tokens whose true next token is a candidate; on these ``loss`` of the contrasted distribution and
        ``base_loss`` of strong's over the same candidates, and ``change``, nats, paired.

    Raises:
        ModelError: the weak routing cannot be put before the model's experts.
    """
    rows = []
    with evaluating(model), torch.no_grad():
        for batch in batches:
            ids, mask = tensors_of(model, batch)
            with rerouted(model, Rank(rank)):
                weak = [(start, part.cpu()) for start, part in evaluate.logit_chunks(model, ids, mask)]
            sums = _sums(evaluate.logit_chunks(model, ids, mask), iter(weak), ids, mask, betas, alpha)
            columns = {name: values.cpu().numpy() for name, values in sums.items()}
            rows.append(pl.DataFrame({"domain": batch.domains, **columns}))
            if progress is not None:
                progress(2 * int(batch.attention_mask.sum()))
    table = pl.concat(rows)
    domains = table["domain"].unique(maintain_order=True).to_list()
    parts = {name: _summary(table.filter(pl.col("domain") == name), betas) for name in domains}
    return {
        "rank": rank,
        "alpha": alpha,
        **(_summary(table, betas) or {}),
        "per_domain": {name: part for name, part in parts.items() if part is not None},
    }


def _sums(strong: Any, weak: Any, ids: Tensor, mask: Tensor, betas: Sequence[float], alpha: float) -> dict[str, Tensor]:
    """Sums per sequence over its predicted tokens, (batch,)."""
    real = mask.bool()
    counted, targets = real[:, 1:] & real[:, :-1], ids[:, 1:]
    sums: dict[str, Tensor] = {"predictions": counted.sum(1)}
    for start, one, other in aligned(strong, weak):
        stop = min(start + one.shape[1], targets.shape[1])
        if stop <= start:
            break
        z, y = one[:, : stop - start].float(), other[:, : stop - start].to(one.device).float()
        chosen, there = targets[:, start:stop].to(z.device)[..., None], counted[:, start:stop].to(z.device)
        for name, values in _tokens(z, y, chosen, betas, alpha).items():
            found = torch.where(there, values.double(), 0.0).sum(1).to(ids.device)
            sums[name] = sums.get(name, torch.zeros_like(found)) + found
    return sums


def _tokens(z: Tensor, y: Tensor, chosen: Tensor, betas: Sequence[float], alpha: float) -> dict[str, Tensor]:
    """Figures per token, (batch, positions), of strong logits z and weak logits y."""
    p, q = log_softmax(z), log_softmax(y)
    first = z.argmax(-1)
    found = {
        "kl": torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(-1),
        "agreed": first == y.argmax(-1),
        "right": first == chosen[..., 0],
    }
    strong = contrasted(z, y, alpha=alpha, beta=0.0)
    inside = strong.gather(-1, chosen)[..., 0] > -torch.inf
    before = -log_softmax(strong).gather(-1, chosen)[..., 0]
    found["candidate"], found["base_loss"] = inside, torch.where(inside, before, 0.0)
    for number, beta in enumerate(betas):
        scores = contrasted(z, y, alpha=alpha, beta=beta)
        loss = -log_softmax(scores).gather(-1, chosen)[..., 0]
        found[f"right_{number}"] = scores.argmax(-1) == chosen[..., 0]
        found[f"loss_{number}"] = torch.where(inside, loss, 0.0)
    return found


def _summary(table: pl.DataFrame, betas: Sequence[float]) -> dict[str, Any] | None:
    items, candidates = table["predictions"].to_numpy(), table["candidate"].to_numpy()
    if not items.sum():
        return None

    def mean(sums: pl.Series, over: NDArray[np.float64] = items) -> dict[str, float | None] | None:
        return plain(mean_of_items(sums=sums.to_numpy(), items=over)) if over.sum() else None

    return {
        "tokens": int(items.sum()),
        "kl": mean(table["kl"]),
        "agreement": mean(table["agreed"]),
        "candidates": mean(table["candidate"]),
        "base_accuracy": mean(table["right"]),
        "base_loss": mean(table["base_loss"], candidates),
        "betas": [
            {
                "beta": beta,
                "accuracy": mean(table[f"right_{number}"]),
                "difference": mean(table[f"right_{number}"] - table["right"]),
                "loss": mean(table[f"loss_{number}"], candidates),
                "change": mean(table[f"loss_{number}"] - table["base_loss"], candidates),
            }
            for number, beta in enumerate(betas)
        ],
    }
