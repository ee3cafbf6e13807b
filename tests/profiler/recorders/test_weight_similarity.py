"""Similarity of experts' weights against loops over single experts, in every layout."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from numpy.typing import NDArray
from torch import nn

import store
from compressor.families.separate import separate_layout
from profiler.capture.discovery import find_moe_layers
from profiler.capture.levels import RecordingOptions
from profiler.capture.session import WatchSession
from profiler.recorders import weight_similarity
from profiler.recorders.weight_similarity import WeightSimilarityRecorder, affordable_pairs, compare_weights
from tests.profiler.capture.tiny import batch, build


def _weights(layer: Any, expert: int) -> dict[str, NDArray[np.float64]]:
    """(neurons, hidden) matrices of one expert, straight from the module's tensors."""
    experts, layout = layer.experts, layer.layout
    first = getattr(experts, layout.up_name)[expert].detach().double().numpy()
    down = getattr(experts, layout.down_name)[expert].detach().double().numpy()
    if layout.transposed:
        first, down = first.T, down.T
    width = layout.width
    if not layout.gated:
        return {"up": first, "down": down.T}
    gate, up = (first[::2], first[1::2]) if layout.interleaved else (first[:width], first[width:])
    return {"gate": gate, "up": up, "down": down.T}


def _cosine(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    return float((one * other).sum() / np.linalg.norm(one) / np.linalg.norm(other))


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "mixtral", "deepseek_v3", "nemotron_h"])
def test_cosines_equal_loops_over_experts(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_similarity, "MAX_VALUES", 3 * 8 * 64 * 5)  # five neurons at a time
    for layer in find_moe_layers(build(family)):
        every = [_weights(layer, expert) for expert in range(layer.num_experts)]
        with torch.no_grad():
            found, _ = compare_weights(layer)
        assert list(found) == [*every[0], "all"]
        for i in range(layer.num_experts):
            for j in range(layer.num_experts):
                for name in every[0]:
                    one, other = every[i][name], every[j][name]
                    assert found[name]["cosine"][i, j] == pytest.approx(_cosine(one, other), abs=1e-5)
                    means = _cosine(one.mean(0), other.mean(0))
                    assert found[name]["mean_cosine"][i, j] == pytest.approx(means, abs=1e-5)
                whole = [np.concatenate(list(every[k].values())) for k in (i, j)]
                assert found["all"]["cosine"][i, j] == pytest.approx(_cosine(*whole), abs=1e-5)


def _toy(experts: int, width: int, hidden: int = 5, seed: int = 0) -> Any:
    """A layer of separate experts."""
    torch.manual_seed(seed)

    def expert() -> nn.Module:
        module = nn.Module()
        module.gate, module.up = nn.Linear(hidden, width, bias=False), nn.Linear(hidden, width, bias=False)
        module.down = nn.Linear(width, hidden, bias=False)
        return module

    module: Any = nn.ModuleList(expert() for _ in range(experts))
    module.num_experts = experts
    layout = separate_layout("up", "down", "gate")(module)
    return SimpleNamespace(experts=module, layout=layout, num_experts=experts, key=(0, 0), layer=0, step=0, name="toy")


def test_matching_is_the_best_of_all_orders() -> None:
    layer = _toy(3, 4)
    with torch.no_grad():
        found, matched = compare_weights(layer)
    assert matched == 3
    whole = []
    for expert in layer.experts:
        parts = [expert.gate.weight, expert.up.weight, expert.down.weight.T]
        whole.append(torch.cat(parts, 1).detach().double().numpy())
    for i in range(3):
        for j in range(i):
            directions = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (whole[i], whole[j])]
            orders = [list(order) for order in permutations(range(4))]
            best = max(orders, key=lambda order: float((directions[0] * directions[1][order]).sum()))
            assert found["all"]["matched_cosine"][i, j] == pytest.approx(_cosine(whole[i], whole[j][best]), abs=1e-5)
            gate = _cosine(whole[i][:, :5], whole[j][best][:, :5])
            assert found["gate"]["matched_cosine"][i, j] == pytest.approx(gate, abs=1e-5)
            assert found["gate"]["matched_cosine"][j, i] == pytest.approx(gate, abs=1e-5)


def test_an_expert_with_shuffled_neurons_is_the_same_expert() -> None:
    layer = _toy(4, 16)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name in ("gate", "up"):
            getattr(layer.experts[3], name).weight.copy_(getattr(layer.experts[1], name).weight[order])
        layer.experts[3].down.weight.copy_(layer.experts[1].down.weight[:, order])
        found, _ = compare_weights(layer)
    for matrix in ("gate", "up", "down", "all"):
        assert found[matrix]["matched_cosine"][1, 3] == pytest.approx(1.0, abs=1e-5)
        assert found[matrix]["mean_cosine"][1, 3] == pytest.approx(1.0, abs=1e-5)
        assert abs(found[matrix]["cosine"][1, 3]) < 0.5
        assert found[matrix]["matched_cosine"][0, 2] < 0.9
        assert_allclose(np.diag(found[matrix]["matched_cosine"]), 1.0, rtol=1e-6)


def test_matching_keeps_its_bound_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = _toy(6, 4)
    with torch.no_grad():  # 4 is nearest to 1, and 5 to 2
        for near, far in ((4, 1), (5, 2)):
            for name in ("gate", "up", "down"):
                getattr(layer.experts[near], name).weight.copy_(getattr(layer.experts[far], name).weight)
    monkeypatch.setattr(weight_similarity, "MATCH_OPERATIONS", 2.5 * (2 * 4**2 * 15 + 10 * 4**3))
    assert affordable_pairs(layer) == 2
    recorder = WeightSimilarityRecorder()
    recorder.update(layer)
    recorder.update(layer)  # which has been seen
    table = recorder.drain()["expert_weight_similarity"].filter(matrix="all").sort("expert")
    found = np.array(table["matched_cosine"].to_list())
    pairs = {(i, j) for i in range(6) for j in range(i) if np.isfinite(found[i, j])}
    assert pairs == {(4, 1), (5, 2)}
    assert np.isfinite(np.array(table["cosine"].to_list())).all()
    assert recorder.drain() == {}
    (row,) = recorder.checks()
    assert row.status == "skipped"
    assert "matched for 2 of 15 pairs" in row.detail


def test_weights_that_cannot_be_read_are_left_out() -> None:
    layer = _toy(3, 4)
    layer.experts.to("meta")
    recorder = WeightSimilarityRecorder()
    recorder.update(layer)
    assert recorder.drain() == {}
    assert "not in memory" in recorder.checks()[0].detail


def test_shards_hold_each_layer_once(tmp_path: Path) -> None:
    model = build("qwen2_moe")
    options = RecordingOptions(levels=("routing", "similarity"))
    with torch.no_grad(), WatchSession(model, name="tiny", directory=tmp_path, options=options) as session:
        for seed in range(2):
            model(**batch(seed=seed))
            session.flush()
    assert session.path is not None
    run = store.open_run(session.path)
    table = run.table("expert_weight_similarity")
    assert table.group_by("layer", "matrix").len()["len"].unique().to_list() == [8]
    for layer in find_moe_layers(model):
        with torch.no_grad():
            found, _ = compare_weights(layer)
        rows = table.filter(layer=layer.layer, matrix="down").sort("expert")
        assert_allclose(np.array(rows["matched_cosine"].to_list()), found["down"]["matched_cosine"], rtol=1e-6)
