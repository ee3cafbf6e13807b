"""Small custom architectures: what a user may bring that no family of the library is like, each with its adapter.

Their experts are called one by one in plain loops, so that a reader sees what they compute; :func:`run_plainly` says it
once more, in float64, from what the experts module was called with.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from compressor.families import Adapter, ExpertKind, ExpertsLayout, read_sequences, stacked_layout

HIDDEN, WIDTH = 16, 6
EXAMPLES = Path(__file__).parents[3] / "docs" / "examples"


def example(name: str) -> ModuleType:
    """A worked example of the documentation, as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class ToyExperts(nn.Module):
    """``experts(hidden, ids, weights)``; ids of -1 are skipped."""

    def __init__(self, count: int, width: int = WIDTH) -> None:
        super().__init__()
        self.up, self.down = (
            nn.Parameter(torch.randn(count, 2 * width, HIDDEN) / 3),
            nn.Parameter(torch.randn(count, HIDDEN, width) / 2),
        )
        self.act_fn = nn.SiLU()

    def run(self, expert: int, inputs: Tensor) -> Tensor:
        """What one expert puts out, before its weight."""
        gate, up = (inputs @ self.up[expert].T).chunk(2, -1)
        output: Tensor = (self.act_fn(gate) * up) @ self.down[expert].T
        return output

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        total = torch.zeros_like(hidden)
        for expert in ids.unique().tolist():
            token, rank = torch.where(ids == expert)
            if expert >= 0:
                total.index_add_(0, token, self.run(expert, hidden[token]) * weights[token, rank, None])
        return total


class ToyRouter(nn.Module):
    """Softmax, then the k largest."""

    def __init__(self, count: int, top_k: int) -> None:
        super().__init__()
        self.weight, self.top_k = nn.Parameter(torch.randn(count, HIDDEN)), top_k

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = hidden @ self.weight.T
        weights, ids = logits.softmax(-1).topk(self.top_k)
        return logits, weights, ids


class ToyLayer(nn.Module):
    def __init__(self, experts: nn.Module, router: nn.Module) -> None:
        super().__init__()
        self.norm, self.experts, self.router = nn.LayerNorm(HIDDEN), experts, router

    def forward(self, hidden: Tensor, input_ids: Tensor) -> Tensor:
        flat = self.norm(hidden).reshape(-1, HIDDEN)
        _, weights, ids = self.router(flat)
        return hidden + self.experts(flat, ids, weights).reshape(hidden.shape)


class ToyModel(nn.Module):
    """Embeddings and layers; a layer is given the stream and the token ids."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(32, HIDDEN), nn.ModuleList(layers)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden: Tensor = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, input_ids)
        return hidden


# Zero, copy and constant experts (MoE++, arXiv 2410.07348)


class NullExperts(ToyExperts):
    """Four experts with weights, then one that puts out nothing, one its input, one a vector of its own."""

    def __init__(self) -> None:
        super().__init__(4)
        self.constant = nn.Parameter(torch.randn(HIDDEN))

    def run(self, expert: int, inputs: Tensor) -> Tensor:
        if expert < 4:
            return super().run(expert, inputs)
        return (torch.zeros_like(inputs), inputs, self.constant.expand_as(inputs))[expert - 4]


class NullLayout(ExpertsLayout):
    """A constant is the one kind that a layout has to know itself."""

    def run_expert(self, experts: Any, expert: int, inputs: Tensor) -> tuple[Tensor, Tensor]:
        if expert == 6:
            return inputs.new_zeros(len(inputs), self.width), experts.constant.to(inputs.dtype).expand_as(inputs)
        return super().run_expert(experts, expert, inputs)


def null_layout(module: Any) -> NullLayout:
    kinds: tuple[ExpertKind, ...] = ("zero", "copy", "constant")
    plain = stacked_layout("up", "down")(module)
    return NullLayout(**{**plain.__dict__, "num_experts": 7, "weightless": kinds})


def null_model() -> ToyModel:
    return ToyModel(*(ToyLayer(NullExperts(), ToyRouter(7, 3)) for _ in range(2)))


# Layers that differ: no experts, few wide ones, many narrow ones; and one with shared experts alone


class SharedLayer(nn.Module):
    """Every token passes the same expert: there is nothing to route."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.shared_expert = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, hidden: Tensor, input_ids: Tensor) -> Tensor:
        return hidden + self.shared_expert(self.norm(hidden))


def uneven_model() -> ToyModel:
    return ToyModel(
        SharedLayer(),
        ToyLayer(ToyExperts(4, 8), ToyRouter(4, 1)),
        SharedLayer(),
        ToyLayer(ToyExperts(9, 3), ToyRouter(9, 3)),
    )


# A table says for each token id which experts it goes to (hash layers, arXiv 2106.04426)


class HashLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.experts = nn.LayerNorm(HIDDEN), ToyExperts(8)
        self.register_buffer("table", torch.rand(32, 8).topk(2).indices)

    def forward(self, hidden: Tensor, input_ids: Tensor) -> Tensor:
        flat, ids = self.norm(hidden).reshape(-1, HIDDEN), self.table[input_ids.reshape(-1)]
        return hidden + self.experts(flat, ids, torch.full(ids.shape, 0.5)).reshape(hidden.shape)


def hash_model() -> ToyModel:
    return ToyModel(*(HashLayer() for _ in range(2)))


# The whole sequence goes to the same experts (Union of Experts, arXiv 2503.02495)


