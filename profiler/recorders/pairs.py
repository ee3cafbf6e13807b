"""Sums over pairs of experts: co-activation, Gram matrices of the router logits and of the outputs: ``expert_pair``.

Three (E, E) matrices per layer. ``selections`` is B of STUN, ``logit_products`` is K, from which M-SMoE takes its
cosine of logit columns. ``output_products`` is A_ij, the sum over tokens of g_i g_j <f_i, f_j>: for any set S of
experts, the sum of A over S x S is exactly the squared error that masking S adds to the layer's output, before
re-routing.
"""

from __future__ import annotations

import polars as pl
import torch
from torch import Tensor

from profiler.capture.batch import BlockBatch, LayerKey, RoutingBatch
from profiler.recorders.base import double_lists, integer_lists, scatter_sum, token_parts
from profiler.recorders.staged import Staged

CACHE_VALUES = 1 << 18
"""Values that are gathered at once on a CPU."""

DEVICE_VALUES = 1 << 26
"""... and elsewhere, where what counts is how often work is handed out."""

MAX_EXPERTS = 1024
"""Layers with more experts (Doge has 16,384 of one neuron each) get no pairs: they would fill the memory."""

PairKey = tuple[LayerKey, str, str]
"""((layer, step), domain, phase); the domain is empty where vectors are pooled."""


class PairRecorder:
    """Co-activation counts and the Gram matrix of the logits.

    Args:
        by_domain: keep domains apart.
    """

    def __init__(self, by_domain: bool = False) -> None:
        self._by_domain = by_domain
        self._selections: dict[PairKey, Tensor] = {}
        self._logits: dict[PairKey, Tensor] = {}

    def update(self, batch: RoutingBatch) -> None:
        """Add the selections of a batch."""
        if not len(batch.tokens) or batch.num_experts > MAX_EXPERTS:
            return
        layers, tokens, _ = batch.ids.shape
        experts = batch.num_experts
        hot = torch.zeros(layers, tokens, experts + 1, device=batch.ids.device)
        hot.scatter_(-1, torch.where(batch.ids >= 0, batch.ids, experts), 1.0)
        hot = hot[..., :experts]
        logits = None
        if batch.logits is not None and not batch.holds_probabilities:
            logits = torch.nan_to_num(batch.logits[..., :experts], nan=0.0, posinf=0.0, neginf=0.0)
        for domain, phase, chosen in token_parts(batch.tokens, hot.device, by_domain=self._by_domain):
            part = hot if chosen is None else hot[:, chosen]
            both = (part.mT @ part).double()  # counts of one batch are exact in float32
            gram = None
            if logits is not None:
                scores = logits if chosen is None else logits[:, chosen]
                gram = (scores.mT @ scores).double()
            for index, key in enumerate(batch.keys):
                _add(self._selections, (key, domain, phase), both[index])
                if gram is not None:
                    _add(self._logits, (key, domain, phase), gram[index])

    def drain(self) -> dict[str, pl.DataFrame]:
        """Two columns of table ``expert_pair``, one row per expert."""
        logits, self._logits = self._logits, {}
        selections, self._selections = self._selections, {}
        frames = []
        for key, counts in selections.items():
            columns = {"selections": integer_lists(counts)}
            if key in logits:
                columns["logit_products"] = double_lists(logits[key])
            frames.append(_frame(key, columns))
        return {"expert_pair": pl.concat(frames, how="diagonal_relaxed")} if frames else {}


class OutputPairRecorder(Staged):
    """The Gram matrix of the gated outputs.

    Args:
        by_domain: keep domains apart.
    """

    def __init__(self, by_domain: bool = False) -> None:
        super().__init__()
        self._by_domain = by_domain
        self._sums: dict[PairKey, Tensor] = {}

    def update(self, batch: BlockBatch) -> None:
        """Add the products of the outputs that each token had."""
        if not len(batch.tokens) or batch.num_experts > MAX_EXPERTS:
            return
        ids, weights, slots = (batch.tokens.select(part) for part in (batch.ids, batch.weights, batch.slots))
        experts = batch.num_experts
        # <g_i f_i, g_j f_j> = g_i g_j <f_i, f_j>: the weights multiply k x k values instead of k x hidden ones
        products = _products(batch.outputs, slots) * weights[:, :, None] * weights[:, None, :]
        products = torch.nan_to_num_(products, nan=0.0, posinf=0.0, neginf=0.0)
        place = torch.where(ids >= 0, ids, experts)
        keys = place[:, :, None] * (experts + 1) + place[:, None, :]
        size = (experts + 1) ** 2
        for domain, phase, chosen in token_parts(batch.tokens, ids.device, by_domain=self._by_domain):
            where = keys if chosen is None else keys[chosen]
            values = products if chosen is None else products[chosen]
            gram = scatter_sum(where.reshape(-1), values.reshape(-1), size)
            gram = gram.view(experts + 1, experts + 1)[:experts, :experts]
            self.later(lambda key=(batch.key, domain, phase), gram=gram: _add(self._sums, key, gram))  # type: ignore[misc]

    def drain(self) -> dict[str, pl.DataFrame]:
        """One column of table ``expert_pair``, one row per expert."""
        sums, self._sums = self._sums, {}
        frames = [_frame(key, {"output_products": double_lists(gram)}) for key, gram in sums.items()]
        return {"expert_pair": pl.concat(frames)} if frames else {}


def _products(outputs: Tensor, slots: Tensor) -> Tensor:
    """(tokens, k, k) float32 scalar products of the outputs in each token's slots.

    On a CPU a part that fits a cache is gathered at a time: the whole would cost a pass through memory and back.
    """
    (tokens, k), width = slots.shape, outputs.shape[1]
    step = max(1, (CACHE_VALUES if outputs.device.type == "cpu" else DEVICE_VALUES) // (k * width))
    products = torch.empty(tokens, k, k, device=outputs.device)
    buffer = outputs.new_empty(min(step, tokens) * k, width)
    for start in range(0, tokens, step):
        part = slots[start : start + step].reshape(-1)
        rows = torch.index_select(outputs, 0, part, out=buffer[: len(part)]).float().view(-1, k, width)
        torch.bmm(rows, rows.mT, out=products[start : start + step])
    return products


def _add(sums: dict[PairKey, Tensor], key: PairKey, values: Tensor) -> None:
    sums[key] = sums[key] + values if key in sums else values


def _frame(key: PairKey, columns: dict[str, pl.Series]) -> pl.DataFrame:
    (layer, step), domain, phase = key
    rows = range(len(next(iter(columns.values()))))
    named = {"layer": pl.lit(layer), "step": pl.lit(step), "domain": pl.lit(domain), "phase": pl.lit(phase)}
    return pl.DataFrame({"expert": rows, **columns}).with_columns(**named)
