"""A top-p router: each token takes as many experts as it needs to reach a part p of the router probability.

The experts are modules of their own here, and the block that holds them returns more than their sum. ``python
docs/examples/top_p_router.py`` records a toy and prints how many experts its tokens took.
"""

from __future__ import annotations

import tempfile

import torch
from torch import Tensor, nn

import profiler
import store
from compressor.families import ADAPTERS, Adapter, read_router, separate_layout


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(16, 6, bias=False), nn.Linear(16, 6, bias=False)
        self.down_proj, self.act_fn = nn.Linear(6, 16, bias=False), nn.GELU()

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))
        return output


class TopPRouter(nn.Module):
    """Returns logits, weights and ids; ids beyond the part p are -1, and their weights 0."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.p = nn.Parameter(torch.randn(8, 16) / 4), 0.6

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = hidden @ self.weight.T
        weights, ids = logits.softmax(-1).sort(descending=True)
        wanted = weights.cumsum(-1) - weights < self.p
        return logits, weights * wanted, ids.where(wanted, -1)


class TopPBlock(nn.Module):
    """Returns what it added to the stream, and how many experts it took for it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.router = 8, TopPRouter()
        self.experts = nn.ModuleList(Expert() for _ in range(8))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        flat = hidden.reshape(-1, 16)
        _, weights, ids = self.router(flat)
        total = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, rank = torch.where(ids == number)
            total.index_add_(0, token, expert(flat[token]) * weights[token, rank, None])
        return total.view(hidden.shape), (ids >= 0).sum()


class TopPLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(16), TopPBlock()

    def forward(self, hidden: Tensor) -> Tensor:
        added, _ = self.mlp(self.norm(hidden))
        return hidden + added


class TopPModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(32, 16), nn.ModuleList(TopPLayer() for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden: Tensor = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


# All that the profiler has to be told. The block asks its router itself, so that is where the selection is read.
ADAPTERS["TopPBlock"] = Adapter(
    separate_layout("up_proj", "down_proj", "gate_proj", expert="experts.{}"), read=read_router, may_skip=True
)


if __name__ == "__main__":
    torch.manual_seed(0)
    model = TopPModel()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        with profiler.watch(model, store=folder, name="top-p", level="activations") as session:
            model(torch.randint(32, (4, 20)))
        assert session.path is not None
        run = store.open_run(session.path)
        print(run.badge)
        taken = (run.selections().ids >= 0).sum(-1)
        print({count: int((taken == count).sum()) for count in range(1, 9)})
