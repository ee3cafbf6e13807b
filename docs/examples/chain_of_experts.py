"""Chain-of-Experts: a layer calls the same experts twice, each time with a router of its own.

``python docs/examples/chain_of_experts.py`` records a toy and prints who was used in which step.
"""

from __future__ import annotations

import tempfile

import torch
from torch import Tensor, nn

import profiler
import store
from compressor.families import ADAPTERS, Adapter, stacked_layout


class ChainExperts(nn.Module):
    """Eight small experts: up (8, 12, 16) holds gate and up, down (8, 16, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(8, 12, 16) / 4), nn.Parameter(torch.randn(8, 16, 6) / 3)
        self.act_fn = nn.SiLU()

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        gate, up = torch.einsum("tkih,th->tki", self.up[ids], hidden).chunk(2, -1)
        return torch.einsum("tkhi,tki,tk->th", self.down[ids], self.act_fn(gate) * up, weights)


class ChainRouter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.top_k = nn.Parameter(torch.randn(8, 16)), 2

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = hidden @ self.weight.T
        weights, ids = logits.softmax(-1).topk(self.top_k)
        return logits, weights, ids


class ChainLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.experts = nn.LayerNorm(16), ChainExperts()
        self.routers = nn.ModuleList(ChainRouter() for _ in range(2))

    def forward(self, hidden: Tensor) -> Tensor:
        steps = self.norm(hidden).reshape(-1, 16)
        for router in self.routers:
            _, weights, ids = router(steps)
            steps = steps + self.experts(steps, ids, weights)
        return hidden + steps.view(hidden.shape)


class ChainModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(32, 16), nn.ModuleList(ChainLayer() for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden: Tensor = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


# All that the profiler has to be told.
ADAPTERS["ChainExperts"] = Adapter(stacked_layout("up", "down"), routers=("routers",))


if __name__ == "__main__":
    torch.manual_seed(0)
    model = ChainModel()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        with profiler.watch(model, store=folder, name="chain", level="activations") as session:
            model(torch.randint(32, (4, 20)))
        assert session.path is not None
        run = store.open_run(session.path)
        print(run.badge)
        print(run.table("expert_load").sort("layer", "step", "expert").select("layer", "step", "expert", "tokens"))
