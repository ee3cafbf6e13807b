"""A model as its configuration says, without weights: every parameter on the meta device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from compressor.families.per_layer import own_layers
from compressor.plan import ROUTE
from compressor.routing import stated_route
from moescope.errors import ModelError
from profiler.capture.loading import as_model_error, auto_class, load_config, weight_dtype
from profiler.capture.precision import stored_precision
from profiler.stream.files import stored_tensors


def build_skeleton(folder: Path, *, dtype: str = "auto", device: torch.device | None = None) -> Any:
    """The model of a checkpoint without its weights, of the class that :func:`profiler.load_model` gives.

    Buffers that no checkpoint holds (frequencies of rotary embeddings) are there.

    Args:
        folder: folder of the checkpoint.
        dtype: type of the weights; ``auto`` as the checkpoint says.
        device: where those buffers are made; the CPU if None.

    Raises:
        ModelError: no such folder, no model that can be built, or quantized weights.
        InputError: an unknown dtype.
    """
    wanted = weight_dtype(dtype)
    if not folder.is_dir():
        raise ModelError(
            f"{folder} is no folder: layers are streamed from a checkpoint on disk (hf download ID --local-dir DIR)"
        )
    config = load_config(folder)
    if stated_route(config) is not None:
        raise ModelError(
            f"{folder} runs other experts than its routers choose ({ROUTE}), which is not done layer by layer: leave"
            " out --layer-stream, or stream the model that it was made from"
        )
    precision = stored_precision(config)
    if precision is not None:
        raise ModelError(
            f"{folder} is quantized ({precision.stored}): layers are streamed with plain weights alone; dequantize the"
            " checkpoint first, or leave out --layer-stream"
        )
    with as_model_error(str(folder)):
        if wanted == "auto":
            wanted = config.dtype if getattr(config, "dtype", None) is not None else _stored_dtype(folder)
        with own_layers(config), torch.device("meta"):
            model: Any = auto_class(config).from_config(config, dtype=wanted, trust_remote_code=False)
        _widen(model, wanted)
        _fill_buffers(model, device or torch.device("cpu"))
    return model.eval()


def _stored_dtype(folder: Path) -> torch.dtype:
    types = (tensor.dtype for tensor in stored_tensors(folder).values())
    return next((dtype for dtype in types if dtype.is_floating_point), torch.float32)


def _widen(model: Any, dtype: torch.dtype) -> None:
    """Weights that the family keeps in 32 bits, as loading would."""
    patterns = model._get_dtype_plan(dtype)
    if not patterns:
        return
    from transformers.core_model_loading import build_glob_alternation

    alternation = build_glob_alternation(list(patterns))[0]
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and alternation.search(name):
            tensor.data = tensor.data.float()


def _fill_buffers(model: Any, device: torch.device) -> None:
    """Make the buffers that no checkpoint holds, by the family's own initialisation."""
    for module in model.modules():
        module._is_hf_initialized = True
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers.get(name)
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device=device)
                module._is_hf_initialized = False
    model.initialize_weights()


def output_head(model: Any) -> nn.Module | None:
    """The language-model head; None without one, or where it is tied to the embeddings."""
    head: nn.Module | None = model.get_output_embeddings()
    if head is None or any(name.startswith(f"{_path(model, head)}.") for name in model.all_tied_weights_keys):
        return None
    return head


def _path(model: nn.Module, inner: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is inner)
