"""Files that say where experts lie, read back by readers of the engines' rules that are written out here."""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
import sys
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.exporters import EXPORTERS, exporter
from compressor.exporters.sglang_kt import ratio
from compressor.plan import DropLayer, DropStep, MergeGroup, MergeLayer, MergeStep, Plan
from moescope.errors import InputError, PlanError
from tests.compressor.bit_plans import quantize
from tests.compressor.edit_plans import plan
from tests.compressor.serving_plans import cache, counted, deep, place

CACHES = [one.name for one in EXPORTERS if one.step == "cache"]
EXPERT_TENSORS = ("up_exps.weight", "down_exps.weight", "gate_exps.weight", "gate_up_exps.weight", "up_chexps.weight",
                  "down_exps.bias")  # fmt: skip
OTHER_TENSORS = ("up_shexp.weight", "gate_inp.weight", "norm.weight", "down.weight")


def buffers(arguments: str, layers: int, device: str = "GPU") -> dict[str, str]:
    """What llama.cpp does with its arguments: tensor -> buffer.

    ``-ot`` is split at commas, each part at its first ``=``; ``-ncmoe N`` stands for N patterns; the first pattern that
    is found anywhere in a name wins; all else is on the device, as ``-ngl 999`` says.
    """
    words, overrides = shlex.split(arguments), []
    assert words[:2] == ["-ngl", "999"]
    for flag, value in zip(words[2::2], words[3::2], strict=True):
        if flag == "-ncmoe":
            ending = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"
            overrides += [(rf"blk\.{block}{ending}", "CPU") for block in range(int(value))]
        else:
            assert flag == "-ot"
            for part in value.split(","):
                pattern, _, buffer = part.partition("=")
                assert "=" not in buffer
                overrides.append((pattern, buffer))
    names = [f"blk.{block}.ffn_{part}" for block in range(layers) for part in (*EXPERT_TENSORS, *OTHER_TENSORS)]
    names += [f"blk.{block}.attn_q.weight" for block in range(layers)] + ["token_embd.weight", "output.weight"]
    return {name: next((buffer for pattern, buffer in overrides if re.search(pattern, name)), device) for name in names}


def layers_on_device(arguments: str, layers: int) -> set[int]:
    """Blocks whose experts are on the device; nothing else may be anywhere else."""
    found = buffers(arguments, layers)
    lies: dict[int, set[str]] = {}
    for name, buffer in found.items():
        block = re.fullmatch(r"blk\.(\d+)\.ffn_.*(?:ch|_)exps\..*", name)
        if block:
            lies.setdefault(int(block[1]), set()).add(buffer)
        else:
            assert buffer == "GPU", name
    assert all(len(one) == 1 for one in lies.values())
    return {block for block, one in lies.items() if one == {"GPU"}}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=24), st.integers(0, 3))
def test_llama_cpp_holds_the_layers_of_a_plan_that_holds_whole_ones(held: list[bool], dense: int) -> None:
    known = deep(dense + len(held), dense)
    step = cache({dense + place: range(4) if one else () for place, one in enumerate(held)})
    exported = exporter("llama.cpp").export(plan(known, step))
    wanted = {dense + place for place, one in enumerate(held) if one}
    assert layers_on_device(exported.text, known.num_layers) - set(range(dense)) == wanted
    assert exported.left_out == ()
    first = next((place for place, one in enumerate(held) if one), len(held))
    assert ("-ot" in exported.text) == (not all(held[first:]))  # experts of the first blocks alone: -ncmoe


def test_llama_cpp_does_not_take_block_1_for_block_10() -> None:
    step = cache({layer: () if layer in (1, 3) else range(4) for layer in range(1, 14)})
    exported = exporter("llama.cpp").export(plan(deep(14), step))
    assert exported.text == '-ngl 999 -ot "blk\\.(1|3)\\.ffn_(up|down|gate|gate_up)_(ch|)exps=CPU"\n'
    found = buffers(exported.text, 14)
    assert found["blk.1.ffn_up_exps.weight"] == "CPU" and found["blk.10.ffn_up_exps.weight"] == "GPU"
    assert found["blk.3.ffn_down_exps.weight"] == "CPU" and found["blk.13.ffn_down_exps.weight"] == "GPU"


