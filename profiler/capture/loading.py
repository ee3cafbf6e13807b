"""Load a model to be watched, with every failure as one line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from compressor.families import EXPERT_MAP
from compressor.families.per_layer import own_layers
from compressor.families.plausible import require_plausible_folder
from compressor.routing import put_before
from moescope.errors import InputError, ModelError, MoescopeError
from profiler.capture.placement import Placement, plan_placement, require_fitting
from profiler.capture.precision import (
    DEQUANTIZING,
    Precision,
    experts_width,
    gguf_precision,
    is_gguf,
    remember,
    require_one_scheme,
    stored_precision,
)
from profiler.capture.session_rules import SHARED


def load_tokenizer(path_or_id: str | Path, *, revision: str | None = None) -> Any:
    """The tokenizer of a folder, a GGUF file or a hub id: small, so that a corpus can be refused before a model loads.

    Raises:
        ModelError: there is none; one line.
    """
    from transformers import AutoTokenizer

    place, options = _source(path_or_id, revision)
    with as_model_error(f"the tokenizer of {path_or_id}"):
        return AutoTokenizer.from_pretrained(place, **options)


def load_config(path_or_id: str | Path, *, revision: str | None = None) -> Any:
    """The configuration of a folder, a GGUF file or a hub id.

    Raises:
        ModelError: there is none that can be read, or it is of a model that is not profiled; one line.
    """
    from transformers import AutoConfig

    place, options = _source(path_or_id, revision)
    require_plausible_folder(path_or_id)
    with as_model_error(f"{path_or_id}"):
        config = AutoConfig.from_pretrained(place, **options)
        if "gguf_file" in options:
            _complete_gguf_config(config, Path(path_or_id))
    refuse_shared(config, str(path_or_id))
    return config


def refuse_shared(config: Any, name: str) -> None:
    """Refuse a checkpoint in which experts stand for several rows of their router, which no class of the library loads.

    Raises:
        ModelError: it is one.
    """
    if any(getattr(part, EXPERT_MAP, None) for part in (config, config.get_text_config())):
        raise ModelError(f"{name} {SHARED}")


def load_model(
    path_or_id: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    dequantize: bool | Literal["auto"] = "auto",
    device_map: str | Mapping[str, Any] | None = None,
    memory_limit: str | int | Mapping[int | str, str | int] | None = None,
    offload_folder: str | Path | None = None,
) -> nn.Module:
    """A model from a folder or a GGUF file (never touching the network) or a hub id, ready to be watched.

    Code that comes with a checkpoint is never run. ``docs/checkpoints.md`` says which formats load and how.

    Args:
        path_or_id: folder of a checkpoint, a ``.gguf`` file, or id on the hub.
        dtype: ``auto`` (as stored), ``float32``, ``bfloat16`` or ``float16``.
        device: ``cpu``, ``cuda``, ``cuda:1``, ...; ``auto`` is the GPU if there is one, or all if there are several.
        revision: revision of a hub id.
        dequantize: unpack quantized weights while loading; ``auto`` does it where this machine has no kernels for the
            packed ones. The run says so.
        device_map: see :func:`profiler.capture.placement.plan_placement`.
        memory_limit: weights that each device may hold, such as ``20GiB``; the rest goes to disk.
        offload_folder: where on disk; a temporary folder by default.

    Raises:
        ModelError: no such model, or a checkpoint that does not load, lacks weights, or would be unpacked wrongly; one
            line.
        InputError: an unknown dtype, device map or size, or weights that cannot fit, with numbers.
    """
    weights = weight_dtype(dtype)
    placement = plan_placement(device, device_map, memory_limit, offload_folder)
    place, options = _source(path_or_id, revision)
    config = load_config(path_or_id, revision=revision)
    precision = gguf_precision(Path(path_or_id)) if is_gguf(path_or_id) else stored_precision(config)
    if precision is not None:
        placement = placement.at_once()
    with as_model_error(f"{path_or_id}"), own_layers(config):
        compressed = precision is not None and precision.method == "compressed-tensors"
        width = experts_width(config) if compressed else None
        options |= {"config": config, "dtype": weights, **_dequantizing(config, precision, dequantize)}
        kind = auto_class(config)
        _require_fitting(kind, config, weights, precision, placement)
        if compressed and Path(place).is_dir():
            require_one_scheme(Path(place), width)
        model = _load(kind, place, placement, options)
        if compressed and not Path(place).is_dir():
            require_one_scheme(_snapshot(place, revision), width)
        if precision is not None:
            _remember(model, precision, dequantize)
        put_before(model)
    return model.eval()


def _load(kind: Any, place: str, placement: Placement, options: dict[str, Any]) -> nn.Module:
    with placement.loading() as where:
        model, info = kind.from_pretrained(place, output_loading_info=True, **where, **options)
    placement.belongs_to(model)
    missing = sorted(info["missing_keys"])
    if missing:
        name = "/".join([place, *([options["gguf_file"]] if "gguf_file" in options else [])])
        raise ModelError(
            f"{name} lacks {len(missing)} weights, such as {missing[0]}: the checkpoint is incomplete or of another"
            " class, and random weights would be profiled"
        )
    loaded: nn.Module = model if placement.device_map is not None else model.to(placement.device)
    return loaded


def _source(path_or_id: str | Path, revision: str | None) -> tuple[str, dict[str, Any]]:
    """What to load, and how: from the folder alone if it is one, and never with a checkpoint's own code."""
    path = Path(path_or_id)
    options: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": False}
    if is_gguf(path):
        return str(path.parent), {**options, "local_files_only": True, "gguf_file": path.name}
    local = path.is_dir()
    if not local and path.suffix == ".gguf":
        raise ModelError(f"{path_or_id} is no file: give the path of a .gguf file that is there")
    if not local and (path.exists() or str(path_or_id).startswith((".", "/", "~"))):
        raise ModelError(
            f"{path_or_id} is no folder with a checkpoint: give the folder that holds config.json, or a .gguf file"
        )
    return str(path_or_id), {**options, "local_files_only": local}


