"""What a forward of the watched model was given, read from the arguments that hooks see."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moescope.errors import CaptureError

MODALITIES = ("text", "image", "video", "audio")
"""What a token stands for, in the order in which the library's processors number it (``mm_token_type_ids``)."""

OUTER_ARGUMENTS = ("input_ids", "attention_mask", "mm_token_type_ids")
"""Arguments that modules around the decoder may have been given though the decoder itself was not."""


@dataclass
class ForwardInputs:
    """What a forward was given, as far as hooks saw it.

    Attributes:
        input_ids: (batch, length) or None where embeddings went in.
        shape: (batch, length).
        attention_mask: as it was passed; only a 2-D one says which tokens are padding.
        cache: the key-value cache that was passed in, None without one.
        device: where the model's inputs are.
        expert_types: (batch, length) 0 for tokens of the text experts, else of the vision experts; None without choice.
        token_types: (batch, length) index into :data:`MODALITIES`, as the processor marked it; None where it did not.
    """

    input_ids: Tensor | None
    shape: tuple[int, int]
    attention_mask: Any
    cache: Any
    device: torch.device
    token_types: Tensor | None = None
    expert_types: Tensor | None = None


def read_inputs(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], outer: Mapping[str, Any]
) -> ForwardInputs:
    """The inputs of the sub-model that owns the decoder layers.

    Args:
        module: that sub-model.
        args: its positional arguments.
        kwargs: its named arguments.
        outer: the :data:`OUTER_ARGUMENTS` of the modules around it, the innermost winning.

    Raises:
        CaptureError: it was called without token ids and without embeddings.
    """
    ids, embeddings, mask, cache = (
        read_argument(module, name, args, kwargs)
        for name in ("input_ids", "inputs_embeds", "attention_mask", "past_key_values")
    )
    if cache is None:
        cache = read_argument(module, "cache_params", args, kwargs)
    source = ids if ids is not None else embeddings
    if source is None:
        raise CaptureError(f"{type(module).__name__} was called without input_ids and without inputs_embeds")
    shape = (int(source.shape[0]), int(source.shape[1]))
    if ids is None and outer.get("input_ids") is not None and tuple(outer["input_ids"].shape) == shape:
        ids = outer["input_ids"]
    # Wrappers may turn the caller's 2-D mask into a 4-D one on the way in; the caller's own says more.
    if getattr(outer.get("attention_mask"), "ndim", 0) == 2:
        mask = outer["attention_mask"]
    types = outer.get("mm_token_type_ids")
    types = types if types is not None and tuple(types.shape) == shape else None
    parted = read_argument(module, "moe_mm_token_type_ids", args, kwargs)
    return ForwardInputs(ids, shape, mask, cache, source.device, types, parted)


def takes_text(module: nn.Module) -> bool:
    """Whether a sub-model is called with token ids or embeddings; others (vision towers) are known by their layers."""
    return bool({"input_ids", "inputs_embeds"} & set(inspect.signature(module.forward).parameters))


def read_hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any], outer: Mapping[str, Any]) -> ForwardInputs:
    """The inputs of a sub-model that takes no text, by those of its first layer; without batch it is one sequence."""
    hidden = (*args, *kwargs.values())[0]
    shape = (1, int(hidden.shape[0])) if hidden.ndim == 2 else (int(hidden.shape[0]), int(hidden.shape[1]))
    mask = outer.get("attention_mask")
    fits = getattr(mask, "ndim", 0) == 2 and tuple(mask.shape) == shape  # type: ignore[union-attr]
    return ForwardInputs(None, shape, mask if fits else None, None, hidden.device)


def read_argument(module: nn.Module, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """An argument of a forward, whether it was passed by name or by position; None if it was not passed."""
    if name in kwargs or not args:
        return kwargs.get(name)
    names = list(inspect.signature(module.forward).parameters)
    place = names.index(name) if name in names else len(args)
    return args[place] if place < len(args) else None


def modules_around(outer: nn.Module, inner: nn.Module) -> list[nn.Module]:
    """The modules from ``outer`` down to the one just around ``inner``."""
    name = next(name for name, module in outer.named_modules() if module is inner)
    parts = name.split(".") if name else []
    return [outer.get_submodule(".".join(parts[:count])) for count in range(len(parts))]


def end_tokens(model: nn.Module) -> tuple[list[int], list[int]]:
    """Ids of end and of padding tokens, by the generation settings if the model has them, else by its configuration."""
    source = getattr(model, "generation_config", None) or getattr(model, "config", None)
    found = []
    for name in ("eos_token_id", "pad_token_id"):
        value = getattr(source, name, None)
        listed = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
        found.append([int(entry) for entry in listed])
    return found[0], found[1]


def modality_tokens(model: nn.Module) -> dict[int, str]:
    """Ids of the tokens that stand for an image, video or audio, by the model's configuration and those inside it."""
    found: dict[int, str] = {}
    for config in _configurations(getattr(model, "config", None)):
        for name, value in vars(config).items():
            match = re.fullmatch(r"(image|video|audio)_token_(id|index)", name)
            if match is not None and isinstance(value, int) and value >= 0:
                found[value] = match[1]
    return found


def _configurations(config: Any) -> Iterator[Any]:
    if config is None:
        return
    yield config
    for name in getattr(config, "sub_configs", None) or ():
        yield from _configurations(getattr(config, name, None))
