"""How decided the router was: tables ``router_load``, ``router_histogram`` and the router's part of ``expert_load``.

The router probability is the score over all experts before selection: the softmax of the logits, or, for routers that
score each expert by its own sigmoid, those sigmoids divided by their sum. Selection biases, groups and scaling are not
in it; what they lead to stands in the gate weights. Where a family scores in another way the probability is unknown,
and what needs it is null. All of it is computed in float32 from the logits as the model computed them.
"""

from __future__ import annotations

import math

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from profiler.capture.batch import RoutingBatch
from profiler.recorders.base import Sums, columns_of, group_matrix, groups_by_name, literals

BINS = 32
"""Equal bins of the quantities that have a largest value: probabilities over [0, 1], entropy over [0, ln E]."""

MARGIN_EDGES = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)
"""Edges of the bins of margins, in logits; the last bin also holds what lies above."""

QUANTITIES = ("entropy", "top_probability", "selected_probability", "first_margin", "boundary_margin")
"""What the histogram shows; ``weight_entropy`` and ``log_partition_square`` are summed only."""

_SUMS = (
    "tokens",
    "logit_tokens",
    "selections",
    "entropy_sum",
    "top_probability_sum",
    "selected_probability_sum",
    "first_margin_sum",
    "boundary_margin_sum",
    "log_partition_square_sum",
    "boundary_ties",
    "weight_entropy_sum",
)
_COUNTS = ("tokens", "logit_tokens", "nonfinite_tokens", "selections", "boundary_ties")


class RouterRecorder:
    """Sums and distributions of what the router's scores look like, per layer, domain and phase."""

    def __init__(self) -> None:
        self._tokens = Sums()
        self._experts = Sums()
        self._bins: dict[int, Sums] = {}
        self._unknown: set[tuple[int, int]] = set()
        self._wide: dict[tuple[int, int], int] = {}

    def update(self, batch: RoutingBatch) -> None:
        """Add a batch; tokens with logits that are no finite numbers are counted and left out of all sums of logits."""
        layers, tokens, _ = batch.ids.shape
        if tokens == 0:
            return
        present = groups_by_name(batch.tokens)
        member = group_matrix(batch.tokens, present, batch.ids.device)  # shape: (groups, tokens)
        values = [torch.ones_like(batch.weights[..., 0])]
        bins = experts = None
        if batch.logits is None:
            values += [torch.zeros_like(values[0]), *_selection(batch)]
        else:
            measured = _Measured(batch)
            values += measured.sums()
            bins = measured.histogram(member)
            experts = measured.experts(member)
        # shape: (layers, quantities, tokens) x (tokens, groups); float32 within a batch, float64 between batches
        sums = (torch.stack(values, 1) @ member.T).double().cpu().numpy()
        self._keep(batch, present, sums, bins, experts)

    def _keep(
        self,
        batch: RoutingBatch,
        present: list[int],
        sums: NDArray[np.float64],
        bins: NDArray[np.float64] | None,
        experts: NDArray[np.float64] | None,
    ) -> None:
        for index, key in enumerate(batch.keys):
            if batch.score == "unknown":
                self._unknown.add(key)
            for place, entry in enumerate(present):
                group = batch.tokens.groups[entry]
                self._tokens.add((key, group), sums[index, :, place])
                if bins is not None and experts is not None and batch.logits is not None:
                    self._wide[key] = batch.logits.shape[-1]
                    self._bins.setdefault(key[0], Sums()).add((key, group), bins[index, place])
                    self._experts.add((key, group), experts[index, place, :, : batch.num_experts])

    def drain(self) -> dict[str, pl.DataFrame]:
        """Tables ``router_load``, ``router_histogram`` and the columns of ``expert_load`` about scores."""
        tables: dict[str, list[pl.DataFrame]] = {"router_load": [], "router_histogram": [], "expert_load": []}
        for (key, group), values in self._tokens.drain():
            row = {**columns_of(key, group), **dict(zip(_SUMS, values.tolist(), strict=True))}
            row["nonfinite_tokens"] = row["tokens"] - row["logit_tokens"] if key in self._wide else 0
            if key in self._unknown or key not in self._wide:
                row.update(dict.fromkeys(("entropy_sum", "top_probability_sum", "selected_probability_sum")))
            tables["router_load"].append(pl.DataFrame([row]).with_columns(pl.col(_COUNTS).cast(pl.Int64)))
        for sums in self._bins.values():
            for (key, group), counts in sums.drain():
                part = self._histogram(key, counts).with_columns(**literals(columns_of(key, group)))
                tables["router_histogram"].append(part)
        for (key, group), values in self._experts.drain():
            names = dict(zip(("probability_sum", "logit_sum", "logit_square_sum"), values, strict=True))
            part = pl.DataFrame({"expert": range(values.shape[1]), **names})
            if key in self._unknown:
                part = part.with_columns(probability_sum=pl.lit(None, pl.Float64))
            tables["expert_load"].append(part.with_columns(**literals(columns_of(key, group)), kind=pl.lit("routed")))
        return {name: pl.concat(parts, how="vertical_relaxed") for name, parts in tables.items() if parts}

    def _histogram(self, key: tuple[int, int], counts: NDArray[np.float64]) -> pl.DataFrame:
        columns: dict[str, list[object]] = {"quantity": [], "lower": [], "upper": [], "tokens": []}
        for quantity, row in zip(QUANTITIES, counts, strict=True):
            if key in self._unknown and not quantity.endswith("margin"):
                continue
            edges = edges_of(quantity, self._wide[key])
            for place in np.flatnonzero(row[: len(edges) - 1]):
                columns["quantity"].append(quantity)
                columns["lower"].append(edges[place])
                columns["upper"].append(edges[place + 1])
                columns["tokens"].append(int(row[place]))
        types = {"quantity": pl.String, "lower": pl.Float64, "upper": pl.Float64, "tokens": pl.Int64}
        return pl.DataFrame(columns, schema=types)