@pytest.mark.parametrize("slots", range(25))
def test_llama_cpp_takes_as_many_last_layers_as_the_slots_hold(slots: int) -> None:
    known = deep(7)
    shares = {layer: slots // 6 + (layer <= slots % 6) for layer in range(1, 7)}
    step = cache({layer: range(shares[layer]) for layer in range(1, 7)})
    exported = exporter("llama.cpp").export(plan(known, step))
    kept = layers_on_device(exported.text, 7) - {0}
    assert kept == set(range(7 - slots // 4, 7))
    if slots % 24:
        assert exported.left_out[0] == (
            f"step 1, cache: slots for {slots} experts; llama.cpp moves whole layers: all 4 experts of {slots // 4}"
            f" layer{'' if slots // 4 == 1 else 's'} are on the device"
        )
        told = {int(line.split()[1]) for line in exported.left_out[1:]}
        assert told == {layer for layer, share in shares.items() if share != (4 if layer in kept else 0)}


def test_llama_cpp_counts_bytes_and_not_experts() -> None:
    known = deep(7)

    def bits(layer: int, expert: int, part: str) -> Any:
        return 8 if layer in (5, 6) else 2

    widths = quantize(known, bits, symmetric=True, group_size=0, granularity="layer")
    step = cache(dict.fromkeys(range(1, 7), (0,)))  # 2 of 8 and 4 of 2 bits: room for no layer of 8 bits
    exported = exporter("llama.cpp").export(plan(known, widths, step))
    assert layers_on_device(exported.text, 7) - {0} == {3, 4}
    dense = widths.model_copy(update={"form": "dense"})  # stored in the source's type, whatever the grid
    exported = exporter("llama.cpp").export(plan(known, dense, step))
    assert layers_on_device(exported.text, 7) - {0} == {6}
    assert exported.left_out[0].startswith("step 1, quantize: apply it first")


def test_llama_cpp_says_what_it_does_not_do() -> None:
    step = cache(
        {1: (3,), 2: ()}, {1: 2, 2: 3}, {2: (0, 1)}, policy="hobbit", misses="load", prefetch="cross_layer_gate",
        ahead=2, low_bits=4, thresholds=(0.6, 0.9),
    )  # fmt: skip
    exported = exporter("llama.cpp").export(plan(deep(3), step, place({1: range(4), 2: range(4)})))
    words = " ".join(exported.left_out)
    for part in (
        "step 2, place: for the engine that serves", "policy hobbit", "loaded over the link", "prefetch by",
        "2 MoE layers ahead", "4 bit version", "0.6 to 0.9", "layer 2 (experts 0, 1 on disk)",
        "layer 1 (slots for 2 experts): all of them lie in host memory",
    ):  # fmt: skip
        assert part in words, part
    assert any("pipeline parallelism" in note for note in exported.notes)
    assert not any("--no-mmap" in note for note in exported.notes)  # what lies on disk is read through mmap
    shared = exporter("llama.cpp").export(plan(deep(3), cache({1: (), 2: ()}, scope="shared", slots=5)))
    assert "step 1, cache: one cache for all layers; llama.cpp has a cache for each layer" in shared.left_out
    assert layers_on_device(shared.text, 3) - {0} == {2}
    assert any("--no-mmap" in note for note in shared.notes)


def fork(text: str, slots: int, experts: int) -> dict[int, set[int]]:
    """What the fork of llama.cpp does with a profile: layer -> experts on the device."""
    found: dict[int, Counter[int]] = {}
    for line in text.splitlines(keepends=True):
        assert len(line) < 4096
        position, layer, *chosen = map(int, line.split(","))
        if position >= 0:
            found.setdefault(layer, Counter()).update(chosen)
    return {
        layer: set(sorted((e for e in row if e < experts), key=lambda expert: (-row[expert], expert))[:slots])
        for layer, row in found.items()
    }


def test_the_fork_of_llama_cpp_holds_the_pinned_experts() -> None:
    pins = {1: (0, 3), 2: (1, 2), 3: (2, 3)}
    exported = exporter("llama.cpp-cache").export(plan(deep(4), cache(pins)))
    assert "--moe-cache-slots 2 " in exported.notes[0] and exported.notes[0].endswith("-ncmoe 4")
    assert fork(exported.text, 2, 4) == {layer: set(experts) for layer, experts in pins.items()}
    assert exported.left_out == ()
    many = deep(2, num_experts=2400, top_k=1)
    exported = exporter("llama.cpp-cache").export(plan(many, cache({1: range(0, 2400, 2)})))
    assert fork(exported.text, 1200, 2400) == {1: set(range(0, 2400, 2))}


def test_the_fork_of_llama_cpp_holds_no_more_than_the_plan() -> None:
    rows = {1: (5, 9, 1, 7), 2: (1, 2, 3, 4)}
    exported = exporter("llama.cpp-cache").export(counted(deep(3), rows, cache({1: (0, 1, 3), 2: (0,)})))
    assert fork(exported.text, 2, 4) == {1: {1, 3}, 2: {0}}  # the hottest pinned two of layer 1; one pin in layer 2
    assert exported.left_out == (
        "layer 1 (expert 0 on the device): the fork has as many slots in every layer, 2 where the device holds no more"
        " than the plan",
    )
    with pytest.raises(PlanError, match="1 slots are fewer than one for each of 2 layers"):
        exporter("llama.cpp-cache").export(plan(deep(3), cache({1: (0,), 2: ()})))


def test_hot_experts_are_a_table_of_counts() -> None:
    rows = {1: (5, 9, 1, 7), 2: (2, 2, 3, 4)}
    step = cache({1: (1, 3), 2: (1,)}, {1: 2, 2: 2})
    exported = exporter("hot-experts").export(counted(deep(3), rows, step))
    assert exported.text.startswith("layer,expert,count\n")
    found: dict[int, dict[int, int]] = {}
    for row in csv.DictReader(io.StringIO(exported.text)):
        found.setdefault(int(row["layer"]), {})[int(row["expert"])] = int(row["count"])
    assert {layer: list(row.values()) for layer, row in found.items()} == {k: list(row) for k, row in rows.items()}
    assert "layer 2 (expert 1 on the device): others are chosen more often and rank first" in exported.left_out
    assert not any("layer 1 (experts" in line for line in exported.left_out)  # the two hottest are pinned
    assert any("not verified" in note for note in exported.notes)
    bare = exporter("hot-experts").export(plan(deep(3), step))
    assert bare.text.splitlines()[1:] == ["1,0,0", "1,1,1", "1,2,0", "1,3,1", "2,0,0", "2,1,1", "2,2,0", "2,3,0"]


def kt_masks(content: bytes, share: float, moe: list[int], experts: int) -> dict[int, set[int]]:
    """What sglang-kt does with its file: decoder layer -> experts on the GPU."""
    torch = pytest.importorskip("torch")
    loaded = torch.load(io.BytesIO(content), weights_only=True)
    assert list(loaded) == ["logical_count"] and loaded["logical_count"].ndim == 3
    scores = loaded["logical_count"].sum(dim=0)
    assert 0.0 <= share <= 1.0
    number = int(len(moe) * experts * share)
    masks = torch.zeros(scores.shape, dtype=torch.bool)
    masks.view(-1)[torch.topk(scores.flatten(), number).indices] = True
    return {layer: {int(expert) for expert in torch.nonzero(masks[layer]).flatten()} for layer in moe}


@pytest.mark.parametrize("pins", [{1: (0, 3), 2: (1,), 3: ()}, {1: range(4), 2: range(4), 3: range(4)}])
def test_sglang_kt_puts_the_pinned_experts_on_the_gpu(pins: dict[int, Any]) -> None:
    exported = exporter("sglang-kt").export(plan(deep(4), cache(pins)))
    assert exported.text == "" and exported.content == exported.binary
    share = re.search(r"--kt-gpu-experts-ratio ([\d.e-]+)", exported.notes[0])
    assert share and exported.binary is not None
    found = kt_masks(exported.binary, float(share[1]), [1, 2, 3], 4)
    assert found == {layer: set(experts) for layer, experts in pins.items()}
    assert exported.left_out == ()
    assert exporter("sglang-kt").export(plan(deep(4), cache(pins))).binary == exported.binary


def test_the_ratio_gives_back_every_number() -> None:
    for total in (1, 3, 7, 48, 58 * 256, 61 * 384, 92 * 160):
        for number in range(total + 1):
            share = ratio(number, total)
            assert 0 <= share <= 1 and int(total * float(repr(share))) == number


def test_slots_without_pins_hold_the_experts_that_are_chosen_most() -> None:
    rows = {1: (5, 9, 1, 7), 2: (2, 2, 3, 40)}
    step = cache({1: (2,), 2: ()}, {1: 2, 2: 2}, policy="lru", misses="load")
    exported = exporter("sglang-kt").export(counted(deep(3), rows, step))
    assert exported.binary is not None
    assert kt_masks(exported.binary, 4.5 / 8, [1, 2], 4) == {1: {1, 2}, 2: {2, 3}}
    assert "step 1, cache: policy lru; sglang-kt knows static alone" in exported.left_out
    shared = cache({1: (2,), 2: ()}, scope="shared", slots=3)
    exported = exporter("sglang-kt").export(counted(deep(3), rows, shared))
    assert exported.binary is not None and exported.left_out == ()
    assert kt_masks(exported.binary, 3.5 / 8, [1, 2], 4) == {1: {1, 2}, 2: {3}}
    bare = exporter("sglang-kt").export(plan(deep(3), step))
    assert "step 1, cache: 3 slots for whatever is needed; sglang-kt has those named alone" in bare.left_out


def test_sglang_kt_needs_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match="needs torch: pip install torch"):
        exporter("sglang-kt").export(plan(deep(2), cache({1: (0,)})))


def test_ktransformers_moves_whole_layers() -> None:
    yaml = pytest.importorskip("yaml")
    step = cache({layer: range(4) if layer in (1, 12) else () for layer in range(1, 14)})
    rules = yaml.safe_load(exporter("ktransformers").export(plan(deep(14), step)).text)

    def device(name: str) -> Any:
        """The first rule that matches a module's name counts."""
        found = (rule["replace"] for rule in rules if re.search(rule["match"]["name"], name))
        return next((one["kwargs"]["generate_device"] for one in found), None)

    lies = {layer: device(f"model.layers.{layer}.mlp.experts") for layer in range(1, 14)}
    assert lies == {layer: "cuda:0" if layer in (1, 12) else "cpu" for layer in range(1, 14)}
    assert device("model.layers.1.mlp.gate") is None and device("model.layers.1.mlp.experts.0") is None
    assert all(rule["recursive"] is False for rule in rules)
    with pytest.raises(PlanError, match="the plan's slots hold the experts of none"):
        exporter("ktransformers").export(plan(deep(3), cache({1: (0,), 2: (0,)})))
    with pytest.raises(PlanError, match="olmoe may have other names"):
        exporter("ktransformers").export(plan(deep(3, model_type="olmoe"), step_of(3)))


def test_moe_infinity_is_told_a_share_of_memory() -> None:
    known = deep(3)
    step = cache({1: (), 2: ()}, scope="shared", slots=4, policy="lfu_in_cache", misses="load")
    wanted = plan(known, step)
    exported = exporter("moe-infinity").export(wanted)
    config = json.loads(exported.text)
    assert set(config) == {"offload_path", "device_memory_ratio", "host_memory_ratio", "prefetch"}
    assert config["device_memory_ratio"] == 0.9 and "bytes of the slots" in exported.left_out[-1]
    size = 3 * 256 * 512 * 2
    target = wanted.target.model_copy(update={"vram": 16 * size})
    exported = exporter("moe-infinity").export(wanted.model_copy(update={"target": target}))
    assert json.loads(exported.text)["device_memory_ratio"] == 0.25
    assert exported.left_out == (
        "step 1, cache: 4 slots for all layers: it has one share of memory for all experts, and no list of them",
    )
    assert any("trace_path" in note for note in exported.notes)
    apart = exporter("moe-infinity").export(plan(known, cache({1: (0, 1), 2: (2, 3)})))
    assert "step 1, cache: a cache for each layer; MoE-Infinity has one cache for all layers" in apart.left_out
    assert any(line.startswith("layer 2 (slots for 2 experts, 2, 3 pinned)") for line in apart.left_out)


def step_of(layers: int) -> Any:
    """Two pinned experts in every layer but the first."""
    return cache(dict.fromkeys(range(1, layers), (2, 3)))


def cut() -> Plan:
    """Decoder layer 2 goes and experts 0 and 1 become one, or 1 goes: what was 2 and 3 is 1 and 2."""
    known = deep(4)
    gone = DropStep(method="test", layers=(DropLayer(layer=1, experts=(1,)),), decoder_layers=(2,))
    groups = (
        MergeGroup(lead=0, members=(0, 1), weights=(0.5, 0.5)),
        MergeGroup(lead=2, members=(2,), weights=(1.0,)),
        MergeGroup(lead=3, members=(3,), weights=(1.0,)),
    )
    merged = MergeStep(grouping="test", method="average", layers=(MergeLayer(layer=3, groups=groups),))
    step = cache({1: (2, 3), 3: (0, 3)})
    return counted(known, {1: (1, 2, 3, 4), 2: (9, 9, 9, 9), 3: (5, 6, 7, 8)}, gone, merged, step)


def test_numbers_are_those_of_the_result_after_cuts() -> None:
    wanted = cut()
    exported = exporter("hot-experts").export(wanted)
    assert exported.text.split()[1:] == ["1,0,1", "1,1,3", "1,2,4", "2,0,11", "2,1,7", "2,2,8"]
    assert exported.left_out[:2] == (
        "step 1, drop: apply it first; the file speaks of the result's numbers",
        "step 2, merge: apply it first; the file speaks of the result's numbers",
    )
    assert fork(exporter("llama.cpp-cache").export(wanted).text, 2, 3) == {1: {1, 2}, 2: {0, 2}}
    content = exporter("sglang-kt").export(wanted).binary
    assert content is not None and kt_masks(content, 4.5 / 6, [1, 2], 3) == {1: {1, 2}, 2: {0, 2}}
    assert layers_on_device(exporter("llama.cpp").export(wanted).text, 3) - {0} == {2}


def test_experts_that_fill_up_are_never_hot() -> None:
    known = deep(3, model_type="deepseek_v3", selection_bias=True)
    gone = DropStep(method="test", form="padded", layers=(DropLayer(layer=1, experts=(0,)),))
    wanted = counted(known, {1: (9, 1, 2, 3), 2: (4, 5, 6, 7)}, gone, step_of(3))
    assert exporter("hot-experts").export(wanted).text.split()[1:5] == ["1,0,1", "1,1,2", "1,2,3", "1,3,0"]


@pytest.mark.parametrize("engine", CACHES)
def test_what_no_engine_could_serve_is_refused(engine: str) -> None:
    with pytest.raises(PlanError, match="no cache step"):
        exporter(engine).export(plan(deep(2), place({1: range(4)})))
    uneven = DropStep(method="test", form="per_layer", layers=(DropLayer(layer=1, experts=(0,)),))
    with pytest.raises(PlanError, match="layers hold 3 to 4 experts.* form uniform"):
        exporter(engine).export(plan(deep(3), uneven, step_of(3)))
    groups = tuple(MergeGroup(lead=lead, members=(lead, lead + 1), weights=(0.5, 0.5)) for lead in (0, 2))
    merged = MergeStep(grouping="t", method="average", form="shared", layers=(MergeLayer(layer=1, groups=groups),))
    with pytest.raises(PlanError, match=r"compressor\.load alone"):
        exporter(engine).export(plan(deep(2), merged, cache({1: (2,)})))
    twice = deep(2).model_copy(
        update={"layers": tuple(deep(2).layers[0].model_copy(update={"step": step}) for step in (0, 1))}
    )
    step = cache({1: ()})
    rows = (step.layers[0], step.layers[0].model_copy(update={"step": 1}))
    with pytest.raises(PlanError, match="calls the experts of a layer several times"):
        exporter(engine).export(plan(twice, step.model_copy(update={"layers": rows})))


def test_names_that_are_not_known_are_refused() -> None:
    with pytest.raises(PlanError, match="the names of toy_moe's experts"):
        exporter("llama.cpp").export(plan(deep(3, model_type="toy_moe"), step_of(3)))


@pytest.mark.parametrize("engine", ["llama.cpp-cache", "hot-experts", "sglang-kt"])
def test_a_plan_that_names_no_expert_is_refused(engine: str) -> None:
    with pytest.raises(PlanError, match="counts"):
        exporter(engine).export(plan(deep(3), cache({1: (), 2: ()}, {1: 2, 2: 2}, policy="lru", misses="load")))


def test_damaged_counts_are_refused() -> None:
    with pytest.raises(PlanError, match="counts of layer 2 are not one number per expert, of 4"):
        exporter("hot-experts").export(counted(deep(3), {1: (1, 2, 3, 4), 2: (1, 2)}, step_of(3)))
    with pytest.raises(PlanError, match="counts of layer 1 are not one number"):
        exporter("hot-experts").export(counted(deep(2), {1: (1, 2, 3, -4)}, step_of(2)))


@pytest.mark.parametrize("engine", [one.name for one in EXPORTERS if one.step == "quantize"])
def test_files_of_widths_name_steps_for_other_engines(engine: str) -> None:
    known = deep(3, model_type="olmoe")
    widths = quantize(known, lambda *_: 8, symmetric=True, group_size=0)
    exported = exporter(engine).export(plan(known, widths, step_of(3)))
    assert [line for line in exported.left_out if "cache" in line] == [
        "step 2, cache: for the engine that serves the result: export it by itself, moescope export --list names the"
        " formats"
    ]
    assert exported.text == exporter(engine).export(plan(known, widths)).text
