"""What the figures of benchmarks rest on, where nothing else would notice an error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.checks.stun import left_of, pruned, wanda_mask
from profiler import load_model
from profiler.capture.discovery import find_moe_layers
from sample_data import MODEL


def rows_by_hand(weight: Tensor, norms: Tensor, kept: list[int]) -> list[set[int]]:
    """The columns that each row keeps."""
    found = []
    for row, count in zip(weight.tolist(), kept, strict=True):
        scores = [abs(value) * norm for value, norm in zip(row, norms.tolist(), strict=True)]
        found.append(set(sorted(range(len(row)), key=lambda column: -scores[column])[:count]))
    return found


def test_wanda_keeps_the_largest_of_each_row() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, norms = torch.randn(20, 33, generator=generator), torch.rand(33, generator=generator)
    kept = torch.randint(0, 34, (20,), generator=generator)
    mask = wanda_mask(weight, norms, kept)
    assert [set(row.nonzero()[:, 0].tolist()) for row in mask] == rows_by_hand(weight, norms, kept.tolist())


@pytest.mark.parametrize("sparsity", [0.4, 0.65])
def test_as_many_weights_are_left_as_was_asked_for_and_all_come_back(sparsity: float) -> None:
    model = load_model(MODEL, dtype="float32", device="cpu")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    whole = sum(tensor.numel() for layer in find_moe_layers(model) for tensor in layer.experts.parameters())
    with pruned(model, {}, left_of(model, sparsity)) as count:
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert count / whole == pytest.approx(1 - sparsity, abs=1e-5)
        assert changed and all(".experts." in name for name in changed)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
