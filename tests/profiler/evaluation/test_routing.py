"""Agreement of the routing against brute force, with dropped, merged and filled-up experts and dropped layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compressor.load import load
from compressor.memory import edit
from compressor.plan import experts_after
from moescope.errors import ModelError
from profiler.capture.discovery import inspect_model
from profiler.evaluation import evaluate
from profiler.evaluation.routing import Routing, RoutingCounts, SelectionReader
from tests.compressor.edit_plans import source
from tests.compressor.edited_models import merging
from tests.profiler.capture.tiny import CALLED_OTHERWISE, FAST, build, recorded_calls
from tests.profiler.evaluation.test_distribution import damaged
from tests.profiler.test_evaluate import batches

Selected = dict[int, list[dict[int, list[set[int]]]]]
"""Layer -> per batch: sequence -> the experts of each real token."""


def selected(model: Any) -> Selected:
    """What plain hooks write down."""
    found: Selected = {}
    for batch in batches():
        with recorded_calls(model) as calls, torch.no_grad():
            model(input_ids=torch.from_numpy(batch.input_ids), attention_mask=torch.from_numpy(batch.attention_mask))
        for entry in calls:
            ids = entry.ids[0].view(*batch.input_ids.shape, -1)
            rows = {
                int(sequence): [set(ids[row, place].tolist()) for place in np.flatnonzero(batch.attention_mask[row])]
                for row, sequence in enumerate(batch.sequences)
            }
            found.setdefault(entry.layer.layer, []).append(rows)
    return found


def brute_force(
    model: Selected, base: Selected, kept: Mapping[int, Sequence[Sequence[int]]], layers: Sequence[int]
) -> dict[int, tuple[int, int, int]]:
    """Layer of the base -> selections, agreed, gone; token by token and expert by expert."""
    result = {}
    for layer in base:
        if layer not in layers:
            continue
        total = agreed = gone = 0
        left = {expert for members in kept[layer] for expert in members}
        for before, after in zip(base[layer], model[layers.index(layer)], strict=True):
            for sequence, tokens in before.items():
                for one, other in zip(tokens, after[sequence], strict=True):
                    reached = {expert for new in other if new < len(kept[layer]) for expert in kept[layer][new]}
                    total += len(one)
                    agreed += len(one & reached)
                    gone += len(one - left)
        result[layer] = total, agreed, gone
    return result


def measured(model: Any, base: Any, **plan: Any) -> Routing:
    found = evaluate(model, base, batches, skip=["generation", "probes", "speed"], **plan)
    assert found.routing is not None, found.notes
    return found.routing


def assert_counts(found: Routing, expected: dict[int, tuple[int, int, int]]) -> None:
    for (layer, _), part in found.layers.items():
        total, agreed, gone = expected[layer]
        assert part.selections == total
        assert part.agreement.value == pytest.approx(agreed / total)
        assert part.forced.value == pytest.approx(gone / total)
        assert part.free.value == pytest.approx((total - gone - agreed) / (total - gone))
    assert len(found.layers) == len(expected)
    sums = np.sum(list(expected.values()), axis=0)
    assert found.whole.agreement.value == pytest.approx(sums[1] / sums[0])
    assert sum(part.selections for part in found.domains.values()) == sums[0]


def without_experts(base: Any, kept: Sequence[int]) -> Any:
    """OLMoE with only these experts in every layer, in this order."""
    model = build("olmoe", num_experts=len(kept))
    state = base.state_dict()
    for name, tensor in state.items():
        if ".experts." in name or name.endswith("mlp.gate.weight"):
            state[name] = tensor[list(kept)]
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("family", [name for name in FAST if name not in CALLED_OTHERWISE])
def test_all_experts_are_there(family: str) -> None:
    base = build(family)
    model = damaged(base, strength=0.3)
    first = selected(base)
    kept = {layer: [[expert] for expert in range(64)] for layer in first}
    found = measured(model, base)
    assert_counts(found, brute_force(selected(model), first, kept, sorted(range(64))))
    assert found.whole.forced.value == 0 and 0 < found.whole.agreement.value < 1


def test_a_model_routes_as_itself() -> None:
    for family in ("olmoe", "llama4_text", "zaya"):
        model = build(family)
        found = measured(model, model)
        assert found.whole.agreement.value == 1.0
        assert found.whole.forced.value == found.whole.free.value == 0.0


def test_dropped_experts() -> None:
    base = build("olmoe")
    experts = base.config.num_experts
    left = [expert for expert in range(experts) if expert not in (1, 4)][::-1]
    model = without_experts(base, left)
    kept = {layer: [[expert] for expert in left] for layer in range(base.config.num_hidden_layers)}
    found = measured(model, base, kept={(layer, 0): members for layer, members in kept.items()})
    expected = brute_force(selected(model), selected(base), kept, list(kept))
    assert_counts(found, expected)
    assert found.whole.forced.value > 0
    # The first layer's input has not changed: what is still there and was chosen is chosen again.
    assert found.layers[0, 0].free.value == 0.0


def test_merged_experts_and_those_that_fill_up() -> None:
    base = build("olmoe")
    experts = base.config.num_experts
    model = damaged(base, strength=0.2)
    members = [[expert, (expert + 3) % experts] for expert in range(experts - 1)]  # the last one only fills up
    kept = dict.fromkeys(range(base.config.num_hidden_layers), members)
    found = measured(model, base, kept={(layer, 0): one for layer, one in kept.items()})
    assert_counts(found, brute_force(selected(model), selected(base), kept, list(kept)))


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
def test_merged_experts_whose_router_rows_stay(family: str, tmp_path: Path) -> None:
    base, model = build(family), build(family)
    plan = merging(source(model), [(1, 2, 5), (0, 6)], form="shared")
    edit(model, plan)
    model.save_pretrained(tmp_path)
    kept = {key: [expert.members for expert in experts] for key, experts in experts_after(plan).items()}
    members = {layer: experts for (layer, _), experts in kept.items()}
    everyone = list(range(len(inspect_model(base).stack)))
    for merged in (model, load(tmp_path)):
        found = measured(merged, base, kept=kept)
        assert_counts(found, brute_force(selected(merged), selected(base), members, everyone))
        first, *others = sorted(found.layers)
        # The first layer chooses as before, and whoever was chosen is a part of what runs.
        assert found.layers[first].agreement.value == 1.0 > found.layers[others[0]].agreement.value
        assert found.whole.forced.value == 0.0


def test_dropped_layers() -> None:
    base = build("olmoe", num_hidden_layers=4)
    model = build("olmoe", num_hidden_layers=3)
    layers = [0, 2, 3]
    state = {
        name: base.state_dict()[name.replace(f"layers.{new}.", f"layers.{old}.")]
        for new, old in enumerate(layers)
        for name in model.state_dict()
        if f"layers.{new}." in name
    }
    model.load_state_dict(state, strict=False)
    kept = {layer: [[expert] for expert in range(base.config.num_experts)] for layer in range(4)}
    found = measured(model, base, kept_layers=layers)
    assert found.dropped == [1]
    assert_counts(found, brute_force(selected(model), selected(base), kept, layers))


def test_what_does_not_fit() -> None:
    base = build("olmoe")
    reader = SelectionReader(base)
    fewer = SelectionReader(build("olmoe", num_experts=5))
    with pytest.raises(ModelError, match="layer 0 has 8 experts in the base and 5 in the model: without its plan"):
        RoutingCounts(fewer, reader)
    with pytest.raises(ModelError, match="has no expert 9"):
        RoutingCounts(reader, reader, kept={(0, 0): [[9]]})
    with pytest.raises(ModelError, match="has 5 experts, its plan 6"):
        RoutingCounts(fewer, reader, kept={(0, 0): [[expert] for expert in range(6)]})
    shallow = SelectionReader(build("olmoe", num_hidden_layers=1))
    with pytest.raises(ModelError, match="has 1 decoder layers where 4 of the base's are left"):
        RoutingCounts(shallow, reader)
    found = evaluate(
        fewer_model := build("olmoe", num_experts=5), base, batches, skip=["generation", "probes", "speed"]
    )
    assert found.routing is None and "Routing was not compared: layer 0 has 8 experts" in found.notes[0]
    assert found.divergence.kl > 0 and fewer_model is not base


def test_nothing_stays_behind() -> None:
    model = build("olmoe")
    measured(model, model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    from profiler.capture import tap

    assert not tap._watchers and not tap._installed
