"""Route steps of plans: what is refused, what becomes of them, and that files, memory and loading mean the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import compressor
from compressor.exporters import EXPORTERS
from compressor.memory import edited
from compressor.plan import (
    DropLayer,
    DropStep,
    MergeGroup,
    MergeLayer,
    MergeStep,
    Plan,
    RouteLayer,
    RouteStep,
    differences,
    route_after,
)
from compressor.routing import TopK, rerouted
from moescope.errors import ModelError, PlanError
from profiler.capture.loading import load_model
from profiler.stream.skeleton import build_skeleton
from tests.compressor import planned
from tests.compressor.edit_plans import dropping, plan, source
from tests.compressor.edited_models import Snapshot, near, run
from tests.profiler.capture.tiny import build

BIAS = (0.5, -1.0, 0.0, 0.25, 2.0, -0.5, 0.75, -2.0)


def route(*layers: int, value: float = 3, rule: Any = "top_k", **more: Any) -> RouteStep:
    """One value in some layers."""
    return RouteStep(
        method="test", rule=rule, layers=tuple(RouteLayer(layer=one, value=value) for one in layers), **more
    )


def biased(*layers: int, bias: tuple[float, ...] = BIAS) -> RouteStep:
    """One bias in some layers."""
    return RouteStep(method="test", rule="bias", layers=tuple(RouteLayer(layer=one, bias=bias) for one in layers))


def merge(**more: Any) -> MergeStep:
    """Experts 1 and 4 of layer 2 become one, 1 in the lead; the others stay alone."""
    alone = [MergeGroup(lead=one, members=(one,), weights=(1.0,)) for one in (0, 2, 3, 5, 6, 7)]
    groups = sorted([MergeGroup(lead=1, members=(1, 4), weights=(0.75, 0.25)), *alone], key=lambda group: group.lead)
    given = {"grouping": "test", "method": "average", "form": "per_layer"}
    return MergeStep(**{**given, "layers": (MergeLayer(layer=2, groups=tuple(groups)),), **more})


def drop(layer: int, *experts: int, **more: Any) -> DropStep:
    """Some experts of one layer."""
    return DropStep(method="test", form="per_layer", layers=(DropLayer(layer=layer, experts=experts),), **more)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((route(1), route(2)), "two route steps"),
        ((route(0),), "layer 0, which is no MoE layer"),
        ((route(1, 1),), "names a layer twice"),
        ((biased(1, bias=BIAS[:5]),), "5 numbers, and the layer 8 experts"),
        ((route(1, value=9),), "can reach 8 experts per token.*asks for 9"),
        ((drop(1, 0, 1, 2, 3), route(1, value=5)), "can reach 4 experts per token"),
        ((DropStep(method="test", layers=(), decoder_layers=(1,)), route(1)), "drops decoder layer 1"),
        ((merge(method="nearest"), biased(2)), "method nearest"),
        ((route(1), drop(1, 0)), "then route"),
    ],
)
def test_what_no_model_could_follow_is_refused(steps: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        planned.plan(*steps).checked()


def test_groups_bound_how_many_experts_a_token_reaches() -> None:
    planned.plan(route(1, value=4), groups=2, chosen_groups=1).checked()
    with pytest.raises(PlanError, match="can reach 4 experts"):
        planned.plan(route(1, value=5), groups=2, chosen_groups=1).checked()


def test_biases_follow_the_experts_that_are_left() -> None:
    def after(*steps: Any) -> dict[int, tuple[float, ...]]:
        found = route_after(planned.plan(*steps, selection_bias=True).checked())
        assert found is not None
        return {one.layer: one.bias for one in found.layers}

    assert route_after(planned.plan(drop(1, 0))) is None
    assert after(biased(3)) == {3: BIAS}
    assert after(drop(2, 0, 4), biased(2)) == {2: (-1.0, 0.0, 0.25, -0.5, 0.75, -2.0)}
    assert after(merge(), biased(2)) == {2: (0.5, -1.0, 0.0, 0.25, -0.5, 0.75, -2.0)}
    assert after(merge(router="mean"), biased(2)) == {2: (0.5, -0.25, 0.0, 0.25, -0.5, 0.75, -2.0)}
    assert after(merge(form="shared"), biased(2)) == {2: BIAS}
    gone = DropStep(method="test", layers=(), decoder_layers=(1,))
    assert after(gone, biased(3)) == {2: BIAS}
    filled = DropStep(method="test", form="padded", layers=(DropLayer(layer=2, experts=(0,)),))
    assert after(filled, biased(2, 3))[2] == (*BIAS[1:], 0.0)


def test_a_plan_with_a_route_step_reads_back_and_is_told_from_others() -> None:
    first = planned.plan(route(1, 2, value=1)).checked()
    assert Plan.parse(first.text()) == first and first.route is not None and first.for_checkpoint == ()
    second = planned.plan(route(1, value=1)).checked()
    (one,) = differences(first, second)
    assert (one.layer, one.role, one.first, one.second) == (
        2,
        "layer",
        "routed by top_k 1, weights renormalized",
        "kept",
    )
    other = planned.plan(biased(1, bias=(*BIAS[:7], 3.0)))
    assert [(one.expert, one.first) for one in differences(planned.plan(biased(1)), other)] == [(7, "logit -2")]


@pytest.mark.parametrize("engine", EXPORTERS, ids=lambda one: one.name)
def test_engines_refuse_a_route_step_by_name(engine: Any) -> None:
    with pytest.raises(PlanError, match=f"{engine.title.partition(':')[0].split()[0]}.* cannot change what a router"):
        engine.export(planned.plan(route(1)))


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "qwen3_vl_moe_text"])
def test_files_memory_and_loading_route_alike(family: str, tmp_path: Path) -> None:
    model = build(family)
    model.save_pretrained(tmp_path / "source")
    known, plain, before = source(model), run(model), Snapshot(model)
    wanted = plan(known, route(*(shape.layer for shape in known.layers)))
    with edited(model, wanted):
        routed = run(model)
    before.require_same(model)
    assert torch.equal(run(model), plain) and not torch.equal(routed, plain)
    with rerouted(model, TopK(3)):
        assert torch.equal(run(model), routed)

    receipt = compressor.apply(wanted, source=tmp_path / "source", destination=tmp_path / "result")
    assert (receipt.loads_with, receipt.tensors_edited, receipt.tensors_removed) == ("compressor.load", 0, 0)
    assert receipt.bytes_before == receipt.bytes_after and "AutoModel" in " ".join(receipt.notes)
    card = (tmp_path / "result" / "README.md").read_text(encoding="utf-8")
    assert "rule `top_k` 3" in card and "ignore that field" in card and "layers differ" not in card
    loaded = compressor.load(tmp_path / "result")
    near(run(loaded), routed, 1e-6)
    loaded.save_pretrained(tmp_path / "again")
    near(run(compressor.load(tmp_path / "again")), routed, 1e-6)
    stock = type(model).from_pretrained(tmp_path / "result")
    near(run(stock.eval()), plain, 1e-6)


def test_a_bias_goes_through_a_drop(tmp_path: Path) -> None:
    model = build("mixtral")
    model.save_pretrained(tmp_path / "source")
    gone = {shape.layer: (shape.layer,) for shape in source(model).layers}
    cut = dropping(model, gone, form="uniform")
    wanted = cut.model_copy(update={"steps": (*cut.steps, biased(*gone))}).checked()
    compressor.apply(wanted, source=tmp_path / "source", destination=tmp_path / "result")
    with edited(model, cut):
        stays = {layer: torch.tensor([value for place, value in enumerate(BIAS) if place != layer]) for layer in gone}
        for layer, shift in stays.items():  # an oracle with no hook: the shift as a bias of the router's projection
            router = model.model.layers[layer].mlp.gate
            router.forward = _shifted(router, shift)
        by_hand = run(model)
        for layer in gone:
            del model.model.layers[layer].mlp.gate.forward
    near(run(compressor.load(tmp_path / "result")), by_hand, 1e-5)
    with edited(model, wanted):
        near(run(model), by_hand, 1e-5)


def _shifted(router: Any, shift: torch.Tensor) -> Any:
    def forward(hidden: torch.Tensor) -> Any:
        logits = torch.nn.functional.linear(hidden.reshape(-1, hidden.shape[-1]), router.weight) + shift
        top = logits.softmax(-1).topk(router.top_k, dim=-1)
        return logits, top.values / top.values.sum(-1, keepdim=True), top.indices

    return forward


def test_nothing_measures_a_routed_checkpoint_as_if_it_were_plain(tmp_path: Path) -> None:
    model = build("olmoe")
    model.save_pretrained(tmp_path / "source")
    wanted = plan(source(model), route(0, 1))
    compressor.apply(wanted, source=tmp_path / "source", destination=tmp_path / "routed")
    with edited(model, wanted):
        routed = run(model)
    near(run(load_model(tmp_path / "routed", device="cpu")), routed, 1e-6)
    with pytest.raises(ModelError, match="leave out --layer-stream"):
        build_skeleton(tmp_path / "routed")
    with pytest.raises(PlanError, match="has a route step already"):
        compressor.apply(wanted, source=tmp_path / "routed", destination=tmp_path / "twice")
    with pytest.raises(ModelError, match="edit the source"), edited(compressor.load(tmp_path / "routed"), wanted):
        pass
    settings = json.loads((tmp_path / "routed" / "config.json").read_text(encoding="utf-8"))
    settings["moescope_route"]["rule"] = "dice"
    (tmp_path / "routed" / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(ModelError, match="moescope_route of the configuration is no route step: rule"):
        compressor.load(tmp_path / "routed")


def test_families_that_cannot_be_rerouted_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = build("llama4_text")
    model.save_pretrained(tmp_path / "source")
    wanted = plan(source(model), route(0, value=1))
    with pytest.raises(PlanError, match="Llama4TextExperts.*not called with.*without the route step"):
        compressor.apply(wanted, source=tmp_path / "source", destination=tmp_path / "result")
    assert not (tmp_path / "result").exists()
