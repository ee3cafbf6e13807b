"""What config.json says about routing: which decoder layers are MoE layers, how many experts, how many per token.

Only the configuration is read, no class of the model, so an import needs no torch. The names are those of the families
that transformers knows; a test compares them with what the built models hold.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moescope.errors import InputError, ModelError

_EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts", "num_routed_experts")
_TOP_K = (
    "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts", "router_top_k"
)  # fmt: skip
_LAYERS = ("num_hidden_layers", "n_layers", "num_layers", "n_layer")
_SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
_HIDDEN = ("hidden_size", "d_model", "n_embd", "dim")
_WIDTH = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")
_NESTED = ("text_config", "language_config", "llm_config", "thinker_config", "ffn_config", "decoder")
_TOP_ONE = ("switch_transformers",)
"""Families that always take one expert, and therefore state no number."""

_SPARSE = ("sparse", "moe", "hash_moe")

MAX_BYTES = 16 << 20
"""A config.json is a few kilobytes; more is something else."""


@dataclass(frozen=True)
class ModelShape:
    """What is routed where.

    Attributes:
        layers: decoder-layer index of every MoE layer.
        num_layers: decoder layers, dense ones included.
        num_experts: routed experts E.
        top_k: experts per token; 0 where the configuration does not say.
        num_shared: shared experts beside them.
        expert_width: neurons per expert; 0 where the configuration does not say.
        hidden_size: width of what enters a decoder layer; 0 where the configuration does not say.
    """

    layers: tuple[int, ...]
    num_layers: int
    num_experts: int
    top_k: int = 0
    num_shared: int = 0
    expert_width: int = 0
    hidden_size: int = 0


def read_config(path: Path) -> dict[str, Any]:
    """The content of ``config.json`` in a folder, or of the file itself.

    Raises:
        InputError: there is none, or it is no JSON object.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"--config {path}: there is no {file.name}; give a model's folder or its config.json")
    if file.stat().st_size > MAX_BYTES:
        raise InputError(f"--config {file}: {file.stat().st_size} bytes are no configuration; give a config.json")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"--config {file} is no JSON: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise InputError(f"--config {file} holds no JSON object; give a model's config.json")
    return content


def model_shape(config: Mapping[str, Any]) -> ModelShape:
    """The shape that a configuration describes.

    Raises:
        ModelError: it names no number of experts or of layers, or numbers that cannot be.
    """
    levels = [config, *(part for name in _NESTED if isinstance(part := config.get(name), Mapping))]
    levels += [part for one in levels[1:] for name in _NESTED if isinstance(part := one.get(name), Mapping)]
    experts = _first(levels, _EXPERTS)
    if experts < 1:
        raise ModelError(
            f"the configuration of {config.get('model_type', 'the model')} names no routed experts"
            f" ({', '.join(_EXPERTS[:4])}): is it a MoE model?"
        )
    holder = next((one for one in reversed(levels) if _number(one, _EXPERTS)), config)
    flat = {**config, **holder}
    layers = _first([flat], _LAYERS) or _first(levels, _LAYERS) or len(_types(flat) or ())
    if layers < 1:
        raise ModelError(f"the configuration names no number of layers ({', '.join(_LAYERS)})")
    experts += _first([flat], ("zero_expert_num",))  # LongCat: experts that put out nothing are selected like others
    top_k = _first(levels, _TOP_K) or int(config.get("model_type") in _TOP_ONE)
    if top_k > experts:
        raise ModelError(f"the configuration takes {top_k} of {experts} experts per token, which cannot be")
    sparse = moe_layers(flat, layers)
    return ModelShape(
        sparse, layers, experts, top_k, num_shared=_first(levels, _SHARED), expert_width=_first([flat], _WIDTH),
        hidden_size=_first([flat], _HIDDEN),
    )  # fmt: skip


def moe_layers(config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """Indices of the decoder layers that hold experts, by whichever of the families' rules the configuration states."""
    types = _types(config)
    if types is not None:
        return tuple(index for index, kind in enumerate(types) if kind in _SPARSE)
    listed = _listed(config)
    if listed is not None:
        return tuple(index for index in listed if 0 <= index < num_layers)
    every = range(num_layers)
    if "expert_layer_period" in config:  # Jamba
        period, offset = _int(config, "expert_layer_period", 1), _int(config, "expert_layer_offset", 0)
        return tuple(index for index in every if index % period == offset)
    if "moe_layer_start_index" in config or "moe_layer_interval" in config:  # ERNIE 4.5
        start, interval = _int(config, "moe_layer_start_index", 0), _int(config, "moe_layer_interval", 1)
        end = _int(config, "moe_layer_end_index", -1)
        last = num_layers - 1 if end < 0 else end
        return tuple(index for index in every if (index + 1) % interval == 0 and start <= index <= last)
    if "interleave_moe_layer_step" in config:  # Llama 4
        step = _int(config, "interleave_moe_layer_step", 1)
        return tuple(index for index in every if (index + 1) % step == 0)
    dense = max(_int(config, "first_k_dense_replace", 0, least=0), _int(config, "num_dense_layers", 0, least=0))
    step, only = _int(config, "decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    frequency = config.get("moe_layer_freq", 1)
    frequency = frequency if isinstance(frequency, int) and frequency > 0 else 1
    return tuple(
        index
        for index in every
        if index >= dense and index not in only and (index + 1) % step == 0 and index % frequency == 0
    )


def _types(config: Mapping[str, Any]) -> list[str] | None:
    """The kind of every layer's MLP, where the configuration lists them."""
    types = config.get("mlp_layer_types")
    if isinstance(types, list) and types and all(isinstance(kind, str) for kind in types):
        return types
    pattern = config.get("hybrid_override_pattern")  # Nemotron-H: one letter per block, E = experts
    if isinstance(pattern, str) and "E" in pattern:
        return ["sparse" if letter == "E" else "dense" for letter in pattern]
    blocks = config.get("layers_block_type")
    if isinstance(blocks, list) and "moe" in blocks:
        return ["sparse" if kind == "moe" else "dense" for kind in blocks]
    frequency = config.get("moe_layer_freq")  # a list in some families: 0 or 1 per layer
    if isinstance(frequency, list):
        return ["sparse" if flag else "dense" for flag in frequency]
    return None


def _listed(config: Mapping[str, Any]) -> list[int] | None:
    """The MoE layers themselves, where the configuration lists them."""
    listed = config.get("moe_layers", config.get("moe_layers_enum"))
    if isinstance(listed, str) and all(part.strip().isdigit() for part in listed.split(",")):
        return [int(part) for part in listed.split(",")]
    if isinstance(listed, list) and listed and all(isinstance(index, int) for index in listed):
        return listed
    return None


def _first(levels: list[Mapping[str, Any]], names: tuple[str, ...]) -> int:
    """The first positive whole number under one of the names, inner levels first; 0 where there is none."""
    for one in reversed(levels):
        if value := _number(one, names):
            return value
    return 0


def _number(config: Mapping[str, Any], names: tuple[str, ...]) -> int:
    for name in names:
        value = config.get(name)
        if isinstance(value, list) and value and isinstance(value[0], int):
            value = value[0]
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return 0


def _int(config: Mapping[str, Any], name: str, default: int, *, least: int | None = None) -> int:
    value = config.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool):
        return default
    floor = 1 if default == 1 else (least if least is not None else value)
    return max(value, floor)
