"""Steps for engines that serve: what they may ask for, and that they change no checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import compressor
from compressor.plan import CacheLayer, CacheStep, DropLayer, DropStep, PlaceStep, Plan, Step
from moescope.errors import PlanError
from tests.compressor.apply_cases import digest
from tests.compressor.edit_plans import plan, source
from tests.compressor.quantize_plans import quantize, tiny
from tests.compressor.serving_plans import cache, deep, place

ORDER = {1: range(4), 2: range(4)}


def served(known: Any) -> tuple[CacheStep, PlaceStep]:
    """Two experts of every layer pinned, and all of them in order on two devices."""
    keys = [shape.layer for shape in known.layers]
    rows = {shape.layer: range(shape.num_experts) for shape in known.layers}
    return cache(dict.fromkeys(keys, (0, 1))), place(rows)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_plans_are_read_as_they_were_written(data: st.DataObject) -> None:
    experts = st.sets(st.integers(0, 3))
    rows, room, disk = {}, {}, {}
    for layer in (1, 2):
        rows[layer] = sorted(data.draw(experts))
        disk[layer] = sorted(data.draw(experts) - set(rows[layer]))
        room[layer] = data.draw(st.integers(max(2, len(rows[layer])), 4))
    step = cache(
        rows, room, disk, policy=data.draw(st.sampled_from(["lru", "hobbit", "fate"])),
        prefetch=data.draw(st.sampled_from(["none", "popularity"])), ahead=data.draw(st.integers(1, 3)), misses="load",
    )  # fmt: skip
    slots = {layer: data.draw(st.permutations([0, 1, 2, 3, layer, 0])) for layer in (1, 2)}
    wanted = plan(deep(3), step, place(slots, devices=3, nodes=3))
    again = Plan.parse(wanted.text())
    assert again == wanted and again.text() == wanted.text()
    assert again.steps[0] == step and again.for_checkpoint == ()
    assert isinstance(again.steps[1], PlaceStep)
    assert (again.steps[1].slots, again.steps[1].slots_per_device) == (6, 2)


def gone(**more: Any) -> DropStep:
    """Expert 1 of both layers."""
    layers = tuple(DropLayer(layer=layer, experts=(1,)) for layer in (1, 2))
    return DropStep(method="test", layers=layers, **more)


WRONG: dict[str, tuple[tuple[Step, ...], str]] = {
    "two caches": ((cache({1: (0,), 2: ()}),) * 2, "two cache steps: put them into one"),
    "two placements": ((place(ORDER),) * 2, "two place steps: put them into one"),
    "a layer without a cache": ((cache({1: (0,)}),), "cache step says nothing of layer 2"),
    "a layer without slots": ((place({1: range(4)}),), "place step says nothing of layer 2"),
    "a dense layer": ((cache({0: (), 1: (), 2: ()}),), "cache step names layer 0, which is no MoE layer"),
    "an expert that is not": ((cache({1: (4,), 2: ()}),), r"names expert 4 of layer 1, which has experts 0\.\.3"),
    "a pin that goes": ((gone(), cache({1: (0, 1), 2: ()})), "names expert 1 of layer 1, which does not stay"),
    "a file that goes": ((gone(), cache({1: (), 2: ()}, None, {2: (1,)})), "names expert 1 of layer 2, which does not"),
    "slots for more than stay": (
        (gone(), cache({1: (), 2: ()}, {1: 4, 2: 0})), "layer 1 has 3 experts and 4 slots for them",
    ),
    "no room for a token": (
        (cache({1: (0,), 2: (0, 1)}, policy="lru", misses="load"),),
        "layer 1 has 1 slots and a token needs 2 experts at once: give it 2, or let the CPU run what is missing",
    ),
    "no room for a token in all": (
        (cache({1: (), 2: ()}, scope="shared", slots=1, policy="lru", misses="load"),),
        "the shared cache has 1 slots and a token needs 2 experts of a layer at once",
    ),
    "a slot for one that goes": (
        (gone(), place({1: (0, 2, 3, 3), 2: (0, 1, 2, 3)})), "places expert 1 of layer 2, which does not stay",
    ),
    "an expert without a slot": ((place({1: range(4), 2: (0, 1, 2, 2)}),), "gives expert 3 of layer 2 no slot"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_no_engine_could_do_is_refused(case: str) -> None:
    steps, message = WRONG[case]
    with pytest.raises(PlanError, match=message) as caught:
        plan(deep(3), *steps)
    assert "\n" not in str(caught.value)


def test_a_layer_that_is_named_twice_is_refused() -> None:
    step = cache({1: (), 2: ()})
    with pytest.raises(PlanError, match="names a layer twice"):
        plan(deep(3), step.model_copy(update={"layers": (*step.layers, step.layers[0])}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"slots": 1, "pinned": (0, 1)}, "pins 2 experts into 1 slots"),
        ({"slots": 2, "pinned": (1, 0)}, "must ascend"),
        ({"slots": 2, "pinned": (1,), "disk": (1,)}, "expert 1 of layer 3 is pinned to the device and lies on disk"),
    ],
)
def test_layers_of_a_cache_are_consistent(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CacheLayer(layer=3, **content)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"slots": 5}, "the layers hold 2 experts on the device, the step 5"),
        ({"scope": "shared", "slots": 1}, "the layers hold 2 experts on the device, the step 1"),
        ({"low_bits": 4}, "takes its width and the thresholds"),
        ({"thresholds": (0.6, 0.9)}, "takes its width and the thresholds"),
        ({"low_bits": 4, "thresholds": (0.9, 0.6)}, "must ascend within 0..1"),
        ({"ahead": 4}, "less than or equal to 3"),
        ({"policy": "belady"}, "policy"),
    ],
)
def test_caches_are_consistent(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        cache({1: (0, 1), 2: ()}, **more)


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ({1: range(4), 2: (0, 1, 2, 3, 0)}, {}, "layers have 4 to 5 slots"),
        (ORDER, {"devices": 3}, "4 slots cannot be divided among 3 devices"),
        (ORDER, {"devices": 4, "nodes": 3}, "4 devices cannot be divided among 3 nodes"),
    ],
)
def test_placements_are_consistent(rows: Any, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        place(rows, **more)


def test_cuts_free_a_layer_of_its_slots() -> None:
    left = DropStep(method="test", layers=(), decoder_layers=(2,))
    assert plan(deep(3), left, cache({1: (0, 1)}), place({1: range(4)})).steps[0] == left
    few = plan(deep(3, top_k=3), gone(), cache({1: (0, 2, 3), 2: (0, 2, 3)}, misses="load"))
    assert few.for_checkpoint == (gone(),)


def test_steps_for_engines_alone_make_no_checkpoint(tmp_path: Path) -> None:
    model = tiny("olmoe", tmp_path / "source")
    alone = plan(source(model), *served(source(model)))
    with pytest.raises(PlanError) as caught:
        compressor.apply(alone, source=tmp_path / "source", destination=tmp_path / "out")
    assert str(caught.value) == (
        "the plan's steps (cache and place) change no checkpoint: write them for an engine, moescope export"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["drop", "quantize", "drop and quantize"])
def test_steps_for_engines_change_no_checkpoint(tmp_path: Path, kind: str) -> None:
    model = tiny("olmoe", tmp_path / "source")
    known = source(model)
    layers = tuple(DropLayer(layer=shape.layer, experts=(1,)) for shape in known.layers)
    cuts: list[Step] = [DropStep(method="test", layers=layers)] if "drop" in kind else []
    bare = quantize(known, *cuts) if "quantize" in kind else plan(known, *cuts)
    rows = {shape.layer: [e for e in range(shape.num_experts) if e != 1 or not cuts] for shape in known.layers}
    steps = (cache(dict.fromkeys(rows, (0, 2))), place(rows, devices=1))
    both = bare.model_copy(update={"steps": (*bare.steps, *steps)}).checked()
    written = {}
    for name, wanted in (("bare", bare), ("both", both)):
        (tmp_path / name).mkdir()
        receipt = compressor.apply(wanted, source=tmp_path / "source", destination=tmp_path / name / "out")
        written[name] = digest(tmp_path / name / "out")
        assert not any("cache" in note or "place" in note for note in receipt.notes)
    assert set(written["bare"]) == set(written["both"]) >= {"model.safetensors", "config.json", "README.md"}
    different = {name for name in written["bare"] if written["bare"][name] != written["both"][name]}
    assert different == {"moescope_plan.json"}
    card = (tmp_path / "both" / "out" / "README.md").read_text()
    assert all(f"- **{word}**" in card and f"expert-{word}" in card for word in kind.split(" and "))
    assert "**cache**" not in card and "expert-cache" not in card
    assert "**place**" not in card and "expert-place" not in card


def test_steps_for_engines_change_nothing_in_memory(tmp_path: Path) -> None:
    import torch

    model = tiny("olmoe", tmp_path / "source")
    known = source(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokens = torch.arange(1, 9)[None]
    bare = quantize(known)
    both = bare.model_copy(update={"steps": (*bare.steps, *served(known))}).checked()
    logits = []
    for wanted in (bare, both):
        with compressor.edited(model, wanted), torch.no_grad():
            logits.append(model(tokens).logits)
    assert torch.equal(*logits)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