class SequenceExperts(ToyExperts):
    """``experts(hidden (batch, tokens, width), ids (batch, k), weights (batch, k))``."""

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        rows = [
            super(SequenceExperts, self).forward(*row)
            for row in zip(hidden, *self.spread(hidden, ids, weights), strict=True)
        ]
        return torch.stack(rows)

    @staticmethod
    def spread(hidden: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        length = hidden.shape[1]
        return ids[:, None].expand(-1, length, -1), weights[:, None].expand(-1, length, -1)


class SequenceLayer(ToyLayer):
    def forward(self, hidden: Tensor, input_ids: Tensor) -> Tensor:
        normed = self.norm(hidden)
        _, weights, ids = self.router(normed.mean(1))
        return hidden + self.experts(normed, ids, weights)


def sequence_model() -> ToyModel:
    return ToyModel(*(SequenceLayer(SequenceExperts(8), ToyRouter(8, 2)) for _ in range(2)))


# A layer may also choose the experts of its neighbours (ReXMoE, arXiv 2510.17483)


class ReusingExperts(nn.Module):
    """Chooses among the experts of several layers; ``pools`` are their modules, its own among them."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer, self.own = layer, ToyExperts(4)
        self.reach: list[tuple[int, ToyExperts]] = []  # not registered: the weights belong to the other layers

    def run(self, expert: int, inputs: Tensor) -> Tensor:
        return self.reach[expert // 4][1].run(expert % 4, inputs)

    forward = ToyExperts.forward


class ReusingLayout(ExpertsLayout):
    def up_weight(self, experts: Any, expert: int) -> Tensor:
        weight: Tensor = experts.reach[expert // 4][1].up[expert % 4]
        return weight

    def down_weight(self, experts: Any, expert: int) -> Tensor:
        weight: Tensor = experts.reach[expert // 4][1].down[expert % 4]
        return weight


def reusing_layout(module: Any) -> ReusingLayout:
    plain = stacked_layout("own.up", "own.down", activation="own.act_fn")(module)
    return ReusingLayout(**{**plain.__dict__, "num_experts": 4 * len(module.reach)})


def reusing_owners(module: Any) -> list[tuple[int, int]]:
    return [(layer, expert) for layer, _ in module.reach for expert in range(4)]


def reusing_model() -> ToyModel:
    experts = [ReusingExperts(layer) for layer in range(3)]
    for layer, module in enumerate(experts):
        module.reach = [(other, experts[other].own) for other in range(3) if abs(other - layer) <= 1]
    return ToyModel(*(ToyLayer(module, ToyRouter(4 * len(module.reach), 2)) for module in experts))


# The router remembers what it saw in the layers before (RMoE, arXiv 2408.06793)


class RecurrentRouter(nn.Module):
    """Returns logits, weights, ids and the state for the router of the next layer."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.weight = nn.GRUCell(HIDDEN, HIDDEN), nn.Parameter(torch.randn(8, HIDDEN))

    def forward(self, hidden: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        state = self.cell(hidden, state)
        logits = state @ self.weight.T
        weights, ids = logits.softmax(-1).topk(2)
        return logits, weights, ids, state


class RecurrentModel(ToyModel):
    def __init__(self) -> None:
        super().__init__(*(ToyLayer(ToyExperts(8), RecurrentRouter()) for _ in range(3)))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden: Tensor = self.embed(input_ids)
        state = torch.zeros(input_ids.numel(), HIDDEN)
        for layer in self.layers:
            flat = layer.norm(hidden).reshape(-1, HIDDEN)
            _, weights, ids, state = layer.router(flat, state)
            hidden = hidden + layer.experts(flat, ids, weights).reshape(hidden.shape)
        return hidden


# Experts of two kinds in one layer, and a second round through both


class TwiceLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.near, self.far = (ToyLayer(ToyExperts(count), ToyRouter(count, 2)) for count in (4, 6))

    def forward(self, hidden: Tensor, input_ids: Tensor) -> Tensor:
        for _ in range(2):
            hidden = self.far(self.near(hidden, input_ids), input_ids)
        return hidden


def twice_model() -> ToyModel:
    return ToyModel(*(TwiceLayer() for _ in range(2)))


@dataclass(frozen=True)
class Toy:
    """A model, the adapters that it needs, and its experts class as the tests know it."""

    build: Callable[[], nn.Module]
    adapters: dict[str, Adapter]


PLAIN = Adapter(stacked_layout("up", "down"))
TOYS: dict[str, Toy] = {
    "null": Toy(null_model, {"NullExperts": Adapter(null_layout)}),
    "uneven": Toy(uneven_model, {"ToyExperts": PLAIN}),
    "hash": Toy(hash_model, {"ToyExperts": PLAIN}),
    "sequence": Toy(
        sequence_model,
        {"SequenceExperts": Adapter(stacked_layout("up", "down"), read=read_sequences, granularity="sequence")},
    ),
    "reusing": Toy(reusing_model, {"ReusingExperts": Adapter(reusing_layout, owners=reusing_owners)}),
    "recurrent": Toy(RecurrentModel, {"ToyExperts": PLAIN}),
    "twice": Toy(twice_model, {"ToyExperts": PLAIN}),
}


@torch.no_grad()
def run_plainly(experts: Any, hidden: Tensor, ids: Tensor) -> Tensor:
    """(tokens, k, hidden) in float64: what each selected expert puts out, before its weight."""
    double = copy.deepcopy(experts).double()
    for _, other in getattr(double, "reach", ()):
        other.double()  # not registered, so the copy's type did not reach them
    outputs = torch.zeros(*ids.shape, HIDDEN, dtype=torch.float64)
    for token in range(ids.shape[0]):
        for rank in range(ids.shape[1]):
            if ids[token, rank] >= 0:
                outputs[token, rank] = double.run(int(ids[token, rank]), hidden[token : token + 1].double())[0]
    return outputs
