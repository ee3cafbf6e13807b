"""Files that give experts to devices, read back by readers of the engines' rules that are written out here."""

from __future__ import annotations

import io
import json
import re
import shlex
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.exporters import EXPORTERS, exporter
from compressor.plan import DropLayer, DropStep, Plan
from moescope.errors import PlanError
from tests.compressor.edit_plans import plan
from tests.compressor.serving_plans import cache, counted, deep, place

PLACES = [one.name for one in EXPORTERS if one.step == "place"]
Held = dict[int, list[list[int]]]
"""Decoder layer -> device -> its experts in the order of its slots."""


@st.composite
def placed(draw: Any) -> tuple[Plan, Held]:
    """A plan of two to four MoE layers behind up to two dense ones, and what its devices hold."""
    devices, experts, dense = draw(st.sampled_from((1, 2, 4))), 4, draw(st.integers(0, 2))
    slots = devices * draw(st.integers(max(1, -(-experts // devices)), 5))
    known = deep(dense + draw(st.integers(2, 4)), dense)
    rows = {}
    for layer in range(dense, known.num_layers):
        more = draw(st.lists(st.integers(0, experts - 1), min_size=slots - experts, max_size=slots - experts))
        rows[layer] = draw(st.permutations([*range(experts), *more]))
    size = slots // devices
    held = {layer: [list(row[d * size : d * size + size]) for d in range(devices)] for layer, row in rows.items()}
    return plan(known, place(rows, devices)), held


def flag(note: str, name: str) -> int:
    """The number behind an option."""
    found = re.search(rf"{name} (\d+)", note)
    assert found
    return int(found[1])


def sglang(text: str, note: str, layers: int, experts: int) -> Held:
    """What SGLang does with its file, whose content are the arguments of a function."""

    def init_by_mapping(*, physical_to_logical_map: list[list[int]]) -> Held:
        ranks, slots = flag(note, "--ep-size"), experts + flag(note, "--ep-num-redundant-experts")
        assert slots % ranks == 0
        rows = np.array(physical_to_logical_map)
        assert rows.shape == (layers, slots)
        assert all(set(row) == set(range(experts)) for row in rows.tolist())
        size = slots // ranks
        return {
            layer: [row[rank * size : (rank + 1) * size].tolist() for rank in range(ranks)]
            for layer, row in enumerate(rows)
        }

    return init_by_mapping(**json.loads(text))


@settings(max_examples=40, deadline=None)
@given(placed())
def test_sglang_holds_the_experts_of_the_plan(case: tuple[Plan, Held]) -> None:
    wanted, held = case
    exported = exporter("sglang").export(wanted)
    found = sglang(exported.text, exported.notes[0], wanted.source.num_layers, 4)
    assert {layer: found[layer] for layer in held} == held
    assert exported.left_out == ()


@settings(max_examples=40, deadline=None)
@given(placed())
def test_tensorrt_llm_holds_the_experts_of_the_plan(case: tuple[Plan, Held]) -> None:
    yaml = pytest.importorskip("yaml")
    wanted, held = case
    exported = exporter("tensorrt-llm").export(wanted)
    config = yaml.safe_load(exported.text)
    assert set(config) == {"num_slots", "initial_global_assignments", "layer_updates_per_iter"}
    assert config["layer_updates_per_iter"] == 0
    ranks = flag(exported.notes[0], "moe_expert_parallel_size:")
    assert config["num_slots"] % ranks == 0
    size = config["num_slots"] // ranks
    found = {
        layer: [row[rank * size : (rank + 1) * size] for rank in range(ranks)]
        for layer, row in config["initial_global_assignments"].items()
    }
    assert all(len(row) == config["num_slots"] for row in config["initial_global_assignments"].values())
    assert found == held


@settings(max_examples=40, deadline=None)
@given(placed())
def test_vllm_ascend_holds_the_experts_of_the_plan(case: tuple[Plan, Held]) -> None:
    wanted, held = case
    exported = exporter("vllm-ascend").export(wanted)
    content = json.loads(exported.text)
    assert content["moe_layer_count"] == len(content["layer_list"]) == len(held)
    assert [layer["layer_id"] for layer in content["layer_list"]] == list(range(len(held)))
    table = np.array([[one["device_expert"] for one in layer["device_list"]] for layer in content["layer_list"]])
    assert table.tolist() == list(held.values())
    for layer in content["layer_list"]:
        assert [one["device_id"] for one in layer["device_list"]] == list(range(layer["device_count"]))
    options = json.loads(shlex.split(exported.notes[0].split("--additional-config ")[1])[0])
    assert options["eplb_config"]["num_redundant_experts"] == table[0].size - 4
    assert any("V1 alone" in note for note in exported.notes)


@settings(max_examples=40, deadline=None)
@given(placed())
def test_eplb_arrays_fit_together(case: tuple[Plan, Held]) -> None:
    wanted, held = case
    exported = exporter("eplb").export(wanted)
    assert exported.binary is not None and exported.content == exported.binary
    with np.load(io.BytesIO(exported.binary), allow_pickle=False) as arrays:
        forward, back, replicas = arrays["phy2log"], arrays["log2phy"], arrays["logcnt"]
        layers, meta = arrays["layer_ids"], json.loads(str(arrays["meta"]))
    assert {array.dtype for array in (forward, back, replicas, layers)} == {np.dtype(np.int32)}
    assert layers.tolist() == list(held)
    assert forward.reshape(len(held), meta["devices"], -1).tolist() == list(held.values())
    assert back.shape == (*replicas.shape, replicas.max()) and replicas.shape == (len(held), 4)
    assert (replicas.sum(axis=1) == forward.shape[1]).all() and (replicas >= 1).all()
    for layer, expert in np.ndindex(replicas.shape):
        slots = back[layer, expert]
        assert (slots[: replicas[layer, expert]] >= 0).all() and (slots[replicas[layer, expert] :] == -1).all()
        assert sorted(slots[slots >= 0]) == np.flatnonzero(forward[layer] == expert).tolist()
    assert exporter("eplb").export(wanted).binary == exported.binary


def vllm(text: str) -> dict[str, Any]:
    """The options of ``vllm serve``."""
    words, result = shlex.split(text), {}
    while words:
        name = words.pop(0)
        assert name.startswith("--")
        result[name] = words.pop(0) if words and not words[0].startswith("--") else True
    return result


@settings(max_examples=40, deadline=None)
@given(placed())
def test_vllm_is_told_how_many_replicas(case: tuple[Plan, Held]) -> None:
    wanted, held = case
    exported = exporter("vllm").export(wanted)
    options = vllm(exported.text)
    rows = next(iter(held.values()))
    slots = sum(map(len, rows))
    assert options.pop("--enable-expert-parallel") is True
    linear = [set(range(d * len(rows[0]), (d + 1) * len(rows[0]))) for d in range(len(rows))]
    if slots == 4 and all([set(one) for one in row] == linear for row in held.values()):
        assert options == {"--expert-placement-strategy": "linear"} and exported.left_out == ()
        return
    config = json.loads(options.pop("--eplb-config"))
    assert options == {"--enable-eplb": True}
    assert config["num_redundant_experts"] == slots - 4 and (4 + config["num_redundant_experts"]) % len(rows) == 0
    assert {"window_size": 1000, "step_interval": 3000}.items() <= config.items()
    assert "vLLM takes no map" in exported.left_out[0]


def test_vllm_says_the_two_maps_that_it_knows() -> None:
    turns = place(dict.fromkeys((1, 2), (0, 2, 3, 1)))
    assert "--enable-eplb" in exporter("vllm").export(plan(deep(3), turns)).text  # falls back without groups
    grouped = deep(3, groups=2, chosen_groups=1)
    exported = exporter("vllm").export(plan(grouped, turns))
    assert vllm(exported.text)["--expert-placement-strategy"] == "round_robin" and exported.left_out == ()
    order = place(dict.fromkeys((1, 2), (1, 0, 3, 2)))  # the order inside a device makes no difference
    exported = exporter("vllm").export(plan(deep(3), order))
    assert vllm(exported.text)["--expert-placement-strategy"] == "linear" and exported.left_out == ()


def test_counts_for_sglang_have_a_row_for_every_layer() -> None:
    rows = {1: (5, 9, 1, 7), 2: (2, 2, 3, 4)}
    exported = exporter("sglang-counts").export(counted(deep(3), rows, place({1: range(4), 2: range(4)})))
    content = json.loads(exported.text)
    assert content == {"logical_count": [[0, 0, 0, 0], [5, 9, 1, 7], [2, 2, 3, 4]]}
    assert "the server makes its own" in exported.left_out[0]
    with pytest.raises(PlanError, match="holds no counts"):
        exporter("sglang-counts").export(plan(deep(3), place({1: range(4), 2: range(4)})))


def cut() -> Plan:
    """Decoder layer 2 goes and expert 1 everywhere else: what was 2 and 3 is 1 and 2."""
    gone = DropStep(
        method="test", layers=tuple(DropLayer(layer=layer, experts=(1,)) for layer in (1, 3)), decoder_layers=(2,)
    )
    step = place({1: (0, 2, 3, 0), 3: (3, 2, 2, 0)})
    return counted(deep(4), {1: (1, 2, 3, 4), 2: (9, 9, 9, 9), 3: (5, 6, 7, 8)}, gone, step)


def test_numbers_are_those_of_the_result_after_cuts() -> None:
    wanted = cut()
    exported = exporter("sglang").export(wanted)
    assert json.loads(exported.text)["physical_to_logical_map"] == [[0, 1, 2, 0], [0, 1, 2, 0], [2, 1, 1, 0]]
    assert flag(exported.notes[0], "--ep-num-redundant-experts") == 1
    assert exported.left_out == ("step 1, drop: apply it first; the file speaks of the result's numbers",)
    counts = json.loads(exporter("sglang-counts").export(wanted).text)["logical_count"]
    assert counts == [[0, 0, 0], [1, 3, 4], [5, 7, 8]]
    assert "  2: [2, 1, 1, 0]\n" in exporter("tensorrt-llm").export(wanted).text
    ascend = json.loads(exporter("vllm-ascend").export(wanted).text)["layer_list"]
    assert ascend[1]["device_list"][0]["device_expert"] == [2, 1]


@pytest.mark.parametrize("engine", PLACES)
def test_other_steps_are_named(engine: str) -> None:
    rows = {1: (0, 1, 2, 3), 2: (0, 2, 1, 3)}
    both = counted(deep(3), rows, cache({1: (0,), 2: ()}), place(rows, devices=4, nodes=2))
    sentences = exporter(engine).export(both).left_out
    assert sentences[0].startswith("step 1, cache: for the engine that serves the result")
    if engine != "eplb":  # its file says how many nodes
        assert "step 2, place: 2 nodes; the launcher puts ranks on nodes" in sentences


@pytest.mark.parametrize("engine", PLACES)
def test_what_no_engine_could_serve_is_refused(engine: str) -> None:
    with pytest.raises(PlanError, match="no place step"):
        exporter(engine).export(plan(deep(2), cache({1: ()})))
    uneven = DropStep(method="test", form="per_layer", layers=(DropLayer(layer=1, experts=(0,)),))
    wanted = plan(deep(3), uneven, place({1: (1, 2, 3, 1), 2: range(4)}))
    with pytest.raises(PlanError, match="layers hold 3 to 4 experts"):
        exporter(engine).export(wanted)
    if engine != "sglang-counts":  # which lists no slots
        padded = plan(
            deep(3, model_type="deepseek_v3", selection_bias=True), uneven.model_copy(update={"form": "padded"}),
            place({1: (1, 2, 3, 1), 2: range(4)}),
        )  # fmt: skip
        with pytest.raises(PlanError, match="form padded"):
            exporter(engine).export(padded)