def _complete_gguf_config(config: Any, file: Path) -> None:
    """Set what the library leaves at its default though the file states it: widths of the experts."""
    from transformers.integrations.gguf.reader import read_gguf_metadata

    metadata, _ = read_gguf_metadata(str(file))
    family = metadata["general.architecture"]
    widths = {
        "moe_intermediate_size": "expert_feed_forward_length",
        "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    }
    for name, key in widths.items():
        stated = metadata.get(f"{family}.{key}")
        if stated is not None and hasattr(config, name):
            setattr(config, name, int(stated))


def _dequantizing(config: Any, precision: Precision | None, wanted: bool | Literal["auto"]) -> dict[str, Any]:
    """Options that unpack quantized weights, where that is wanted and possible."""
    if precision is None or wanted is False:
        return {}
    if precision.method not in DEQUANTIZING:
        if wanted is True:
            raise ModelError(
                f"{precision.stored} weights cannot be dequantized while loading ({', '.join(DEQUANTIZING)} can): load"
                " them as they are"
            )
        return {}
    # Compressed tensors are unpacked at the first forward at the latest, which is too late for a fingerprint. For the
    # others the library looks itself whether the machine has kernels.
    if wanted is True or precision.method == "compressed-tensors":
        if precision.method == "gguf":
            from transformers import GgufConfig

            return {"quantization_config": GgufConfig(dequantize=True)}
        if isinstance(config.quantization_config, dict):
            config.quantization_config["dequantize"] = True
        else:
            config.quantization_config.dequantize = True
    return {}


def _remember(model: nn.Module, precision: Precision, wanted: bool | Literal["auto"]) -> None:
    # Packed weights are integers or single bytes; what remains of the configuration does not say (GGUF).
    plain = all(tensor.is_floating_point() and tensor.element_size() > 1 for tensor in model.parameters())
    dequantized = plain and precision.method in DEQUANTIZING
    if dequantized and wanted is False:
        raise ModelError(
            f"this machine has no kernels for {precision.stored} weights, and the library unpacked them: load with"
            " dequantize='auto'"
        )
    remember(model, replace(precision, dequantized=dequantized))


def _require_fitting(kind: Any, config: Any, dtype: Any, precision: Precision | None, placement: Placement) -> None:
    """Refuse weights that cannot fit, by a model without memory; where that cannot be built, loading will say why."""
    if precision is not None and (torch.cuda.is_available() or precision.method not in DEQUANTIZING):
        return  # the weights may stay packed, and their size is not the skeleton's
    try:
        with torch.device("meta"):
            skeleton = kind.from_config(config, dtype=None if dtype == "auto" else dtype, trust_remote_code=False)
    except Exception:
        return
    layers = [layer for stack in skeleton.modules() if isinstance(stack, nn.ModuleList) for layer in stack]
    require_fitting(placement, total=_bytes(skeleton), largest=max(map(_bytes, layers), default=0))


def _bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def _snapshot(name: str, revision: str | None) -> Path:
    """The folder of the hub's cache that a model was loaded from."""
    from transformers.utils.hub import cached_file

    return Path(str(cached_file(name, "config.json", revision=revision or "main", local_files_only=True))).parent


def auto_class(config: Any) -> Any:
    """Language models, and those that read images too, which another class loads."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    with_images = AutoModelForImageTextToText._model_mapping
    language = AutoModelForCausalLM._model_mapping
    return (
        AutoModelForImageTextToText
        if type(config) in with_images and type(config) not in language
        else AutoModelForCausalLM
    )


def weight_dtype(name: str) -> Any:
    """The type that a name on the command line means, ``auto`` as it is.

    Raises:
        InputError: no floating-point type of torch.
    """
    if name == "auto":
        return "auto"
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"dtype {name!r} is not known: use auto, float32, bfloat16 or float16")
    return dtype


@contextmanager
def as_model_error(what: str) -> Iterator[None]:
    """Whatever fails inside becomes a ModelError of one line that begins with ``what``."""
    try:
        yield
    except MoescopeError:
        raise
    except Exception as error:  # whatever a library makes of a broken checkpoint, the user reads one line
        text = " ".join(str(error).split())
        hint = " (moescope never runs code that comes with a checkpoint)" if "trust_remote_code" in text else ""
        raise ModelError(f"{what} cannot be loaded: {text[:300] or type(error).__name__}{hint}") from error
