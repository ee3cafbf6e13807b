"""What config.json says of routing, against what the built models hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moescope.errors import InputError, ModelError
from profiler.capture.discovery import find_moe_layers
from profiler.importers.model_config import model_shape, read_config
from tests.profiler.capture.tiny import CONFIGS, build

UNSTATED = {
    "dots3_note_text": "the reduced configuration leaves the kinds of layers to its class",
    "unlimited_ocr_text": "the reduced configuration leaves the kinds of layers to its class",
    "dbrx": "the library's router takes one expert whatever ffn_config.moe_top_k says in the reduced configuration",
    "nllb-moe": "cannot be watched",
}


@pytest.mark.parametrize("family", [family for family in CONFIGS if family not in UNSTATED])
def test_shapes_of_all_families(family: str) -> None:
    shape = model_shape(CONFIGS[family]["config"])
    found = find_moe_layers(build(family))
    assert shape.layers == tuple(sorted({layer.layer for layer in found}))
    assert {layer.num_experts for layer in found} == {shape.num_experts}
    assert {layer.top_k for layer in found} == {shape.top_k}


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        ({"num_hidden_layers": 6, "first_k_dense_replace": 3}, (3, 4, 5)),
        ({"num_hidden_layers": 6, "decoder_sparse_step": 2}, (1, 3, 5)),
        ({"num_hidden_layers": 4, "mlp_only_layers": [0, 2]}, (1, 3)),
        ({"num_hidden_layers": 4, "moe_layer_freq": [0, 1, 1, 0]}, (1, 2)),
        ({"num_hidden_layers": 6, "moe_layer_freq": 2, "first_k_dense_replace": 1}, (2, 4)),
        ({"num_hidden_layers": 8, "expert_layer_period": 4, "expert_layer_offset": 1}, (1, 5)),
        ({"num_hidden_layers": 4, "interleave_moe_layer_step": 2}, (1, 3)),
        ({"num_hidden_layers": 5, "moe_layer_start_index": 1, "moe_layer_end_index": 3}, (1, 2, 3)),
        ({"num_hidden_layers": 5, "moe_layers_enum": "3,4"}, (3, 4)),
        ({"num_hidden_layers": 4, "hybrid_override_pattern": "M*EE"}, (2, 3)),
    ],
)
def test_rules_for_dense_layers(config: dict[str, Any], layers: tuple[int, ...]) -> None:
    assert model_shape({"num_experts": 8, "num_experts_per_tok": 2, **config}).layers == layers


def test_a_nested_configuration() -> None:
    text = {"num_local_experts": 16, "num_experts_per_tok": 1, "num_hidden_layers": 3, "moe_intermediate_size": 5}
    shape = model_shape({"model_type": "some_vl", "num_hidden_layers": 99, "text_config": text})
    assert (shape.num_experts, shape.top_k, shape.num_layers, shape.expert_width) == (16, 1, 3, 5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama", "num_hidden_layers": 4}, "llama names no routed experts"),
        ({"num_experts": 8}, "names no number of layers"),
        ({"num_experts": 2, "num_experts_per_tok": 4, "num_hidden_layers": 1}, "takes 4 of 2 experts"),
        ({"num_experts": "8", "num_hidden_layers": 1}, "names no routed experts"),
    ],
)
def test_configurations_that_describe_no_moe(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        model_shape(config)


def test_reading(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"num_experts": 4}))
    assert read_config(tmp_path) == read_config(tmp_path / "config.json") == {"num_experts": 4}
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    for name, message in (("list.json", "no JSON object"), ("deep.json", "is no JSON"), ("none.json", "there is no")):
        with pytest.raises(InputError, match=message):
            read_config(tmp_path / name)
