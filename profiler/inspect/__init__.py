"""What can be watched in a model, and the memory, disk and time it takes, before anything runs.

The model is built from its configuration on the meta device: no weight is read or allocated, so a checkpoint of any
size is inspected in a second or two.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.families.plausible import require_plausible_folder
from moescope.errors import ModelError
from profiler.inspect.estimate import (
    EFFICIENCY,
    GIB,
    TEXT_BYTES,
    TRACE_BYTES,
    WEIGHT_BYTES,
    available_gib,
    checkpoint_gib,
    errors_operations,
    flops_per_token,
    forward_bytes,
    measure_gflops,
)
from profiler.inspect.memory import extra_memory, sampled_tokens
from profiler.inspect.report import Inspection, LayerInspection, ranges

if TYPE_CHECKING:
    from torch import nn

    from profiler.capture.discovery import MoELayer, MoEModel

__all__ = ["Inspection", "LayerInspection", "inspect_model", "measure_gflops"]


def inspect_model(
    path_or_id: str | Path,
    *,
    sequence_length: int = 512,
    batch_size: int = 8,
    token_budget: int = 100_000,
    level: str = "routing",
    dtype: str = "auto",
    domains: int = 1,
    gflops: float | None = None,
    stack: str | None = None,
) -> Inspection:
    """Inspect a checkpoint folder or hub id.

    Args:
        path_or_id: folder with a ``config.json`` (weights are not needed), or a hub id.
        level: comma list of what would be recorded.
        dtype: type of the weights while watching, ``auto`` as the configuration says.
        domains: number of domains that the corpus has; statistics are kept for each.
        gflops: speed of the device in GFLOP/s; measured in about half a second if None.
        stack: which layers, where several stacks of the model have experts, see :func:`profiler.watch`.

    Raises:
        ModelError: no such model, a configuration that builds no model, a model without MoE layers or with one that
            cannot be watched, an unknown dtype.
        InputError: an unknown level.
    """
    from profiler.capture.discovery import inspect_model as find
    from profiler.capture.levels import RecordingOptions, parse_levels

    levels = parse_levels(level)
    model, config = _build(str(path_or_id))
    found = find(model, stack=stack)
    dtype = _dtype_name(dtype, config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    of_experts = [sum(p.numel() for p in layer.experts.parameters()) for layer in found.layers]
    idle = sum(
        round(size * (1 - min(1.0, layer.top_k / layer.num_experts)))
        for size, layer in zip(of_experts, found.layers, strict=True)
    )
    weight = dtype if dtype == "float32" else "16 bit"
    measured = gflops is None
    speed = gflops if gflops is not None else measure_gflops(dtype)
    flops = flops_per_token(model, found, parameters - idle, sequence_length)
    batch = batch_size * sequence_length
    options = RecordingOptions(levels)
    operations = flops * token_budget
    if "errors" in levels:
        operations += errors_operations(found, sampled_tokens(token_budget, options.errors_every))
    extra = extra_memory(found, options, batch=batch, tokens=token_budget, domains=domains)
    statistics = {name: size / GIB for name, size in extra.statistics.items()}
    forward = forward_bytes(found, batch, WEIGHT_BYTES[weight]) / GIB
    selections = sum(layer.top_k for layer in found.layers) * token_budget
    weights = {name: parameters * size / GIB for name, size in WEIGHT_BYTES.items()}
    memory = weights[weight] + forward + extra.total / GIB
    moe = {layer.layer for layer in found.layers}
    return Inspection(
        model=str(path_or_id),
        model_class=type(model).__name__,
        model_type=str(getattr(config, "model_type", "")),
        num_layers=len(found.stack),
        hidden_size=int(getattr(found.config, "hidden_size", 0)),
        moe_layers=[_describe(layer, levels) for layer in found.layers],
        dense_layers=[index for index in range(len(found.stack)) if index not in moe],
        parameters=parameters,
        active_parameters=parameters - idle,
        expert_parameters=sum(of_experts),
        dtype=dtype,
        checkpoint_gib=checkpoint_gib(Path(path_or_id)),
        weights_gib=weights,
        expert_weights_gib={name: sum(of_experts) * size / GIB for name, size in WEIGHT_BYTES.items()},
        level=",".join(levels),
        token_budget=token_budget,
        sequence_length=sequence_length,
        batch_size=batch_size,
        statistics_gib=statistics,
        forward_gib=forward,
        recording_gib=extra.total / GIB,
        memory_gib=memory,
        disk_gib={
            "trace": TRACE_BYTES * selections / GIB,
            "statistics": sum(statistics.values()),
            "text": TEXT_BYTES * token_budget / GIB,
        },
        flops_per_token=flops,
        gflops=speed,
        gflops_measured=measured,
        hours=operations / (speed * 1e9 * EFFICIENCY) / 3600,
        warnings=_warnings(str(path_or_id), config, found, levels, memory, sequence_length),
    )


def _build(name: str) -> tuple[nn.Module, Any]:
    """The model on the meta device, and its configuration."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from compressor.families.per_layer import own_layers
    from profiler.capture.loading import load_config, refuse_shared
    from profiler.capture.precision import is_gguf

    _check_folder(name)
    try:
        config = load_config(name) if is_gguf(name) else AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # OSError, ValueError, KeyError, hub errors: whatever a bad file or name leads to
        raise ModelError(f"{name}: its configuration cannot be read ({_one_line(error)}); check config.json") from None
    refuse_shared(config, name)
    from_config: Any = AutoModelForCausalLM.from_config
    try:
        with own_layers(config), torch.device("meta"):
            return from_config(config, trust_remote_code=False), config
    except Exception as error:
        kind = getattr(config, "model_type", "") or "unknown"
        raise ModelError(
            f"{name}: no causal language model can be built of its {kind} configuration ({_one_line(error)})"
        ) from None


