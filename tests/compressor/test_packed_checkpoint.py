"""Packed checkpoints: what is written is what the edit in memory computes, and what the format's own library reads."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor, pack_to_int32
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils import match_name

import compressor
from compressor.edits.quantize import to_grid
from compressor.packed.words import pack, unpack
from compressor.plan import DropLayer, DropStep, ExpertBits, Plan, QuantizeLayer, QuantizeStep
from moescope.errors import PlanError
from planner.estimate.storage import expert_bytes
from tests.compressor.apply_cases import digest, header, saved, slim, tensors
from tests.compressor.edit_plans import plan, source
from tests.compressor.edited_models import near, run, slimming
from tests.compressor.quantize_plans import alike, quantize, tiny

MATRIX = re.compile(r"model\.layers\.(\d+)\.mlp\.(?:experts\.(\d+)|shared_experts)\.(gate|up|down)_proj\.weight")
FAMILIES = ("olmoe", "qwen3_moe", "deepseek_v3", "mixtral")


def dropping(model: Any, form: Any = "uniform") -> DropStep:
    """Two experts of every layer, of the first layer four where layers may differ."""
    layers = []
    for place, shape in enumerate(source(model).layers):
        gone = (0, 1, 5, 6) if form == "per_layer" and not place else (1, 6)
        layers.append(DropLayer(layer=shape.layer, experts=gone))
    return DropStep(method="test", form=form, layers=tuple(layers))


PLANS: dict[str, Callable[[Any], Plan]] = {
    "asymmetric": lambda model: quantize(source(model), scales="clipped"),
    "symmetric, whole rows": lambda model: quantize(source(model), symmetric=True, seed=1, group_size=0),
    "drop, per layer": lambda model: quantize(source(model), dropping(model, "per_layer"), seed=4, symmetric=True),
    "slim": lambda model: quantize(source(model), *slim(model, 16)[0].steps, seed=5, group_size=8),
    "dense": lambda model: quantize(source(model), widths=(1, "ternary", 2, 3, 4, 8, None), form="dense"),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", PLANS)
def test_files_and_memory_leave_the_same_model(tmp_path: Path, family: str, kind: str) -> None:
    model = tiny(family, tmp_path / "source")
    wanted, before = PLANS[kind](model), run(model)
    receipt = compressor.apply(wanted, source=tmp_path / "source", destination=tmp_path / "out")
    assert receipt.widths is not None and receipt.widths.passed and receipt.widths.summary in receipt.notes
    if kind != "dense":
        assert receipt.loads_with == "compressor.load" and receipt.bytes_after < 0.75 * receipt.bytes_before
    loaded = compressor.load(tmp_path / "out")
    with compressor.edited(model, wanted):
        logits, state = run(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scale = float(logits.abs().max())
    assert float((run(loaded) - logits).abs().max()) <= 1e-6 * scale < 1e-2 * float((logits - before).abs().max())
    for name, tensor in loaded.state_dict().items():
        if tensor.shape == state[name].shape:  # shared experts may be filled up
            assert torch.equal(tensor, state[name]), name
    assert not hasattr(loaded.config, "quantization_config")
    compressor.verify(tmp_path / "out")


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_library_reads_the_same_values(tmp_path: Path, symmetric: bool) -> None:
    model = tiny("deepseek_v3", tmp_path / "source")
    wanted = quantize(source(model), symmetric=symmetric)
    compressor.apply(wanted, source=tmp_path / "source", destination=tmp_path / "out")
    stored, dense = tensors(tmp_path / "out"), tensors(tmp_path / "source")
    stated = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    settings = QuantizationConfig.model_validate(stated)
    step = next(step for step in wanted.steps if isinstance(step, QuantizeStep))
    bits = {(layer.layer, one.expert, one.role): one for layer in step.layers for one in layer.experts}
    seen = 0
    for name, weight in dense.items():
        found = re.match(
            r"model\.layers\.(\d+)\.mlp\.(?:experts\.(\d+)|shared_experts)\.(gate|up|down)_proj\.weight", name
        )
        module = name.removesuffix(".weight")
        groups = [one for one in settings.config_groups.values() if any(match_name(module, to) for to in one.targets)]
        ignored = any(match_name(module, target) for target in settings.ignore)
        if not found or found[1] == "0":
            assert not groups and (weight.ndim == 1 or ignored or name not in stored), name
            continue
        unit = (int(found[1]), int(found[2] or 0), "routed" if found[2] else "shared")
        width = bits[unit].of(found[3])
        if width is None:
            assert not groups and ignored and torch.equal(stored[name], weight)
            continue
        assert len(groups) == 1 and groups[0].weights.num_bits == width and not ignored and name not in stored
        parts = {key.removeprefix(f"{module}."): value for key, value in stored.items() if key.startswith(f"{module}.")}
        parts["weight_scale"] = parts["weight_scale"].float()  # the library computes in the type of the scales
        value = PackedQuantizationCompressor.decompress(parts, groups[0])["weight"]
        assert torch.equal(value, to_grid(weight, width, step).values())
        seen += 1
    assert seen > 30


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("columns", [1, 31, 32, 33, 70])
def test_words_are_those_of_the_library(bits: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (5, columns), generator=generator)
    words = pack(codes, bits)
    assert torch.equal(words, pack_to_int32((codes - 2 ** (bits - 1)).to(torch.int8), bits))
    assert torch.equal(unpack(words, bits, columns).long(), codes)


@pytest.mark.parametrize("symmetric", [False, True])
def test_bytes_are_those_of_the_estimate(tmp_path: Path, symmetric: bool) -> None:
    model = tiny("qwen3_moe", tmp_path / "source")
    for bits in (2, 3, 4, 8):
        wanted = alike(model, bits, symmetric=symmetric, group_size=32)  # 32 rows and columns: no word has room left
        out = tmp_path / str(bits)
        receipt = compressor.apply(wanted, source=tmp_path / "source", destination=out)
        found: dict[str, int] = {}
        for name, entry in header(out / "model.safetensors").items():
            first, last = entry["data_offsets"]
            kind = name.rpartition(".")[2] if ".experts." in name else "rest"
            found[kind] = found.get(kind, 0) + last - first
        shapes, rest = found.pop("weight_shape"), found.pop("rest")
        assert sum(found.values()) == expert_bytes(wanted, source_bits=32)
        assert shapes == 16 * 3 * 8 * len(wanted.source.layers)  # two numbers per matrix, which no estimate counts
        assert receipt.bytes_after - sum(found.values()) - shapes - rest < 100_000  # names in the header


def test_bfloat16_reads_exactly_the_grid(tmp_path: Path) -> None:
    model = tiny("olmoe", tmp_path / "source", dtype=torch.bfloat16)
    wanted = quantize(source(model))
    compressor.apply(wanted, source=tmp_path / "source", destination=tmp_path / "out")
    stored = tensors(tmp_path / "out")
    assert {value.dtype for name, value in stored.items() if name.endswith("weight_scale")} == {torch.float16}
    loaded = compressor.load(tmp_path / "out")
    with compressor.edited(model, wanted):
        for name, tensor in loaded.state_dict().items():
            assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, model.state_dict()[name]), name


def test_layers_of_one_width_have_simple_targets(tmp_path: Path) -> None:
    model = tiny("olmoe", tmp_path / "source")
    known = source(model)
    layers = []
    for place, shape in enumerate(known.layers):
        width: Any = 4 if place % 2 else 2
        units = tuple(ExpertBits(expert=one, gate=width, up=width, down=width) for one in range(shape.num_experts))
        layers.append(QuantizeLayer(layer=shape.layer, experts=units))
    step = QuantizeStep(method="test", granularity="layer", group_size=16, layers=tuple(layers))
    compressor.apply(plan(known, step), source=tmp_path / "source", destination=tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    projections = r"\.mlp\.experts\.\d+\.(down_proj|gate_proj|up_proj)$"
    numbers = [[place for place in range(len(layers)) if place % 2 == odd] for odd in (0, 1)]
    texts = [str(some[0]) if len(some) == 1 else f"({'|'.join(map(str, some))})" for some in numbers]
    assert [group["targets"] for group in settings["config_groups"].values()] == [
        [rf"re:^model\.layers\.{text}{projections}"] for text in texts
    ]
    assert [group["weights"]["num_bits"] for group in settings["config_groups"].values()] == [2, 4]


def test_experts_that_are_not_named_stay(tmp_path: Path) -> None:
    model = tiny("mixtral", tmp_path / "source")
    known = source(model)
    layer = known.layers[0].layer
    unit = ExpertBits(expert=3, up=4)
    step = QuantizeStep(method="test", group_size=16, layers=(QuantizeLayer(layer=layer, experts=(unit,)),))
    compressor.apply(plan(known, step), source=tmp_path / "source", destination=tmp_path / "out")
    stored, dense = tensors(tmp_path / "out"), tensors(tmp_path / "source")
    module = f"model.layers.{layer}.block_sparse_moe.experts.3.w3"
    assert set(dense) - set(stored) == {f"{module}.weight"}
    parts = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
    assert set(stored) - set(dense) == {f"{module}.{suffix}" for suffix in parts}
    assert all(torch.equal(stored[name], dense[name]) for name in set(stored) & set(dense))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "4 bits: 1;" in card and "compressor.load(FOLDER)" in card and "experts of few bits" in card


def test_shared_experts_that_are_filled_up(tmp_path: Path) -> None:
    """The configuration ties their width, so that zeros stand behind their neurons: rows of scales are as without."""
    model = tiny("deepseek_v3", tmp_path / "source")
    wanted = quantize(source(model), *slimming(model, "per_layer").steps, group_size=0)
    compressor.apply(wanted, source=tmp_path / "source", destination=tmp_path / "out")
    loaded, name = compressor.load(tmp_path / "out"), "model.layers.2.mlp.shared_experts.up_proj.weight"
    filled = loaded.state_dict()[name]
    with compressor.edited(model, wanted):
        near(run(loaded), run(model), 1e-6)
    kept = filled.any(1).sum()
    assert 0 < kept < len(filled) and not filled[kept:].any()


@pytest.mark.parametrize("family", ["nemotron_h", "qwen2_moe", "ernie4_5_moe", "minimax_m2"])
def test_experts_of_other_names(tmp_path: Path, family: str) -> None:
    """Without gate, with a gate for the shared expert, with selection biases, and w1 beside block_sparse_moe."""
    model = saved(family, tmp_path / "source")
    wanted = quantize(source(model), group_size=0)
    compressor.apply(wanted, source=tmp_path / "source", destination=tmp_path / "out")
    loaded = compressor.load(tmp_path / "out")
    with compressor.edited(model, wanted):
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    compressor.verify(tmp_path / "out")


@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text", "minimax_m3_vl_text"])
def test_experts_in_one_tensor_are_refused(tmp_path: Path, family: str) -> None:
    model = saved(family, tmp_path / "source")
    with pytest.raises(PlanError, match="use form dense"):
        compressor.apply(alike(model, 4, group_size=0), source=tmp_path / "source", destination=tmp_path / "out")
    wanted = alike(model, 4, group_size=0, form="dense")
    receipt = compressor.apply(wanted, source=tmp_path / "source", destination=tmp_path / "out")
    assert receipt.widths is not None and receipt.widths.passed
    loaded = compressor.load(tmp_path / "out")
    with compressor.edited(model, wanted):
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name]), name


def test_what_is_packed_is_not_packed_again(tmp_path: Path) -> None:
    model = tiny("olmoe", tmp_path / "source")
    compressor.apply(alike(model, 4), source=tmp_path / "source", destination=tmp_path / "once")
    with pytest.raises(PlanError, match="dequantize"):
        compressor.apply(alike(model, 4), source=tmp_path / "once", destination=tmp_path / "twice")
    # One width for all names no expert by number, so that whole experts can go.
    receipt = compressor.apply(
        plan(source(model), dropping(model)), source=tmp_path / "once", destination=tmp_path / "less"
    )
    assert any("quantized experts were left out whole" in note for note in receipt.notes)
    both = quantize(source(model), dropping(model), widths=(4,))
    loaded = compressor.load(tmp_path / "less")
    with compressor.edited(model, both):
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    compressor.apply(quantize(source(model)), source=tmp_path / "source", destination=tmp_path / "mixed")
    with pytest.raises(PlanError, match="names single experts"):
        compressor.apply(
            plan(source(model), dropping(model)), source=tmp_path / "mixed", destination=tmp_path / "never"
        )


def test_dry_run_resume_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("olmoe", tmp_path / "source", shard="200KB")
    wanted = quantize(source(model))
    dry = compressor.apply(wanted, source=tmp_path / "source", destination=tmp_path / "out", dry_run=True)
    assert dry.widths is None and not (tmp_path / "out").exists()
    whole = compressor.apply(wanted, source=tmp_path / "source", destination=tmp_path / "whole")
    assert (whole.bytes_after, whole.tensors_edited) == (dry.bytes_after, dry.tensors_edited)
    assert whole.bytes_after == sum(path.stat().st_size for path in (tmp_path / "whole").glob("*.safetensors"))
    written: list[int] = []

    def stop(done: int, total: int) -> None:
        written.append(done)
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compressor.apply(wanted, source=tmp_path / "source", destination=tmp_path / "out", progress=stop)
    assert not (tmp_path / "out").exists()
    compressor.apply(wanted, source=tmp_path / "source", destination=tmp_path / "out")
    one, two = digest(tmp_path / "out"), digest(tmp_path / "whole")
    one.pop("README.md"), two.pop("README.md")  # which says the result's name
    assert one == two


def test_one_expert_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compressor.checkpoint import editing

    model = tiny("olmoe", tmp_path / "source")
    alive: list[Any] = []
    most, original = 0, editing.pack_expert

    def counted(*args: Any) -> Any:
        import weakref

        nonlocal most
        expert = original(*args)
        alive.append(weakref.ref(expert))
        most = max(most, sum(ref() is not None for ref in alive))
        return expert

    monkeypatch.setattr(editing, "pack_expert", counted)
    compressor.apply(quantize(source(model)), source=tmp_path / "source", destination=tmp_path / "out")
    assert len(alive) == 8 * len(source(model).layers) and most <= 2  # the next is made before the last is let go
