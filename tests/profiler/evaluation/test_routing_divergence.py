"""The divergence of routers over the likeliest experts, against plain loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from compressor.memory import edited
from profiler.capture.discovery import inspect_model
from profiler.evaluation import evaluate
from profiler.evaluation.report import document
from profiler.evaluation.router_shift import token_divergence
from profiler.evaluation.routing import Routing
from tests.compressor.edit_plans import dropping, source
from tests.compressor.edited_models import merging
from tests.profiler.capture.tiny import build, recorded_calls
from tests.profiler.evaluation.test_distribution import damaged
from tests.profiler.test_evaluate import batches


def measured(model: Any, base: Any, **plan: Any) -> Any:
    return evaluate(model, base, batches, skip=["generation", "probes", "speed"], **plan)


def routing(model: Any, base: Any, **plan: Any) -> Routing:
    found = measured(model, base, **plan).routing
    assert found is not None
    return found


def written(result: Any) -> Any:
    """The document's part on routing."""
    return document(result, model={}, base={}, data={})["routing"]


def router_logits(model: Any) -> dict[int, NDArray[np.float64]]:
    """Layer -> (real tokens of all batches, E), by plain hooks."""
    found: dict[int, list[NDArray[np.float64]]] = {}
    for batch in batches():
        real = torch.from_numpy(batch.attention_mask == 1).flatten()
        with recorded_calls(model) as calls, torch.no_grad():
            model(input_ids=torch.from_numpy(batch.input_ids), attention_mask=torch.from_numpy(batch.attention_mask))
        for one in calls:
            logits = one.logits[0].detach().double().reshape(len(real), -1)
            found.setdefault(one.layer.layer, []).append(logits[real].numpy())
    return {layer: np.concatenate(parts) for layer, parts in found.items()}


def by_hand(before: NDArray[np.float64], after: NDArray[np.float64], count: int, score: str) -> float:
    """Mean over tokens of sum p ln(p / q) over the ``count`` likeliest experts of p, both made to sum to 1."""
    total = 0.0
    for one, other in zip(before, after, strict=True):
        squash = (lambda row: np.exp(row - row.max())) if score == "softmax" else (lambda row: 1 / (1 + np.exp(-row)))
        p, q = squash(one), squash(other)
        top = sorted(range(len(p)), key=lambda expert: -p[expert])[:count]
        p, q = p[top] / sum(p[top]), q[top] / sum(q[top])
        total += sum(a * np.log(a / b) for a, b in zip(p, q, strict=True))
    return total / len(before)


@pytest.mark.parametrize(
    ("family", "score"), [("olmoe", "softmax"), ("mixtral", "softmax"), ("deepseek_v3", "sigmoid")]
)
def test_every_layer_by_hand(family: str, score: str) -> None:
    base = build(family)
    model = damaged(base, strength=0.3)
    found, first, second = routing(model, base), router_logits(base), router_logits(model)
    assert {layer for layer, _ in found.divergence} == set(first)
    for layer in inspect_model(base).layers:
        wanted = by_hand(first[layer.layer], second[layer.layer], layer.top_k, score)
        part = found.divergence[layer.key]
        assert part.value == pytest.approx(wanted, rel=1e-4, abs=1e-9) and part.low <= part.value <= part.high
    assert max(part.value for part in found.divergence.values()) > 1e-4


@pytest.mark.parametrize(("ratio", "count"), [(0.0, 2), (0.5, 5), (1.0, 8)])
def test_more_experts_count_on_demand(ratio: float, count: int) -> None:
    (layer, *_) = inspect_model(build("mixtral")).layers
    assert (layer.top_k, layer.num_experts) == (2, 8)
    draw = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 6, 8, generator=draw, dtype=torch.float64)
    found = token_divergence(layer, first, second, [[expert] for expert in range(8)], ratio)
    assert found is not None
    assert float(found.mean()) == pytest.approx(by_hand(first.numpy(), second.numpy(), count, "softmax"), rel=1e-9)


def test_a_model_does_not_differ_from_itself() -> None:
    for family in ("olmoe", "gpt_oss", "zaya"):
        model = build(family)
        assert all(part.value == 0.0 for part in routing(model, model).divergence.values())


def test_dropped_experts_are_left_out_and_merged_ones_not_known() -> None:
    base, model = build("olmoe"), build("olmoe")
    layers = [shape.layer for shape in source(model).layers]
    gone = {layer: [1, 4] for layer in layers}
    left = [[expert] for expert in range(8) if expert not in (1, 4)]
    with edited(model, dropping(model, gone, form="uniform")):
        found = routing(model, base, kept={(layer, 0): left for layer in layers})
    # The first router sees what it saw, and its rows are those of the experts that are left.
    assert found.divergence[layers[0], 0].value == pytest.approx(0.0, abs=1e-9)
    assert found.divergence[layers[1], 0].value > 0
    plan = merging(source(model), [(1, 2)], form="uniform")
    merged = [[0], [1, 2], *([expert] for expert in range(3, 8))]
    with edited(model, plan):
        result = measured(model, base, kept={(layer, 0): merged for layer in layers})
    assert result.routing.divergence == {}
    assert [row["kl"] for row in written(result)["layers"]] == [None] * len(layers)


def test_the_document_has_it() -> None:
    base = build("olmoe")
    result = measured(damaged(base, strength=0.3), base)
    for row in written(result)["layers"]:
        assert row["kl"]["value"] == pytest.approx(result.routing.divergence[row["layer"], row["step"]].value)
