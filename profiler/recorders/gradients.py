"""What the loss says about neurons and experts: tables ``neuron_gradient``, ``expert_gradient`` and ``loss``.

One backward behind the forward gives h = dL/da at the input a of each expert's down projection; the gate weight is in
it. L is the cross-entropy of the next token, summed over the predicted tokens, so that sums add up over batches of any
size. With L / N instead, as training code has it, h is smaller by the constant factor N, its square by N squared, and
every ranking of neurons is the same.

Per neuron: sum h^2 and sum a^2, whose means multiply to HEAPr's score. Its w_k^T M w_k with M = mean(u u^T), u = dL/df,
is mean((u . w_k)^2), and u . w_k is h_k: neither a second forward nor a matrix of hidden x hidden is needed. Sum a h is
the first-order Taylor score of the neuron's mask and sum (a h)^2 its empirical Fisher information, which keeps the
token-wise coupling of a and h. Per expert: the same for the mask of the whole expert, from sum_k a h of each token.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from profiler.capture.batch import BlockBatch, ExpertRows, Group, LayerKey
from profiler.capture.check_rows import CheckRow, measured
from profiler.capture.discovery import MoELayer
from profiler.capture.hooks import Hooks
from profiler.capture.tap import ExpertsCall, TappedRows
from profiler.recorders.base import columns_of, literals, scatter_sum
from profiler.recorders.vector_sums import DomainRows, VectorSums, split_domains

if TYPE_CHECKING:
    from profiler.capture.observer import Observer

SUMS = ("activation_square_sum", "gradient_square_sum", "product_sum", "product_square_sum")


@dataclass(frozen=True)
class _Waiting:
    """Rows of a layer that wait for their gradient; the live tensor is left out, for it holds the graph."""

    key: LayerKey
    kind: str
    num_experts: int
    activation: Tensor
    expert: Tensor
    group: Tensor
    groups: list[Group]
    present: list[int]
    real: Tensor | None
    order: Tensor | None
    parts: list[DomainRows]

    def select(self, gradient: Tensor) -> Tensor:
        """(real rows, I) the gradient in the order of the rows."""
        flat = gradient.detach().reshape(-1, gradient.shape[-1])
        if self.order is not None:
            return flat[self.order if self.real is None else self.order[self.real]]
        return flat if self.real is None else flat[self.real]


class GradientRecorder(VectorSums):
    """Sums over tokens of activations and their gradients, taken when the backward reaches them.

    Inside :meth:`Observer.holding` they wait for the forward to count; elsewhere (a training loop under ``watch``) they
    count when they come.

    Args:
        by_domain: keep the domains of vectors apart.

    Attributes:
        loss_difference: loss of one batch with the profiler against without, relative; None where nobody looked.
        loss_tolerance: how much of that is rounding.
    """

    table = "neuron_gradient"
    needs_rows = True

    def __init__(self, by_domain: bool = False) -> None:
        super().__init__(by_domain)
        self._observer: Observer | None = None
        self._experts: dict[tuple[LayerKey, str, Group], NDArray[np.float64]] = {}
        self._loss: dict[str, NDArray[np.float64]] = {}
        self._asked = self._arrived = 0
        self.loss_difference: float | None = None
        self.loss_tolerance = 0.0

    def attach(self, observer: Observer, hooks: Hooks, stack: ExitStack) -> None:
        """Remember whose forwards these are."""
        self._observer = observer

    def saw_experts(
        self, layer: MoELayer, call: ExpertsCall, rows: TappedRows | None, block: BlockBatch | None
    ) -> None:
        """Nothing: rows of routed and shared experts come alike, through :meth:`saw_rows`."""

    def saw_rows(self, batch: ExpertRows) -> None:
        """Ask for the gradient of one layer's activations."""
        if batch.activation is None or not len(batch.token):
            return
        self._asked += 1
        if batch.live is None:
            return
        waiting = _Waiting(
            key=batch.key,
            kind=batch.kind,
            num_experts=batch.num_experts,
            activation=batch.activation,
            expert=batch.expert,
            group=batch.group(),
            groups=batch.tokens.groups,
            present=batch.tokens.present,
            real=batch.real,
            order=batch.live_order,
            parts=list(split_domains(batch, by_domain=self._by_domain)),
        )
        batch.live.register_hook(lambda gradient: self._take(waiting, gradient))

    @torch.no_grad()
    def _take(self, rows: _Waiting, gradient: Tensor) -> None:
        """The backward has come to the rows of one layer."""
        self._arrived += 1
        activation = rows.activation if rows.real is None else rows.activation[rows.real]
        slopes, tokens = rows.select(gradient), torch.zeros(len(rows.expert), device=gradient.device)
        for part in rows.parts:
            a, h = (values if part.chosen is None else values[part.chosen] for values in (activation, slopes))
            sums, per_token = _reduce(a, h, part.counts)
            self.add(part.key, part.counts, dict(zip(SUMS, sums.unbind(0), strict=True)))
            tokens[slice(None) if part.chosen is None else part.chosen] = per_token
        self._add_experts(rows, tokens)
        if self._observer is None or not self._observer.holds:
            self.commit()

    def _add_experts(self, rows: _Waiting, products: Tensor) -> None:
        """Add (rows,) products a . h of whole experts."""
        size = len(rows.groups) * rows.num_experts
        places = rows.group * rows.num_experts + rows.expert
        columns = (None, products, products.square())
        sums = torch.stack([scatter_sum(places, values, size) for values in columns], 1)
        sums = sums.view(len(rows.groups), rows.num_experts, 3)

        def take() -> None:
            host = sums.cpu().numpy()
            for entry in rows.present:
                key = (rows.key, rows.kind, rows.groups[entry])
                self._experts[key] = self._experts[key] + host[entry] if key in self._experts else host[entry]

        self.later(take)

    def compare_losses(self, plain: Tensor, watched: Tensor) -> None:
        """Compare (batch, length) losses of one batch, as the plain model and as the watched one has them."""
        total = float(plain.double().sum())
        difference = abs(float(watched.double().sum()) - total)
        self.loss_difference = difference / (abs(total) or 1.0)

    def add_loss(self, losses: Mapping[str, tuple[int, float]]) -> None:
        """Add a batch's loss: per domain the predicted tokens and the sum of their cross-entropies."""

        def take() -> None:
            for domain, values in losses.items():
                self._loss[domain] = self._loss.get(domain, np.zeros(2)) + np.array(values)

        self.later(take)

    def checks(self) -> list[CheckRow]:
        """Whether each call of experts got its gradient, and whether the loss is the plain model's."""
        missing = self._asked - self._arrived
        detail = f"{missing} of {self._asked} calls of experts got no gradient"
        if missing:
            detail += ": let the loop run forwards with gradients, and a backward behind each"
        rows = [measured("gradients arrived", missing, 0, detail, otherwise="warning")]
        if self.loss_difference is not None:
            detail = "loss of a batch with the profiler against the loss without, relative"
            rows.append(measured("loss unchanged", self.loss_difference, self.loss_tolerance, detail))
        return rows

    def drain(self) -> dict[str, pl.DataFrame]:
        """The three tables; experts and domains without tokens have no row."""
        frames = super().drain()
        experts, self._experts = self._experts, {}
        parts = []
        for (key, kind, group), sums in experts.items():
            used = np.flatnonzero(sums[:, 0])
            names = ("tokens", "product_sum", "product_square_sum")
            columns = dict(zip(names, sums[used].T, strict=True))
            frame = pl.DataFrame({"expert": used, **columns}).with_columns(pl.col("tokens").cast(pl.Int64))
            parts.append(frame.with_columns(kind=pl.lit(kind), **literals(columns_of(key, group))))
        if parts:
            frames["expert_gradient"] = pl.concat(parts)
        loss, self._loss = self._loss, {}
        if loss:
            counts, totals = np.stack(list(loss.values())).T
            columns = {"domain": list(loss), "predictions": counts.astype(np.int64), "loss_sum": totals}
            frames["loss"] = pl.DataFrame(columns)
        return frames


def _reduce(activation: Tensor, gradient: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """(4, experts, I) sums of a^2, h^2, a h and (a h)^2, and (rows,) a . h of each row; rows are sorted by expert.

    Each expert's slice fits a cache, so it is read once for all sums. NaN and infinity count as 0: in one token they
    would undo the sums over all others.
    """
    sums = torch.zeros(4, len(counts), activation.shape[1], device=activation.device)
    per_row = torch.zeros(len(activation), device=activation.device)
    sound = bool(torch.isfinite(activation.sum() + gradient.sum()))
    start = 0
    for expert, count in enumerate(counts.tolist()):
        if not count:
            continue
        part = slice(start, start := start + count)
        a, h = activation[part].float(), gradient[part].float()
        if not sound:
            a, h = (torch.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0) for values in (a, h))
        product = a * h
        for place, values in enumerate((a * a, h * h, product, product * product)):
            torch.sum(values, 0, out=sums[place, expert])
        torch.sum(product, 1, out=per_row[part])
    return sums, per_row
