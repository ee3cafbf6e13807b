"""What an engine does to a model is said: compiled and frozen modules, packed weights, checkpointing, processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import profiler
import store
from profiler.capture.engine import engine_rows
from tests.profiler.capture.tiny import batch, build


def engine(model: Any, level: str = "routing") -> dict[str, Any]:
    """What is said about how a model runs: name -> (status, value, sentence)."""
    rows = engine_rows(model, profiler.find_moe_layers(model), level.split(","))
    return {row.name: (row.status, row.value, row.detail) for row in rows}


def test_compiled_modules_are_named_and_watched_as_written(tmp_path: Path) -> None:
    model, inputs = build("olmoe"), batch()
    assert engine(model) == {"modules as written": ("pass", 0, "no module of the model is compiled")}
    for layer in model.model.layers[1:3]:
        layer.mlp.compile(backend="eager")
    with torch.no_grad():
        model(**inputs)
    status, count, detail = engine(model)["modules as written"]
    assert (status, count) == ("pass", 2)
    assert "ran as written" in detail
    with torch.no_grad(), profiler.watch(model, store=tmp_path, name="tiny") as session:
        model(**inputs)
    assert session.path is not None
    run = store.open_run(session.path)
    assert run.badge.status == "valid", run.badge.reasons
    assert run.table("router_load")["tokens"].to_list() == [27] * 4  # hooks in compiled modules would see nothing


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_modules_of_torchscript_are_a_warning() -> None:
    model = build("olmoe")
    model.model.layers[1].input_layernorm = torch.jit.trace(nn.LayerNorm(64), torch.zeros(1, 64))
    assert engine(model)["modules as written"][0] == "warning"


def test_packed_weights_are_named_and_sums_of_copies_warn() -> None:
    model = build("olmoe")
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data = layer.self_attn.q_proj.weight.data.to(torch.float8_e4m3fn)
    status, count, detail = engine(model)["weights packed"]
    assert (status, count) == ("pass", 4)
    assert detail == "4 modules are quantized (4 Linear), the experts are not"

    class FP8LikeExperts(type(model.model.layers[1].mlp.experts)):  # type: ignore[misc]
        """Packed by its name, with weights that can be read: copies that somebody unpacked."""

    model.model.layers[1].mlp.experts.__class__ = FP8LikeExperts
    assert engine(model)["weights packed"][0] == "pass"
    status, _, detail = engine(model, "routing,activations")["weights packed"]
    assert status == "warning"
    assert "sums over dequantized copies" in detail


def test_gradient_checkpointing_is_named() -> None:
    model = build("olmoe").train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    status, _, detail = engine(model)["counted once"]
    assert status == "pass"
    assert "first pass is counted" in detail
    assert "counted once" not in engine(model.eval())


def test_one_process_of_several_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    assert engine(build("olmoe"))["one process"][:2] == ("warning", 4)
