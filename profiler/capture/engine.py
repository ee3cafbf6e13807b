"""What an engine does to a model that can spoil a capture without a word: graphs, compilation, packing, processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn

from profiler.capture.check_rows import CheckRow
from profiler.capture.discovery import MoELayer
from profiler.capture.precision import precision_of

_PACKED_TYPES = ("float8", "float4", "int8", "uint8", "int4", "uint4", "int32")
_PACKED_CLASSES = ("FP8", "Gguf", "Mxfp4", "Linear4bit", "Linear8bit", "Compressed", "QuantLinear", "HQQ", "NVFP4")


def capturing_graph() -> bool:
    """Whether a CUDA graph is being captured right now: what runs is noted down, to be replayed without Python."""
    return torch.cuda.is_initialized() and bool(torch.cuda.is_current_stream_capturing())


def engine_rows(model: nn.Module, layers: Sequence[MoELayer], levels: Sequence[str]) -> list[CheckRow]:
    """Rows of table ``check`` about how the model is run; what is not the case has no row, but for compilation."""
    rows = [_compiled_row(model)]
    checkpointing = sum(bool(getattr(module, "gradient_checkpointing", False)) for module in model.modules())
    if checkpointing and model.training:
        detail = f"gradient checkpointing is on in {checkpointing} modules: their first pass is counted, not the second"
        rows.append(CheckRow("counted once", "pass", checkpointing, None, detail))
    # Where the configuration says how the weights are kept, the rows on precision say it better.
    packed = _packed_rows(model, layers, levels) if precision_of(model) is None else []
    return [*rows, *packed, *_process_rows()]


def _compiled_row(model: nn.Module) -> CheckRow:
    name = "modules as written"
    frozen = [path for path, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)]
    if frozen:
        detail = f"{len(frozen)} modules are TorchScript ({frozen[0]}): what runs inside them is not seen"
        return CheckRow(name, "warning", len(frozen), 0, detail)
    compiled = sum(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )
    detail = "no module of the model is compiled"
    if compiled:
        detail = f"{compiled} modules are compiled; while they were watched they ran as written, uncompiled"
    return CheckRow(name, "pass", compiled, None, detail)


def _packed_rows(model: nn.Module, layers: Sequence[MoELayer], levels: Sequence[str]) -> list[CheckRow]:
    """What is quantized, by the types of the weights and the names of classes, whatever the configuration says."""
    experts = [layer for layer in layers if _packed_type(layer.experts)]
    if experts:
        layer = experts[0]
        kind = f"{type(layer.experts).__name__}, {_packed_type(layer.experts)}"
        detail = f"the experts of {len(experts)} layers are quantized ({kind}): selections and router scores are those"
        detail += " of the quantized model"
        if layer.layout is None:
            detail += "; norms of the experts' weights cannot be recorded"
        if layer.layout is not None and set(levels) - {"routing"}:
            detail += ", but outputs and neurons are sums over dequantized copies"
            return [CheckRow("weights packed", "warning", len(experts), 0, detail)]
        return [CheckRow("weights packed", "pass", len(experts), None, detail)]
    inside = {id(module) for layer in layers for module in layer.experts.modules()}
    outside = [module for module in model.modules() if id(module) not in inside]
    others = Counter(type(module).__name__ for module in outside if _packed_type(module))
    if not others:
        return []
    kind, count = others.most_common(1)[0]
    detail = f"{sum(others.values())} modules are quantized ({count} {kind}), the experts are not"
    return [CheckRow("weights packed", "pass", sum(others.values()), None, detail)]


def _packed_type(module: nn.Module) -> str:
    """The type or class that gives packed weights away; empty for plain ones."""
    for tensor in module.parameters(recurse=False):
        name = str(tensor.dtype).removeprefix("torch.")
        if tensor.ndim >= 2 and name.startswith(_PACKED_TYPES):
            return name
    name = type(module).__name__
    return name if any(word in name for word in _PACKED_CLASSES) else ""


def _process_rows() -> list[CheckRow]:
    """Each process sees the tokens and experts that came to it."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return []
    count = distributed.get_world_size()
    detail = f"one of {count} processes recorded what came to it: merge the runs of all of them before reading shares"
    return [CheckRow("one process", "warning", count, 1, detail)]