def _check_folder(name: str) -> None:
    from profiler.capture.precision import is_gguf

    path = Path(name)
    if is_gguf(name):
        return
    if path.is_file():
        raise ModelError(f"{name} is a file: give the folder that holds the model's config.json, or a .gguf file")
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ModelError(f"{name} has no config.json: give the folder of a Hugging Face checkpoint")
        require_plausible_folder(path)
        return
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not name:
        siblings = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=3)
        raise ModelError(
            f"{name!r} does not exist: " + (f"did you mean {', '.join(near)}?" if near else "check the path")
        )


def _describe(layer: MoELayer, levels: tuple[str, ...]) -> LayerInspection:
    return LayerInspection(
        layer=layer.layer,
        step=layer.step,
        module=layer.name,
        experts_class=type(layer.experts).__name__,
        router_class=type(layer.router).__name__ if layer.router is not None else "",
        num_experts=layer.num_experts,
        top_k=layer.top_k,
        expert_width=layer.expert_width,
        num_shared=layer.num_shared,
        levels=[name for name in levels if layer.layout is not None or name == "routing"],
    )


def _dtype_name(asked: str, config: Any) -> str:
    name = asked
    if asked == "auto":
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        name = str(getattr(config, "dtype", None) or getattr(text, "dtype", None) or "float32")
    name = name.removeprefix("torch.")
    if name not in ("float32", "bfloat16", "float16"):
        raise ModelError(f"dtype {name!r} is not known: use auto, float32, bfloat16 or float16")
    return name


def _warnings(
    name: str, config: Any, found: MoEModel, levels: tuple[str, ...], memory: float, sequence_length: int
) -> list[str]:
    from profiler.capture.precision import gguf_precision, is_gguf, stored_precision

    warnings = []
    packed = [layer.layer for layer in found.layers if layer.layout is None]
    if packed and levels != ("routing",):
        warnings.append(f"layers {ranges(packed)} keep packed weights: levels that need plain ones are refused there")
    precision = gguf_precision(Path(name)) if is_gguf(name) else stored_precision(config)
    if precision is not None:
        warnings.append(
            f"the checkpoint is quantised ({precision.stored}): sizes are those of plain weights, as it loads where the"
            " machine has no kernels for packed ones (docs/checkpoints.md)"
        )
    available = available_gib()
    if available is not None and memory > available:
        warnings.append(f"about {memory:.3g} GiB are needed, {available:.3g} GiB are free on this device")
    longest = getattr(found.config, "max_position_embeddings", None)
    if isinstance(longest, int) and sequence_length > longest:
        warnings.append(f"sequences of {sequence_length} tokens are longer than the {longest} positions of the model")
    return warnings


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
