"""Reading what other tools pack: experts packed by compressed-tensors itself, and files that are wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from torch import Tensor

import compressor
from compressor.packed.settings import group_of, read_groups
from moescope.errors import ModelError
from tests.compressor.edited_models import near, run
from tests.compressor.quantize_plans import tiny

EXPERT = re.compile(r"(?P<module>.*\.layers\.(?P<layer>\d+)\..*\.experts\.(?P<expert>\d+)\.(?P<part>\w+))\.weight$")
IN_MEMORY = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
Args = dict[str, Any]

SCHEMES: dict[str, list[Args]] = {
    "groups": [{"num_bits": bits, "strategy": "group", "group_size": 16} for bits in (2, 3, 4, 8)],
    "with zero points": [
        {"num_bits": 2, "strategy": "group", "group_size": 16, "symmetric": False},
        {"num_bits": 3, "strategy": "channel", "symmetric": False},
        {"num_bits": 8, "strategy": "group", "group_size": 8, "symmetric": False},
    ],
    "rows and tensors": [
        {"num_bits": 4, "strategy": "channel"},
        {"num_bits": 8, "strategy": "tensor"},
        {"num_bits": 5, "strategy": "channel"},
    ],
}  # fmt: skip


def width_of(module: str, count: int) -> int:
    """Which scheme a matrix gets: another for every projection, expert and layer."""
    return sum(map(ord, module)) % count


def packed_by_the_library(source: Path, folder: Path, schemes: list[Args], *, renamed: bool = False) -> Path:
    """A checkpoint whose experts compressed-tensors quantized and packed, and beside it one with the values it unpacks.

    Args:
        source: dense.
        folder: of the packed one; the other is ``folder.with_suffix(".dense")``.
        schemes: arguments of the groups.
        renamed: names of modules in memory on disk, and in the targets; as llm-compressor does with Mixtral.
    """
    known = [QuantizationArgs(**args) for args in schemes]
    targets: list[list[str]] = [[] for _ in known]
    packed: dict[str, Tensor] = {}
    dense: dict[str, Tensor] = {}
    for name, weight in load_file(source / "model.safetensors").items():
        found = EXPERT.match(name)
        if not found:
            packed[name] = dense[name] = weight
            continue
        place = width_of(name, len(known))
        args, scheme = known[place], QuantizationScheme(targets=["x"], weights=known[place])
        grouped = weight.reshape(len(weight), -1, args.group_size) if args.group_size else weight[:, None]
        low, high = grouped.amin(-1), grouped.amax(-1)
        if args.strategy == "tensor":
            low, high = low.amin().reshape(1), high.amax().reshape(1)
        scale, zero = calculate_qparams(low, high, args)
        parts = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero.to(torch.int8)}
        parts = PackedQuantizationCompressor.compress(parts, scheme)
        dense[name] = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
        module = found["module"]
        if renamed:
            module = f"{module.removesuffix(found['part'])}{IN_MEMORY[found['part']]}"
            targets[place].append(f"re:.*{re.escape(module.replace('block_sparse_moe', 'mlp'))}$")
        else:
            targets[place].append(f"re:.*{re.escape(module)}$" if int(found["expert"]) % 2 else module)
        packed |= {f"{module}.{suffix}": value.contiguous() for suffix, value in parts.items()}
    groups = {
        f"group_{place}": QuantizationScheme(targets=names, weights=args, format="pack-quantized")
        for place, (args, names) in enumerate(zip(known, targets, strict=True))
    }
    settings = QuantizationConfig(config_groups=groups, format="pack-quantized", ignore=["lm_head"])
    config = json.loads((source / "config.json").read_text())
    write(folder.with_suffix(".dense"), dense, config)
    write(folder, packed, {**config, "quantization_config": json.loads(settings.model_dump_json())})
    return folder


def write(folder: Path, content: dict[str, Tensor], config: dict[str, Any]) -> None:
    folder.mkdir()
    save_file(content, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "deepseek_v3", "mixtral"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_the_library_packs(tmp_path: Path, family: str, scheme: str) -> None:
    model = tiny(family, tmp_path / "source")
    folder = packed_by_the_library(tmp_path / "source", tmp_path / "packed", SCHEMES[scheme])
    loaded, wanted = compressor.load(folder), compressor.load(tmp_path / "packed.dense")
    near(run(loaded), run(wanted), 1e-6)
    assert float((run(model) - run(wanted)).abs().max()) > 1e-3 * float(run(model).abs().max())
    compressor.verify(folder)


def test_names_in_memory_and_on_disk(tmp_path: Path) -> None:
    tiny("mixtral", tmp_path / "source")
    folder = packed_by_the_library(tmp_path / "source", tmp_path / "packed", SCHEMES["groups"], renamed=True)
    names = list(load_file(folder / "model.safetensors"))
    assert any("block_sparse_moe.experts.0.gate_proj.weight_packed" in name for name in names)
    near(run(compressor.load(folder)), run(compressor.load(tmp_path / "packed.dense")), 1e-6)


def test_what_was_loaded_is_an_ordinary_model(tmp_path: Path) -> None:
    tiny("qwen3_moe", tmp_path / "source")
    (tmp_path / "source" / "generation_config.json").write_text(json.dumps({"max_length": 77, "temperature": 0.5}))
    folder = packed_by_the_library(tmp_path / "source", tmp_path / "packed", SCHEMES["groups"])
    (folder / "generation_config.json").write_bytes((tmp_path / "source" / "generation_config.json").read_bytes())
    loaded = compressor.load(folder, dtype="bfloat16")
    assert loaded.dtype == torch.bfloat16 and not loaded.training and loaded.generation_config.max_length == 77
    assert loaded.config.name_or_path == str(folder)
    loaded.save_pretrained(tmp_path / "again")
    again = compressor.load(tmp_path / "again")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_order_of_channels(tmp_path: Path) -> None:
    """Older versions let groups take any channels (actorder: group)."""
    tiny("olmoe", tmp_path / "source")
    schemes = [{"num_bits": 4, "strategy": "group", "group_size": 16, "symmetric": False}]
    folder = packed_by_the_library(tmp_path / "source", tmp_path / "packed", schemes)
    packed, dense = load_file(folder / "model.safetensors"), load_file(tmp_path / "packed.dense" / "model.safetensors")
    module = "model.layers.1.mlp.experts.2.up_proj"
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0)) // 16
    args = QuantizationArgs(**schemes[0])
    original = load_file(tmp_path / "source" / "model.safetensors")[f"{module}.weight"]
    sorted_columns = original[:, order.argsort(stable=True)].reshape(-1, 4, 16)
    scale, zero = calculate_qparams(sorted_columns.amin(-1), sorted_columns.amax(-1), args)
    codes = (original / scale[:, order] + zero[:, order]).round().clamp(-8, 7)
    dense[f"{module}.weight"] = (codes - zero[:, order]) * scale[:, order]
    wide = QuantizationScheme(targets=["x"], weights=QuantizationArgs(num_bits=4, strategy="channel"))
    parts = {"weight": codes, "weight_scale": torch.ones(len(codes), 1)}
    packed[f"{module}.weight_packed"] = PackedQuantizationCompressor.compress(parts, wide)["weight_packed"]
    from compressed_tensors.compressors.pack_quantized import pack_to_int32

    packed[f"{module}.weight_zero_point"] = pack_to_int32(zero.to(torch.int8), 4, packed_dim=0)
    packed[f"{module}.weight_scale"], packed[f"{module}.weight_g_idx"] = scale, order.int()
    save_file(packed, folder / "model.safetensors", {"format": "pt"})
    save_file(dense, tmp_path / "packed.dense" / "model.safetensors", {"format": "pt"})
    near(run(compressor.load(folder)), run(compressor.load(tmp_path / "packed.dense")), 1e-6)


MODULE = "model.layers.1.mlp.experts.3.gate_proj"


def _remove(suffix: str) -> Callable[[dict[str, Tensor], dict[str, Any]], Any]:
    return lambda content, settings: content.pop(f"{MODULE}.{suffix}")


def _shaped(suffix: str, value: Tensor) -> Callable[[dict[str, Tensor], dict[str, Any]], Any]:
    return lambda content, settings: content.update({f"{MODULE}.{suffix}": value})


def _group(**changes: Any) -> Callable[[dict[str, Tensor], dict[str, Any]], Any]:
    return lambda content, settings: settings["config_groups"]["group_0"].update(changes)


def _weights(**changes: Any) -> Callable[[dict[str, Tensor], dict[str, Any]], Any]:
    return lambda content, settings: settings["config_groups"]["group_0"]["weights"].update(changes)


def _stated(**changes: Any) -> Callable[[dict[str, Tensor], dict[str, Any]], Any]:
    return lambda content, settings: settings.update(changes)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_remove("weight_scale"), rf"{MODULE}\.weight_packed and no {MODULE}\.weight_scale"),
        (_remove("weight_zero_point"), rf"no {MODULE}\.weight_zero_point"),
        (_remove("weight_shape"), rf"no {MODULE}\.weight_shape"),
        (_remove("weight_packed"), rf"{MODULE}\.\w+ and no {MODULE}\.weight_packed"),
        (_shaped("weight_shape", torch.tensor([32, 96])), rf"{MODULE}\.weight_packed is I32 \[32, 8\]; 32 x 96"),
        (_shaped("weight_shape", torch.tensor([32, -64])), r"which is no shape"),
        (_shaped("weight_shape", torch.tensor([32])), r"is no shape of a matrix"),
        (_shaped("weight_packed", torch.zeros(32, 4, dtype=torch.int32)), r"4 bits .* would be I32 \[32, 8\]"),
        (_shaped("weight_packed", torch.zeros(32, 8)), r"is F32 \[32, 8\]"),
        (_shaped("weight_scale", torch.ones(32, 2)), r"weight_scale has shape \[32, 2\] for .*, groups of 16"),
        (_shaped("weight_zero_point", torch.ones(4, 2, dtype=torch.int32)), r"weight_zero_point is I32 \[4, 2\]"),
        (_shaped("weight_g_idx", torch.ones(3, dtype=torch.int32)), r"weight_g_idx has shape \[3\] for 64"),
        (_weights(num_bits=8), r"of 8 bits \(group_0 of quantization_config\) would be"),
        (_weights(num_bits=16), r"weights of 16 bits: 1 to 8"),
        (_weights(type="float", num_bits=8), r"group_0 .* type float: only int"),
        (_weights(strategy="block"), r"scales by block"),
        (_group(format="float-quantized"), r"format float-quantized: only pack-quantized"),
        (_group(input_activations={"num_bits": 8}), r"quantizes activations"),
        (_group(targets=["re:.*nothing$"]), r"no group of quantization_config names model\.layers\.0\.mlp"),
        (_group(targets=["re:("]), r"target that cannot be read"),
        (_group(targets=None), r"names no targets"),
        (_stated(config_groups={"W4A16": ["Linear"]}), r"W4A16 of quantization_config does not say"),
        (_stated(config_groups={}), r"no config_groups"),
        (_stated(kv_cache_scheme={"num_bits": 8}), r"quantizes keys and values \(kv_cache_scheme\)"),
        (_stated(transform_config={"config_groups": {}}), r"rotates weights"),
        (_stated(sparsity_config={"format": "sparse-24-bitmask"}), r"stores sparse weights"),
    ],
)  # fmt: skip
def test_files_that_are_wrong(
    packed: Path, tmp_path: Path, damage: Callable[[dict[str, Tensor], dict[str, Any]], Any], reason: str
) -> None:
    content = load_file(packed / "model.safetensors")
    config = json.loads((packed / "config.json").read_text())
    damage(content, config["quantization_config"])
    write(tmp_path / "wrong", content, config)
    for read in (compressor.load, compressor.verify):
        with pytest.raises(ModelError, match=reason) as caught:
            read(tmp_path / "wrong")
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    tiny("qwen3_moe", folder / "source")
    schemes = [{"num_bits": 4, "strategy": "group", "group_size": 16, "symmetric": False}]
    return packed_by_the_library(folder / "source", folder / "model", schemes)


def test_missing_experts_never_pass(packed: Path, tmp_path: Path) -> None:
    content = load_file(packed / "model.safetensors")
    config = json.loads((packed / "config.json").read_text())
    write(tmp_path / "less", {name: value for name, value in content.items() if MODULE not in name}, config)
    with pytest.raises(ModelError, match="lacks 1 weights|cannot be loaded"):
        compressor.load(tmp_path / "less")
    with pytest.raises(ModelError, match="that of expert 3 is missing"):
        compressor.verify(tmp_path / "less")


def test_the_group_of_a_module() -> None:
    def group(*targets: str) -> dict[str, Any]:
        return {"targets": list(targets), "weights": {"num_bits": 4, "group_size": -1}}

    settings = {
        "format": "pack-quantized",
        "config_groups": {
            "all": group("Linear"),
            "first": group(r"re:.*experts\.\d+\.up_proj$"),
            "second": group(r"re:.*experts\.3\."),
            "exact": group("model.layers.0.mlp.experts.3.up_proj"),
        },
    }
    groups = read_groups(settings)
    assert {one.strategy for one in groups} == {"channel"}

    def named(*names: str) -> str:
        found = group_of(groups, names)
        assert found is not None
        return found.name

    assert named("model.layers.0.mlp.experts.3.up_proj") == "exact"
    assert named("model.layers.1.mlp.experts.3.up_proj") == "first"  # the first that matches
    assert named("model.layers.1.mlp.experts.3.down_proj") == "second"
    assert named("model.layers.1.self_attn.q_proj") == "all"
    assert named("block_sparse_moe.experts.3.w3", "mlp.experts.3.up_proj") == "second"  # its own name comes first
    assert group_of(groups[1:], ["model.lm_head"]) is None
