"""Merging in memory: which row stays, and what copies of an expert come to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from compressor.edits.moments import LayerMoments
from compressor.memory import edited
from profiler.capture.discovery import inspect_model
from tests.compressor.edit_plans import dropping, selection_bias, source
from tests.compressor.edited_models import merging, near, run
from tests.profiler.capture.tiny import build


def test_nearest_keeps_one_member_as_it_is() -> None:
    model = build("olmoe")
    known = source(model)
    with edited(model, merging(known, [(2, 5, 6)], method="nearest")):
        found = run(model)
        kept = [layer.experts.down_proj[2].clone() for layer in inspect_model(model).layers]
    gone = {}
    for layer, down in zip(inspect_model(model).layers, kept, strict=True):
        member = next(number for number in (2, 5, 6) if torch.equal(layer.experts.down_proj[number], down))
        gone[layer.layer] = sorted({2, 5, 6} - {member})
    with edited(model, dropping(model, gone)):
        # It stands in the lead's place, which only orders the sum.
        near(run(model), found)


def test_a_subspace_of_all_directions_is_the_average() -> None:
    model = build("mixtral")
    known = source(model)
    shape = known.layers[0]
    moments = {
        entry.key: LayerMoments(torch.eye(known.expert_size), torch.ones(shape.num_experts, shape.width))
        for entry in known.layers
    }
    with edited(model, merging(known, [(1, 4)])):
        wanted = run(model)
    with edited(model, merging(known, [(1, 4)], method="subspace", rank=known.expert_size), moments=moments):
        near(run(model), wanted)
    with edited(model, merging(known, [(1, 4)], method="subspace", rank=2), moments=moments):
        assert float((run(model) - wanted).abs().max()) > 1e-3


@torch.no_grad()
def duplicate(model: nn.Module, expert: int, copied: int, *, shuffled: bool = False) -> nn.Module:
    """The model with ``copied`` a copy of ``expert`` in every layer, with the same router row; its neurons shuffled."""
    for layer in inspect_model(model).layers:
        assert layer.layout is not None and layer.router is not None
        order = torch.randperm(layer.layout.width) if shuffled else torch.arange(layer.layout.width)
        for name in ("gate_up_proj", "gate_up_proj_bias"):
            tensor = getattr(layer.experts, name, None)
            if tensor is not None:
                whole = tensor[expert].T if layer.layout.transposed and tensor.ndim == 3 else tensor[expert]
                gate, up = layer.layout.split_gate(whole.clone())
                assert gate is not None
                gate, up = gate[order], up[order]
                new = torch.stack([gate, up], 1).flatten(0, 1) if layer.layout.interleaved else torch.cat([gate, up])
                tensor[copied] = new.T if layer.layout.transposed and tensor.ndim == 3 else new
        layer.layout.down_weight(layer.experts, copied)[:] = layer.layout.down_weight(layer.experts, expert)[:, order]
        if layer.layout.biased:
            layer.experts.down_proj_bias[copied] = layer.experts.down_proj_bias[expert]
        layer.router.weight[copied] = layer.router.weight[expert]
        bias = selection_bias(layer)
        if bias is not None:
            bias[..., copied] = bias[..., expert]
    return model


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "minimax_m2"])
@pytest.mark.parametrize("method", ["average", "aligned", "nearest"])
def test_merging_a_copy_that_is_never_selected_changes_nothing(family: str, method: str) -> None:
    # One copy in each group of the router, so that the groups stay as large as each other.
    model = duplicate(duplicate(build(family), 1, 2, shuffled=method == "aligned"), 6, 5, shuffled=method == "aligned")
    with torch.no_grad():
        for layer in inspect_model(model).layers:
            bias = selection_bias(layer)
            assert bias is not None
            bias[..., [2, 5]] = -1e4
    wanted = run(model)
    with edited(model, merging(source(model), [(1, 2), (6, 5)], method=method)):
        near(run(model), wanted)


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral"])
def test_merging_copies_changes_nothing_where_one_expert_has_all_the_weight(family: str) -> None:
    model = duplicate(build(family, num_experts_per_tok=1), 1, 4)
    with edited(model, merging(source(model), [(1, 4)], router="mean")):
        found = run(model)
    near(found, run(model))


def test_merging_copies_changes_places_and_weights_elsewhere() -> None:
    # What average.py says of it, read off the router: 2 p becomes p / (1 - p), and a place comes free.
    model = duplicate(build("olmoe"), 1, 4)
    router: Any = inspect_model(model).layers[0].router
    tokens = torch.randn(200, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits, before, chosen = router(tokens)
    both = (chosen == 1).any(1) & (chosen == 4).any(1)
    share = logits.softmax(-1)[both, 1]
    assert int(both.sum()) > 10
    torch.testing.assert_close(before[both].sum(1), 2 * share, rtol=0, atol=1e-6)
    wanted = run(model)
    with edited(model, merging(source(model), [(1, 4)])), torch.no_grad():
        _, weights, chosen = router(tokens)
        place = chosen[both] == 1
        torch.testing.assert_close(weights[both][place], share / (1 - share), rtol=1e-5, atol=1e-6)
        assert bool((place.sum(1) == 1).all())
        assert float((run(model) - wanted).abs().max()) > 1e-2 * float(wanted.abs().max())