def edges_of(quantity: str, classes: int) -> list[float]:
    """The edges of the bins of a quantity, for a router with that many classes."""
    if quantity.endswith("margin"):
        return list(MARGIN_EDGES)
    top = math.log(classes) if quantity == "entropy" else 1.0
    return [top * place / BINS for place in range(BINS + 1)]


class _Measured:
    """What is derived from the logits of a batch, each (layers, tokens); 0 for tokens whose logits are not finite."""

    def __init__(self, batch: RoutingBatch) -> None:
        assert batch.logits is not None
        self.batch = batch
        raw = batch.logits
        # A sum is finite only if all its terms are; looking at every term would cost three passes more.
        self.finite = torch.isfinite(raw.sum(-1))
        if not bool(self.finite.all()):
            self.finite = torch.isfinite(raw).all(-1)
            raw = torch.where(self.finite[..., None], raw, torch.zeros_like(raw))
        self.logits = raw
        self.weight = self.finite.float()
        self.log_partition = torch.logsumexp(raw, -1)
        self._probabilities(raw)
        self._margins(raw)

    def _probabilities(self, raw: Tensor) -> None:
        if self.batch.score == "sigmoid":
            score = torch.sigmoid(raw)
            total = score.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
            self.probability = score / total
            self.entropy = -torch.xlogy(self.probability, self.probability).sum(-1)
        else:
            self.probability = torch.exp(raw - self.log_partition[..., None])
            # -sum p log p = log Z - sum p z
            self.entropy = self.log_partition - (self.probability * raw).sum(-1)
        self.entropy = self.entropy.clamp_min(0)
        ids = self.batch.ids
        taken = self.probability.gather(-1, ids.clamp_min(0))
        self.selected = torch.where(ids >= 0, taken, 0).sum(-1)
        self.top = self.probability.amax(-1)

    def _margins(self, raw: Tensor) -> None:
        k, classes = self.batch.ids.shape[-1], raw.shape[-1]
        self.has_boundary = k < classes
        chosen = raw.gather(-1, self.batch.ids.clamp_min(0))
        rest = raw.scatter(-1, self.batch.ids.clamp_min(0), -math.inf).amax(-1)
        usual = (self.batch.ids >= 0).all() & (chosen.amin(-1) >= rest).all()
        if self.has_boundary and bool(usual):
            # The selection is the largest logits, as in most families: sorting all of them again would be a waste.
            largest = torch.cat([chosen.sort(dim=-1, descending=True).values, rest[..., None]], -1)
        else:
            largest = raw.topk(min(k + 1, classes), dim=-1).values
        nothing = torch.zeros_like(self.weight)
        self.first_margin = largest[..., 0] - largest[..., 1] if classes > 1 else nothing
        self.boundary = largest[..., k - 1] - largest[..., k] if self.has_boundary else nothing

    def sums(self) -> list[Tensor]:
        """Each (layers, tokens), in the order of the sums after ``tokens``."""
        selections, *_, weight_entropy = _selection(self.batch)
        ties = (self.boundary == 0).float() * float(self.has_boundary)
        parts = [self.entropy, self.top, self.selected, self.first_margin, self.boundary]
        parts += [self.log_partition.square(), ties]
        return [self.weight, selections, *(part * self.weight for part in parts), weight_entropy]

    def histogram(self, member: Tensor) -> NDArray[np.float64]:
        """(layers, groups, quantities, bins) tokens per bin; margins use the first bins only."""
        classes = self.logits.shape[-1]
        top = math.log(classes) if classes > 1 else 1.0
        edges = torch.tensor(MARGIN_EDGES[1:-1], device=member.device)
        bounded = [(self.entropy, top), (self.top, 1.0), (self.selected, 1.0)]
        places = [(value * (BINS / limit)).long() for value, limit in bounded]
        places += [torch.bucketize(value, edges, right=True) for value in (self.first_margin, self.boundary)]
        place = torch.stack(places, 1).clamp(0, BINS - 1)  # shape: (layers, quantities, tokens)
        layers, quantities, _ = place.shape
        groups = member.shape[0]
        group = member.argmax(0)
        row = torch.arange(layers * quantities, device=member.device).view(layers, quantities, 1)
        keys = (row * groups + group) * BINS + place
        counted = self.weight[:, None].expand_as(place).reshape(-1)
        counts = torch.zeros(layers * quantities * groups * BINS, device=member.device)
        counts.index_add_(0, keys.reshape(-1), counted)
        counts = counts.view(layers, quantities, groups, BINS).transpose(1, 2).double()
        if not self.has_boundary:
            counts[:, :, QUANTITIES.index("boundary_margin")] = 0
        return counts.cpu().numpy()

    def experts(self, member: Tensor) -> NDArray[np.float64]:
        """(layers, groups, 3, classes) sums over tokens of probability, logit and squared logit."""
        mask = member[None] * self.weight[:, None]  # shape: (layers, groups, tokens)
        probability = mask @ self.probability
        logit = mask @ self.logits
        square = mask @ self.logits.square()
        sums = torch.stack([probability, logit, square], dim=2).double()
        if self.batch.holds_probabilities:
            sums[:, :, 1:] = math.nan
        return sums.cpu().numpy()


def _selection(batch: RoutingBatch) -> list[Tensor]:
    """What is known without logits, in the order of the sums: selections, zeros, entropy of the gate weights."""
    weights = torch.nan_to_num(batch.weights, nan=0.0, posinf=0.0, neginf=0.0).clamp_min(0)
    share = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    entropy = -torch.xlogy(share, share).sum(-1)
    selections = (batch.ids >= 0).sum(-1).float()
    nothing = torch.zeros_like(entropy)
    return [selections, *([nothing] * 7), entropy]
