"""Every table of a run, computed token by token in float64 from what plain hooks saw.

Nothing here goes through the tap, the observer or the recorders: experts are run one by one on float64 weights, and
sums are taken with numpy. Only the layout says where an expert's weights are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit, softmax

from tests.profiler.capture.plain_hooks import Seen
from tests.profiler.capture.tiny import _Double

Array = NDArray[np.float64]


@dataclass
class Fed:
    """The tokens of one forward: (rows,) each, padding rows included; ``real`` says which of them count."""

    real: NDArray[np.bool_]
    domain: str
    phase: str
    sequence: NDArray[np.int64]
    position: NDArray[np.int64]


class Reference:
    """One layer over the real tokens of all forwards, in float64.

    Attributes:
        layer: the layer.
        ids: (tokens, k) in descending weight, -1 = none.
        gate: (tokens, k) gate weights in that order, 0 for none.
        hidden: (tokens, width) the experts' input.
        result: (tokens, hidden) the experts' weighted sum, as the model computed it.
        residual: (tokens, hidden) what the norm before was given; None where it was not seen.
        logits: (tokens, classes); None where the router showed none.
        domain, phase, sequence, position: (tokens,) whose tokens they are.
        shared: (tokens, hidden) output, (tokens, I) activation and (tokens,) gate of the shared experts, or None each.
        activation: (tokens, k, I) what enters the second projection of each selected expert.
        output: (tokens, k, hidden) what it puts out.
    """

    def __init__(self, seen: Seen, fed: list[Fed]) -> None:
        self.layer, self.num_experts = seen.layer, seen.layer.num_experts
        real = np.concatenate([part.real for part in fed])

        def joined(parts: list[Any]) -> Any:
            return np.concatenate([part.double().numpy() for part in parts])[real]

        self.hidden, self.result = joined(seen.hidden), joined(seen.results)
        ids, gate = joined(seen.ids).astype(np.int64), joined(seen.weights)
        if self.layer.traits.zero_weight_is_none:
            ids = np.where(gate == 0, -1, ids)
        order = np.argsort(-gate, axis=1, kind="stable")
        self.ids, self.gate = np.take_along_axis(ids, order, 1), np.take_along_axis(gate, order, 1)
        self.logits = joined(seen.logits) if seen.logits else None
        known = [part for part in seen.residual if part is not None]
        self.residual = joined(known) if len(known) == len(seen.residual) else None
        self.domain = np.concatenate([np.repeat(part.domain, len(part.real)) for part in fed])[real]
        self.phase = np.concatenate([np.repeat(part.phase, len(part.real)) for part in fed])[real]
        self.sequence = np.concatenate([part.sequence for part in fed])[real]
        self.position = np.concatenate([part.position for part in fed])[real]
        self._run_experts()
        # (tokens, ...) output, activation and gate of the shared experts; None for what is not there
        self.shared = [
            joined([part[place] for part in seen.shared]) if seen.shared and seen.shared[0][place] is not None else None
            for place in range(3)
        ]

    def _run_experts(self) -> None:
        layout = self.layer.layout
        assert layout is not None
        tokens, k = self.ids.shape
        double, inputs = _Double(self.layer.experts), torch.from_numpy(self.hidden)
        self.activation = np.zeros((tokens, k, layout.width))
        self.output = np.zeros((tokens, k, layout.hidden_size))
        for expert in np.unique(self.ids[self.ids >= 0]).tolist():
            token, slot = np.nonzero(self.ids == expert)
            activation, output = layout.run_expert(double, expert, inputs[token])
            self.activation[token, slot], self.output[token, slot] = activation.numpy(), output.numpy()

    @cached_property
    def norm(self) -> Array:
        """(tokens, k) L2 norm of what each selected expert puts out."""
        return np.linalg.norm(self.output, axis=2)

    @cached_property
    def total(self) -> Array:
        """(tokens, hidden) the weighted sum of the selected experts."""
        return np.einsum("tk,tkh->th", self.gate, self.output)

    @cached_property
    def cosine(self) -> Array | None:
        """(tokens,) cos(r, r + y)."""
        if self.residual is None or self.residual.shape != self.total.shape:
            return None
        after = self.residual + self.total
        return (self.residual * after).sum(1) / np.linalg.norm(self.residual, axis=1) / np.linalg.norm(after, axis=1)

    def hot(self, values: Array | None = None) -> Array:
        """(tokens, E) values (1 if None) of the selected experts, 0 of the others."""
        table = np.zeros((len(self.ids), self.num_experts))
        token, slot = np.nonzero(self.ids >= 0)
        np.add.at(table, (token, self.ids[token, slot]), 1.0 if values is None else values[token, slot])
        return table

    def expert_load(self) -> dict[str, Array]:
        """(tokens, E) of each column: sums over tokens are the table."""
        share = self.gate / np.maximum(self.gate.sum(1, keepdims=True), 1e-300)
        hot = self.hot()
        first = np.zeros_like(self.gate)
        first[:, 0] = 1.0
        columns = {
            "tokens": hot,
            "first_choices": self.hot(first),
            "first_positions": hot * (self.position == 0)[:, None],
            "gate_sum": self.hot(self.gate),
            "gate_square_sum": self.hot(self.gate**2),
            "gate_share_sum": self.hot(share),
        }
        if self.logits is None or self.layer.traits.holds_probabilities:
            return columns
        columns |= {"logit_sum": self.logits[:, : self.num_experts]}
        columns["logit_square_sum"] = columns["logit_sum"] ** 2
        if self.layer.traits.score != "unknown":
            sigmoid = self.layer.traits.score == "sigmoid"
            score = expit(self.logits) if sigmoid else softmax(self.logits, axis=1)
            columns["probability_sum"] = (score / score.sum(1, keepdims=True))[:, : self.num_experts]
        return columns

    def expert_rank(self) -> dict[str, Array]:
        """(tokens, E, k or 8) of each column."""
        k = self.ids.shape[1]
        rank = np.eye(k)
        columns = {
            "tokens": np.stack([self.hot(np.tile(rank[place], (len(self.ids), 1))) for place in range(k)], 2),
            "gate_sum": np.stack([self.hot(self.gate * rank[place]) for place in range(k)], 2),
        }
        if self.logits is None or self.layer.traits.holds_probabilities:
            return columns
        chosen = np.where(self.ids >= 0, np.take_along_axis(self.logits, np.maximum(self.ids, 0), 1), -np.inf)
        with np.errstate(invalid="ignore"):
            confidence = np.nan_to_num(softmax(chosen, axis=1))
        chosen = np.where(self.ids >= 0, chosen, 0.0)
        columns["logit_sum"] = np.stack([self.hot(chosen * rank[place]) for place in range(k)], 2)
        self.confidence = confidence
        return columns

    def expert_output(self) -> tuple[dict[str, Array], dict[str, Array]]:
        """(tokens, E) of the summed columns, and of those that keep the largest (-inf where not selected)."""
        gated = self.gate * self.norm
        sums = {
            "norm_sum": self.hot(self.norm),
            "norm_square_sum": self.hot(self.norm**2),
            "gated_norm_sum": self.hot(gated),
            "gated_norm_square_sum": self.hot(gated**2),
        }
        if self.cosine is not None:
            shift = np.maximum(0, 1 - self.cosine)[:, None]
            sums["shifted_gated_norm_sum"] = self.hot(shift * gated)
        largest = np.abs(self.output).max(2)
        maxima = {
            "output_max": largest,
            "gated_output_max": self.gate * largest,
            "input_max": np.abs(self.activation).max(2),
        }
        used = self.hot() > 0
        return sums, {name: np.where(used, self.hot(values), -np.inf) for name, values in maxima.items()}

    def neuron_activation(self, chosen: NDArray[np.bool_]) -> dict[str, Array]:
        """(E, I) of each column, over some tokens."""
        activation, gated = self.activation, self.gate[:, :, None] * self.activation
        parts = {
            "square_sum": activation**2,
            "absolute_sum": np.abs(activation),
            "gated_square_sum": gated**2,
            "gated_absolute_sum": np.abs(gated),
        }
        sums = {name: self._by_expert(values, chosen) for name, values in parts.items()}
        largest = np.zeros((self.num_experts, activation.shape[2]))
        for expert in range(self.num_experts):
            rows = np.abs(gated)[(self.ids == expert) & chosen[:, None]]
            largest[expert] = rows.max(0) if len(rows) else 0
        return {**sums, "gated_absolute_max": largest}

    def expert_vector(self, chosen: NDArray[np.bool_]) -> dict[str, Array]:
        """(E, channels) of each column, over some tokens."""
        inputs = np.repeat(self.hidden[:, None] ** 2, self.ids.shape[1], 1)
        largest = np.zeros((self.num_experts, self.hidden.shape[1]))
        for expert in range(self.num_experts):
            largest[expert] = np.abs(self.hidden[(self.ids == expert).any(1) & chosen]).max(0, initial=0.0)
        return {
            "input_square_sum": self._by_expert(inputs, chosen),
            "input_max": largest,
            "output_sum": self._by_expert(self.output, chosen),
            "gated_output_sum": self._by_expert(self.gate[:, :, None] * self.output, chosen),
        }

    def expert_pair(self, chosen: NDArray[np.bool_]) -> dict[str, Array]:
        """(E, E) of each column, over some tokens."""
        hot = self.hot()[chosen]
        gated = np.zeros((int(chosen.sum()), self.num_experts, self.output.shape[2]))
        for slot in range(self.ids.shape[1]):
            ids = self.ids[chosen, slot]
            used = ids >= 0
            gated[np.nonzero(used)[0], ids[used]] += (self.gate[:, slot, None] * self.output[:, slot])[chosen][used]
        columns = {"selections": hot.T @ hot, "output_products": np.einsum("tih,tjh->ij", gated, gated, optimize=True)}
        if self.logits is not None and not self.layer.traits.holds_probabilities:
            logits = self.logits[chosen, : self.num_experts]
            columns["logit_products"] = logits.T @ logits
        return columns

    def moe_output(self, chosen: NDArray[np.bool_]) -> dict[str, float]:
        """Each column, over some tokens."""
        total = self.total[chosen]
        columns = {
            "tokens": float(chosen.sum()),
            "output_square_sum": float((total**2).sum()),
            "output_max": float(np.abs(total).max()),
        }
        if self.cosine is not None and self.residual is not None:
            residual = self.residual[chosen]
            columns |= {
                "residual_tokens": float(chosen.sum()),
                "residual_square_sum": float((residual**2).sum()),
                "residual_max": float(np.abs(residual).max()),
                "cosine_sum": float(self.cosine[chosen].sum()),
            }
        return columns

    def _by_expert(self, values: Array, chosen: NDArray[np.bool_]) -> Array:
        """(E, width) sums of (tokens, k, width) values by expert, over some tokens."""
        sums = np.zeros((self.num_experts, values.shape[2]))
        token, slot = np.nonzero((self.ids >= 0) & chosen[:, None])
        np.add.at(sums, self.ids[token, slot], values[token, slot])
        return sums
