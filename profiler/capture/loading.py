"""Load a model to be watched, with every failure as one line."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moescope.errors import InputError, ModelError, MoescopeError


def load_tokenizer(path_or_id: str | Path, *, revision: str | None = None) -> Any:
    """The tokenizer of a folder or a hub id: small, so that a corpus can be refused before a model is loaded.

    Raises:
        ModelError: there is none; one line.
    """
    from transformers import AutoTokenizer

    options = _options(path_or_id, revision)
    with _as_model_error(f"the tokenizer of {path_or_id}"):
        return AutoTokenizer.from_pretrained(path_or_id, **options)


def load_model(
    path_or_id: str | Path, *, dtype: str = "auto", device: str = "auto", revision: str | None = None
) -> nn.Module:
    """A model from a folder (never touching the network) or a hub id, ready to be watched.

    Code that comes with a checkpoint is never run.

    Args:
        path_or_id: folder of a checkpoint, or id on the hub.
        dtype: ``auto`` (as stored), ``float32``, ``bfloat16`` or ``float16``.
        device: ``cpu``, ``cuda``, ``cuda:1``, ...; ``auto`` is the GPU if there is one, or all if there are several.
        revision: revision of a hub id.

    Raises:
        ModelError: no such model, or a checkpoint that does not load or lacks weights; one line.
        InputError: an unknown dtype.
    """
    from transformers import AutoConfig

    options = _options(path_or_id, revision)
    placement, weights = _placement(device), _dtype(dtype)
    with _as_model_error(f"{path_or_id}"):
        config = AutoConfig.from_pretrained(path_or_id, **options)
        loaded: Any = _auto_class(config).from_pretrained(
            path_or_id,
            config=config,
            dtype=weights,
            device_map="auto" if placement == "spread" else None,
            output_loading_info=True,
            **options,
        )
        model, info = loaded
        missing = sorted(info["missing_keys"])
        if missing:
            raise ModelError(
                f"{path_or_id} lacks {len(missing)} weights, such as {missing[0]}: the checkpoint is incomplete or of"
                " another class, and random weights would be profiled"
            )
        if placement != "spread":
            model = model.to(placement)
    watched: nn.Module = model.eval()
    return watched


def _options(path_or_id: str | Path, revision: str | None) -> dict[str, Any]:
    """How to load: from the folder alone if it is one, and never with a checkpoint's own code."""
    local = Path(path_or_id).is_dir()
    if not local and (Path(path_or_id).exists() or str(path_or_id).startswith((".", "/", "~"))):
        raise ModelError(f"{path_or_id} is no folder with a checkpoint: give the folder that holds config.json")
    return {"local_files_only": local, "revision": revision or "main", "trust_remote_code": False}


def _auto_class(config: Any) -> Any:
    """Language models, and those that read images too, which another class loads."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    with_images = AutoModelForImageTextToText._model_mapping
    language = AutoModelForCausalLM._model_mapping
    return (
        AutoModelForImageTextToText
        if type(config) in with_images and type(config) not in language
        else AutoModelForCausalLM
    )


def _placement(device: str) -> str:
    """A device, or ``spread`` for all GPUs, which accelerate knows how to do."""
    if device != "auto":
        return device
    if not torch.cuda.is_available():
        return "cpu"
    several = torch.cuda.device_count() > 1 and importlib.util.find_spec("accelerate") is not None
    return "spread" if several else "cuda"


def _dtype(name: str) -> Any:
    if name == "auto":
        return "auto"
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"dtype {name!r} is not known: use auto, float32, bfloat16 or float16")
    return dtype


@contextmanager
def _as_model_error(what: str) -> Iterator[None]:
    try:
        yield
    except MoescopeError:
        raise
    except Exception as error:  # whatever a library makes of a broken checkpoint, the user reads one line
        text = " ".join(str(error).split())
        hint = " (moescope never runs code that comes with a checkpoint)" if "trust_remote_code" in text else ""
        raise ModelError(f"{what} cannot be loaded: {text[:300] or type(error).__name__}{hint}") from error
