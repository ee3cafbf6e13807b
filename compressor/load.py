"""``load``: a model from a folder, also one whose layers have counts, widths or top-k of their own.

The library (transformers 5) keeps such numbers in ``config.per_layer_config`` and has no classes that read them. While
a model of this kind is being built, each decoder layer is given the configuration of its own place; nothing of that
stays behind in the process, and the model is one of the library's own classes, which saves itself as any other.
"""

from __future__ import annotations

import inspect
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moescope.errors import ModelError

_PLACES = ("layer_idx", "block_idx", "layer_id")
"""What decoder layers call their own number when they are built."""

_LOCK = threading.RLock()


def load(
    path: str | Path, *, dtype: str | torch.dtype = "auto", device: str | torch.device = "cpu", **options: Any
) -> Any:
    """The model in a folder, ready to be used; by the library's own classes, and never with a checkpoint's own code.

    Args:
        path: folder that holds config.json and weights.
        dtype: of the weights; ``auto`` = as stored.
        device: where the model goes.
        options: of the library's ``from_pretrained``.

    Raises:
        ModelError: no such folder, a checkpoint that brings its own code, does not load, or lacks weights; one line.
    """
    from transformers import AutoConfig

    path = Path(path)
    stated = _config_file(path)
    if options.get("trust_remote_code") or "auto_map" in stated:
        raise ModelError(f"{path} brings code of its own, which is never run: load a checkpoint of a library class")
    with _as_model_error(path):
        config = options.pop("config", None) or AutoConfig.from_pretrained(path, local_files_only=True)
        with _layers_of_their_own(config):
            settings = {"config": config, "dtype": dtype, "local_files_only": True, **options}
            # Of other shapes, too: that way the message can name the weight. None of them is kept.
            settings |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
            model, info = _class(config, stated).from_pretrained(path, **settings)
    _require_whole(path, info)
    return (model if "device_map" in options else model.to(device)).eval()


def _require_whole(path: Path, info: dict[str, Any]) -> None:
    """Refuse weights that the checkpoint does not have: they would be random."""
    other = sorted(info.get("mismatched_keys") or ())
    if other:
        name, stored, wanted = other[0]
        raise ModelError(
            f"{path} holds {name} as {list(stored)} where its configuration wants {list(wanted)}"
            + (f", and {len(other) - 1} more" if len(other) > 1 else "")
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{path} lacks {len(missing)} weights, such as {missing[0]}: the checkpoint is incomplete or of another"
            " class, and they would be random"
        )


def _config_file(path: Path) -> dict[str, Any]:
    try:
        content = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = "it holds no config.json" if isinstance(error, OSError) else f"its config.json is damaged: {error}"
        raise ModelError(f"{path} is no folder with a checkpoint: {why}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} is no folder with a checkpoint: its config.json holds no settings")
    return content


def _class(config: Any, stated: dict[str, Any]) -> Any:
    """The class that the configuration names, where the library has it; else the language model of that family."""
    import transformers

    for name in stated.get("architectures") or ():
        found = getattr(transformers, str(name), None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    return transformers.AutoModelForCausalLM


@contextmanager
def _as_model_error(path: Path) -> Iterator[None]:
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # whatever a library makes of a broken checkpoint, the user reads one line
        text = " ".join(str(error).split())
        raise ModelError(f"{path} cannot be loaded: {text[:300] or type(error).__name__}") from error


@contextmanager
def _layers_of_their_own(config: Any) -> Iterator[None]:
    """While entered, decoder layers that are built with a configuration that differs by layer get their own one."""
    differing = [part for part in _parts(config) if getattr(part, "is_heterogeneous", False)]
    if not differing:
        yield
        return
    for part in differing:
        # The model as a whole reads such numbers for its losses only.
        part.allow_global_per_layer_attribute_access = True
    import transformers.modeling_layers as layers

    with _LOCK:
        _import_modeling(differing)
        found: list[Any] = list(_subclasses(layers.GradientCheckpointingLayer))
        originals = {kind: kind.__init__ for kind in found}
        try:
            for kind, original in originals.items():
                kind.__init__ = _by_layer(original)
            yield
        finally:
            for kind, original in originals.items():
                kind.__init__ = original


def _parts(config: Any) -> Iterator[Any]:
    """A configuration and those inside it."""
    yield config
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if part is not None:
            yield from _parts(part)


def _import_modeling(configs: list[Any]) -> None:
    """Import the modules that define the layers, so that their classes are known."""
    import importlib

    for config in configs:
        package = type(config).__module__.rpartition(".")[0]
        name = type(config).__module__.rpartition(".")[2].replace("configuration_", "modeling_")
        importlib.import_module(f"{package}.{name}")


def _subclasses(kind: type) -> Iterator[type]:
    child: type
    for child in kind.__subclasses__():
        if "__init__" in vars(child):
            yield child
        yield from _subclasses(child)


def _by_layer(original: Callable[..., None]) -> Callable[..., None]:
    """``__init__`` of a decoder layer, with the configuration of its place in the place of the model's."""
    signature = inspect.signature(original)

    def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        config: Any = bound.arguments.get("config")
        place = next((bound.arguments[name] for name in _PLACES if name in bound.arguments), None)
        if place is None or not getattr(config, "is_heterogeneous", False):
            original(self, *args, **kwargs)
            return
        own = config.per_layer_config[place]
        bound.arguments["config"] = own
        original(*bound.args, **bound.kwargs)
        for module in self.modules():
            # Settings of the whole model, such as how experts are run, are changed in its one configuration.
            if getattr(module, "config", None) is own:
                module.config = config

    return init
