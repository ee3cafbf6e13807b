"""Tiny checkpoints on disk, and what plans should make of them, found without the backend."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from compressor.plan import DropLayer, DropStep, Plan, SlimExpert, SlimLayer, SlimStep, Source, Step
from profiler.capture.discovery import inspect_model
from tests.compressor import edit_plans
from tests.profiler.capture.tiny import CONFIGS, batch, build, output_of

NOT_EDITED = {
    "doge": "single rows of two tables",
    "ernie4_5_vl_moe_text": "share one count",
    "switch_transformers": "share one count",
}
"""Families that are refused whatever the plan, and a word of the reason; NLLB has no run, so no plan."""

FAMILIES = [family for family in CONFIGS if family not in (*NOT_EDITED, "nllb-moe")]
LAYOUTS = (
    "olmoe", "mixtral", "deepseek_v3", "gpt_oss", "llama4_text", "dbrx", "granitemoe", "aria_text", "inkling2_text",
    "ernie4_5_moe", "nemotron_h", "gemma4_text", "zaya", "longcat_flash", "mistral_large4_text",
)  # fmt: skip
"""One family for each way in which experts, routers and biases are stored."""


def saved(family: str, folder: Path, *, dtype: torch.dtype = torch.float32, shard: str = "1GB", **changes: Any) -> Any:
    """A tiny model, written as the library writes it."""
    model = build(family, dtype=dtype, **changes)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def source_of(model: nn.Module) -> Source:
    """What a plan says of the model."""
    source = edit_plans.source(model)
    if source.model_type == "dbrx":  # its k stands in a part of the configuration; runs see it in the calls
        layers = tuple(shape.model_copy(update={"top_k": 2}) for shape in source.layers)
        source = source.model_copy(update={"layers": layers})
    return source


def plan_of(model: nn.Module, *steps: Step) -> Plan:
    """A checked plan."""
    return edit_plans.plan(source_of(model), *steps)


def drop(model: nn.Module, gone: Mapping[int, Sequence[int]] | Sequence[int], **more: Any) -> Plan:
    """A plan that drops experts; the same in every layer, or by layer."""
    source = source_of(model)
    by_layer = gone if isinstance(gone, Mapping) else {shape.layer: gone for shape in source.layers}
    layers = tuple(DropLayer(layer=layer, experts=tuple(experts)) for layer, experts in by_layer.items())
    return edit_plans.plan(source, DropStep(method="test", layers=layers, **more))


def slim(model: nn.Module, width: int, form: Any = "uniform") -> tuple[Plan, dict[tuple[int, int], Tensor]]:
    """A plan that keeps random neurons, and (layer, expert) -> mask of them."""
    generator, masks, layers = np.random.default_rng(0), {}, []
    source = source_of(model)
    for shape in source.layers:
        experts = []
        for expert in range(shape.num_experts):
            mask = np.zeros(shape.width, dtype=bool)
            mask[generator.permutation(shape.width)[:width]] = True
            masks[shape.layer, expert] = torch.from_numpy(mask)
            experts.append(SlimExpert.of(expert=expert, mask=mask))
        layers.append(SlimLayer(layer=shape.layer, experts=tuple(experts)))
    stored = width if form == "uniform" else None
    return edit_plans.plan(source, SlimStep(method="test", form=form, width=stored, layers=tuple(layers))), masks


def reload(family: str, folder: Path) -> Any:
    """The library's own class, which must find every tensor in its place."""
    kind = getattr(transformers, CONFIGS[family]["model_class"])
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def selected(model: nn.Module, gone: Mapping[int, Sequence[int]]) -> dict[str, Tensor]:
    """The model's state with the experts taken out: index_select of whatever has one entry per expert."""
    state = dict(model.state_dict())
    for layer in inspect_model(model).layers:
        assert layer.layout is not None
        count, kept_rows = layer.layout.num_weighted, set(gone.get(layer.layer, ()))
        kept = torch.tensor([expert for expert in range(count) if expert not in kept_rows])
        block = layer.name.rpartition("experts")[0]
        for name, value in state.items():
            inside = name.startswith(block) and (not block.endswith(f"layers.{layer.layer}.") or _routed(name, block))
            if not inside or "shared_expert" in name or value.ndim == 0:
                continue
            rows = len(value)
            if value.shape[:1] == (1,) and value.shape[-1] == count:
                state[name] = value.index_select(1, kept)
            elif count <= rows <= count + 4 and "gate.down_proj" not in name:
                state[name] = torch.cat([value.index_select(0, kept), value[count:]])
            elif rows == count * layer.layout.width and value.ndim == 2 and "experts.mlp" in name:  # DBRX
                state[name] = value.reshape(count, layer.layout.width, -1).index_select(0, kept).flatten(0, 1)
    return state


def _routed(name: str, block: str) -> bool:
    return name[len(block) :].startswith(("experts.", "router.", "gate."))


def assert_same_state(model: nn.Module, expected: Mapping[str, Tensor]) -> None:
    """Same names, shapes and bits."""
    state = model.state_dict()
    assert set(state) == set(expected)
    for name, value in expected.items():
        assert torch.equal(state[name], value), name


def assert_same_output(one: nn.Module, two: nn.Module) -> None:
    """Logits equal to 1e-5 of the largest; MiniMax' linear attention makes rounding larger."""
    tolerance = 5e-5 if "MiniMaxFor" in type(one).__name__ else 1e-5
    inputs = batch()
    with torch.no_grad():
        first, second = output_of(one(**inputs)), output_of(two(**inputs))
    real = inputs["attention_mask"].bool()
    assert (first - second)[real].abs().max() <= tolerance * second[real].abs().max().clamp(min=1)


def header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file, read by hand."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        content: dict[str, Any] = json.loads(file.read(length))
    content.pop("__metadata__", None)
    return content


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, read by the format's own library."""
    from safetensors.torch import load_file

    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def config(folder: Path) -> dict[str, Any]:
    """config.json."""
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


def digest(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
