"""What recorders are given: tokens of a forward, routing of many layers, rows inside the experts, residual streams."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

LayerKey = tuple[int, int]
"""(layer, step)"""

Group = tuple[str, str]
"""(domain, phase): what scalars per expert are kept apart by."""


@dataclass
class Tokens:
    """The real tokens of one or several forwards; padding has been left out.

    Attributes:
        sequence: (tokens,) int64, number of the sequence in the run.
        position: (tokens,) int64, index among the real tokens of the sequence.
        group: (tokens,) int64, index into ``groups``.
        groups: the (domain, phase) pairs; the list grows during a session, entries keep their place.
        rows: tokens that the forward had with padding, batch x length.
        keep: (tokens,) int64, places of the real tokens among ``rows``; None where all are real.
        batch_row: (tokens,) int64, row of the batch.
        first_seen: per layer and kind, (batch rows, experts) bool: experts that a sequence has used already; kept
            between the forwards of a generation.
        present: indices of the groups that occur.
        modality: (tokens,) int64, what each token stands for (:data:`profiler.capture.inputs.MODALITIES`); None where
            all are text.
    """

    sequence: Tensor
    position: Tensor
    group: Tensor
    groups: list[Group]
    rows: int
    keep: Tensor | None
    batch_row: Tensor
    first_seen: dict[tuple[LayerKey, str], Tensor] = field(default_factory=dict)
    present: list[int] = field(default_factory=list)
    modality: Tensor | None = None

    def __len__(self) -> int:
        return int(self.sequence.shape[0])

    def part(self, places: Tensor) -> Tokens:
        """The tokens of a call that has only some of the forward's rows.

        Args:
            places: (rows of the call,) their places among the rows of the forward, ascending.
        """
        real = torch.arange(self.rows, device=places.device)
        if self.keep is not None:
            real = torch.full_like(real, -1)
            real[self.keep] = torch.arange(len(self), device=real.device)
        token = real[places]
        keep = (token >= 0).nonzero()[:, 0]
        token = token[keep]
        return replace(
            self,
            sequence=self.sequence[token],
            position=self.position[token],
            group=self.group[token],
            rows=len(places),
            keep=None if len(keep) == len(places) else keep,
            batch_row=self.batch_row[token],
            present=torch.unique(self.group[token]).tolist(),
            modality=None if self.modality is None else self.modality[token],
        )

    def select(self, values: Tensor, dim: int = 0) -> Tensor:
        """The entries of the real tokens, along the dimension that runs over all rows of the forward."""
        return values if self.keep is None else values.index_select(dim, self.keep.to(values.device))


@dataclass
class RoutingBatch:
    """Selections of several layers that have the same number of experts and the same k, for the same tokens.

    Attributes:
        keys: (layer, step) of each entry of axis 0.
        tokens: whose they are.
        num_experts: E of these layers.
        ids: (layers, tokens, k) int64 in descending gate weight, -1 = none.
        weights: (layers, tokens, k) float32 in the same order, 0 where there is no expert.
        logits: (layers, tokens, E or more) float32; None where no router showed any. More columns than E are classes
            beside the experts (Zaya's skip class): they count in probabilities but have no rows in tables.
        score: how the logits become the router probability.
        holds_probabilities: ``logits`` are logarithms of probabilities, because the router shows no others.
        strange_ids: (layers,) selections whose id is no expert of the layer; they stand as -1 in ``ids``.
    """

    keys: list[LayerKey]
    tokens: Tokens
    num_experts: int
    ids: Tensor
    weights: Tensor
    logits: Tensor | None
    score: Literal["softmax", "sigmoid", "unknown"]
    holds_probabilities: bool = False
    strange_ids: Tensor | None = None


@dataclass
class BlockBatch:
    """What the routed experts of one layer were called with in one forward, and what they gave back.

    All rows of the forward are here, those of padding included; :meth:`Tokens.select` leaves these out.

    Attributes:
        key: (layer, step).
        num_experts: E.
        tokens: the tokens of the forward.
        hidden: (rows, width) the experts' input x.
        ids: (rows, k) int64 selected experts; -1 = none.
        weights: (rows, k) gate weights, 0 where there is no expert; 1 where they multiply the inputs instead (Llama 4).
        output: (rows, width) the experts' weighted sum y, before what the block does to it.
        residual: (rows, width) the residual stream r before the norm that made x; None where it was not seen.
        slots: (rows, k) place of each selection among the rows inside the experts.
        outputs: (rows inside, width) what each selected expert put out, before its gate weight.
    """

    key: LayerKey
    num_experts: int
    tokens: Tokens
    hidden: Tensor
    ids: Tensor
    weights: Tensor
    output: Tensor
    residual: Tensor | None
    slots: Tensor
    outputs: Tensor

    @cached_property
    def cosine(self) -> Tensor | None:
        """(real tokens,) float32 cos(r, r + y); None where r was not seen."""
        if self.residual is None:
            return None
        before = self.tokens.select(self.residual).float()
        after = before + self.tokens.select(self.output)
        return torch.nn.functional.cosine_similarity(before, after, dim=1).nan_to_num_(nan=1.0)

    @cached_property
    def after_square(self) -> Tensor | None:
        """(real tokens,) float32 squared L2 norm of r + y; None where r was not seen."""
        if self.residual is None:
            return None
        after = self.tokens.select(self.residual).float() + self.tokens.select(self.output)
        return after.square().sum(1)


@dataclass
class ExpertRows:
    """What happened inside the experts of one layer, one row per (token, selected expert), sorted by expert.

    Attributes:
        key: (layer, step).
        kind: routed | shared; the shared experts of a layer count as its expert 0.
        num_experts: experts of this kind in the layer.
        tokens: the tokens of the forward.
        expert: (rows,) int64 ascending.
        token: (rows,) int64, index into ``tokens``.
        gate: (rows,) float32 gate weights; 1 where they multiply the inputs instead (Llama 4).
        activation: (all rows, I) what enters the second projection; None where it is not shown.
        output: (all rows, hidden) what comes out of it, before the gate weight.
        real: (rows,) places of the rows among all rows, which also hold those of padding; None where all are real.
        block: the call that the rows belong to; None for shared experts.
        inputs: (forward rows, width) what the experts were given; None where it was not seen.
        live: ``activation`` as part of a graph, to learn its gradient; None where the forward runs without gradients.
        live_order: (all rows,) place of each row in ``live``; None where rows stand alike.
    """

    key: LayerKey
    kind: Literal["routed", "shared"]
    num_experts: int
    tokens: Tokens
    expert: Tensor
    token: Tensor
    gate: Tensor
    activation: Tensor | None
    output: Tensor
    real: Tensor | None
    block: BlockBatch | None = None
    inputs: Tensor | None = None
    live: Tensor | None = None
    live_order: Tensor | None = None

    @cached_property
    def counts(self) -> Tensor:
        """(experts,) int64 rows of each expert."""
        return torch.bincount(self.expert, minlength=self.num_experts)

    @cached_property
    def norm(self) -> Tensor:
        """(rows,) float32 L2 norm of each output; 0 for a row with a value that is no finite number."""
        norm = torch.linalg.vector_norm(self.output, dim=1, dtype=torch.float32)
        return self.select(torch.nan_to_num(norm, nan=0.0, posinf=0.0, neginf=0.0))

    @property
    def phase(self) -> str:
        """The phase of the forward; a forward is either prompt or decode."""
        phases = {self.tokens.groups[entry][1] for entry in self.tokens.present}
        assert len(phases) == 1, "a forward is either prompt or decode"
        return phases.pop()

    def select(self, values: Tensor) -> Tensor:
        """The entries of real rows of a tensor that has padding's rows too."""
        return values if self.real is None else values.index_select(0, self.real)

    def group(self) -> Tensor:
        """(rows,) group of each row's token."""
        return self.tokens.group.to(self.token.device)[self.token]


@dataclass
class ResidualBatch:
    """The residual stream after one decoder layer.

    Attributes:
        layer: index of the decoder layer.
        tokens: the tokens of the forward.
        hidden: (rows, width) in the model's type, rows of padding included; parallel streams stand side by side.
        width: width of one stream, by which channels are numbered.
        entered: the same before the layer; None where it was not seen.
    """

    layer: int
    tokens: Tokens
    hidden: Tensor
    width: int
    entered: Tensor | None = None


def concatenate_tokens(parts: list[Tokens]) -> Tokens:
    """The tokens of successive forwards as one; ``first_seen``, ``keep`` and ``modality`` are left out."""
    if len(parts) == 1:
        return parts[0]
    return Tokens(
        sequence=torch.cat([part.sequence for part in parts]),
        position=torch.cat([part.position for part in parts]),
        group=torch.cat([part.group for part in parts]),
        groups=parts[0].groups,
        rows=sum(len(part) for part in parts),
        keep=None,
        batch_row=torch.cat([part.batch_row for part in parts]),
        present=sorted({group for part in parts for group in part.present}),
    )
