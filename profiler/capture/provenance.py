"""Where a run comes from: the model's fingerprint, its configuration, and the versions at work."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor, nn

import store
from compressor.routing import reroute_of
from profiler.capture.discovery import MoELayer, MoEModel

SAMPLES = 64
"""Values per parameter that enter the fingerprint, at equal distances."""


def fingerprint(model: nn.Module, samples: Mapping[str, Tensor] | None = None) -> str:
    """SHA-256 over names, shapes, types and sampled values of the weights, in the order of their names.

    Two checkpoints with equal fingerprints are the same weights for all that a profile is concerned; weights that are
    not in memory (offloaded to disk) enter by name, shape and type alone.

    Args:
        model: the model.
        samples: what :func:`sample` gave of weights that were in memory before, by name.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        values = (samples or {}).get(name) if tensor.is_meta else sample(tensor)
        if values is not None and values.numel():
            digest.update(values.to(torch.float64).numpy().tobytes())
    return digest.hexdigest()


def sample(tensor: Tensor) -> Tensor:
    """(at most SAMPLES,) values of a weight that tell it from others."""
    places = sample_places(tensor.numel())
    plain = tensor.detach()
    try:
        flat = plain.reshape(-1)
    except NotImplementedError:  # quantized tensors (torchao's) know few operations
        flat = plain.dequantize().reshape(-1)
    return flat[places.start : places.stop : places.step].cpu().clone()


def sample_places(values: int) -> range:
    """Where they stand in a weight of so many values."""
    step = max(1, values // SAMPLES)
    return range(0, min(values, step * SAMPLES), step)


def describe_run(
    model: nn.Module,
    found: MoEModel,
    *,
    name: str,
    revision: str,
    origin: str,
    levels: Sequence[str],
    settings: Mapping[str, Any],
    text_kept: bool,
) -> store.RunInfo:
    """What table ``run`` says about this model and this collection, before the first forward."""
    import transformers

    config = getattr(model, "config", found.config)
    parameter = next(model.parameters())
    where = getattr(config, "_name_or_path", "") or type(model).__name__
    return store.RunInfo(
        model=name or (Path(where).name if Path(where).exists() else where),
        model_revision=revision or getattr(config, "_commit_hash", None) or "",
        model_fingerprint=fingerprint(model),
        model_class=type(model).__name__,
        model_type=getattr(config, "model_type", ""),
        model_config=_jsonable(config),
        num_layers=len(found.stack),
        hidden_size=int(getattr(found.config, "hidden_size", 0)),
        dtype=str(parameter.dtype).removeprefix("torch."),
        device=_device_name(parameter.device),
        backend=_backend(found.layers[0]),
        torch_version=torch.__version__,
        transformers_version=transformers.__version__,
        origin=origin,
        levels=",".join(levels),
        settings={**settings, **_stored_dtype(where, parameter.dtype), **_rerouted(found)},
        text_kept=text_kept,
    )


def _rerouted(found: MoEModel) -> dict[str, Any]:
    """Which rules stand between routers and experts; nothing where none does."""
    reroutes = [reroute_of(layer.experts) for layer in found.layers if layer.rerouted]
    rules = {words for one in reroutes if one is not None for words in one.in_words}
    return {"rerouted": sorted(rules)} if rules else {}


def describe_layer(layer: MoELayer, top_k: int) -> store.LayerInfo:
    """A row of table ``layer``; ``top_k`` is what the experts were called with."""
    return store.LayerInfo(
        layer=layer.layer,
        step=layer.step,
        module=layer.name,
        experts_class=type(layer.experts).__name__,
        router_class=type(layer.router).__name__ if layer.router is not None else "",
        num_experts=layer.num_experts,
        top_k=top_k,
        num_shared=layer.num_shared,
        expert_width=layer.expert_width,
        stack=layer.stack,
        granularity=layer.adapter.granularity,
    )


def describe_experts(layer: MoELayer) -> pl.DataFrame:
    """Rows of table ``expert``: the kind of each expert, and whose weights it runs."""
    kinds = list(layer.layout.kinds) if layer.layout is not None else ["routed"] * layer.num_experts
    owners = layer.adapter.owners
    owned = list(owners(layer.experts)) if owners else [(layer.layer, expert) for expert in range(layer.num_experts)]
    columns = {
        "kind": kinds,
        "owner_layer": [owner[0] for owner in owned],
        "owner_expert": [owner[1] for owner in owned],
    }
    frame = pl.DataFrame({"expert": range(layer.num_experts), **columns})
    return frame.with_columns(layer=pl.lit(layer.layer), step=pl.lit(layer.step))


def _stored_dtype(where: str, dtype: torch.dtype) -> dict[str, str]:
    """The type that the checkpoint in a folder keeps its weights in, where the model was loaded in another."""
    try:
        stated = json.loads((Path(where) / "config.json").read_text(encoding="utf-8"))
        stored = str(stated.get("dtype") or stated.get("torch_dtype") or "").removeprefix("torch.")
    except (OSError, ValueError, AttributeError):
        return {}
    return {} if stored in ("", "auto", str(dtype).removeprefix("torch.")) else {"stored_dtype": stored}


def _jsonable(config: Any) -> dict[str, Any]:
    try:
        values = dict(config.to_dict())
    except (AttributeError, TypeError):
        return {}
    values.pop("_name_or_path", None)  # a path on the machine that collected
    return values


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device.type} ({torch.cuda.get_device_name(device)})"
    return device.type


def _backend(layer: MoELayer) -> str:
    return str(getattr(getattr(layer.experts, "config", None), "_experts_implementation", None) or "eager")
