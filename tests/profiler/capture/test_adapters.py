"""An adapter as docs/adapters.md writes it makes an unknown family watchable, and a wrong one is found out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import profiler
import store
from compressor.families import ADAPTERS
from moescope.errors import ModelError

PAGE = Path(__file__).parents[3] / "docs" / "adapters.md"


class AcmeExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wi, self.wo = nn.Parameter(torch.randn(4, 12, 8)), nn.Parameter(torch.randn(4, 8, 6))

    def _apply_gate(self, inner: Tensor) -> Tensor:
        gate, up = inner.chunk(2, -1)
        return gate.relu() * up

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        inner = self._apply_gate(torch.einsum("tkoh,th->tko", self.wi[ids], hidden))
        return torch.einsum("tkhi,tki,tk->th", self.wo[ids], inner, weights)


class AcmeRouter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(8, 4)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.projection(hidden)
        weights, ids = logits.softmax(-1).topk(2)
        return logits, weights, ids


class AcmeLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = AcmeRouter(), AcmeExperts()

    def forward(self, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, 8)
        _, weights, ids = self.router(flat)
        return hidden + self.experts(flat, ids, weights).reshape(hidden.shape)


class AcmeModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(16, 8), nn.ModuleList(AcmeLayer() for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


@pytest.fixture
def adapters() -> Iterator[dict[str, Any]]:
    before = dict(ADAPTERS)
    yield ADAPTERS
    ADAPTERS.clear()
    ADAPTERS.update(before)


def watched(model: nn.Module, folder: Path) -> store.Run:
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        bare = model(ids)
        with profiler.watch(model, store=folder, name="acme", level="activations") as session:
            assert torch.equal(model(ids), bare)
    assert "forward" not in model.layers[0].experts.__dict__
    assert session.path is not None
    return store.open_run(session.path)


def test_the_example_of_the_page_works(adapters: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AcmeModel()
    with pytest.raises(ModelError, match=r"layer 0, layers\.0\.experts \(AcmeExperts\) cannot be watched"):
        profiler.find_moe_layers(model)
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    exec(block, {})
    run = watched(model, tmp_path)
    assert run.badge.status == "valid", run.badge.reason
    assert run.table("expert_output")["tokens"].sum() == 2 * 12 * 2
    assert run.info.backend == "eager"


def test_a_wrong_layout_is_found_out(adapters: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
    adapters["AcmeExperts"] = lambda module: replace(names["acme"](module), up_name="wrong")
    model = AcmeModel()
    for layer in model.layers:
        layer.experts.wrong = nn.Parameter(layer.experts.wi.detach().flip(1))
    run = watched(model, tmp_path)
    assert run.badge.status == "invalid"
    assert "output recomputed" in run.badge.reason
