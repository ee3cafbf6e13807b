"""Models whose layers have numbers of their own: expert counts, widths, k.

The library (transformers 5) keeps such numbers in ``config.per_layer_config`` and has no classes that read them. So
each decoder layer is built with the configuration of its own place. Nothing of that stays behind in the process, and
the model is one of the library's own classes, which saves itself as any other.
"""

from __future__ import annotations

import importlib.util
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

Built = Callable[["nn.Module", Any, Any], None]
"""Told of every decoder layer: (layer, the model's configuration, its place)."""

_PLACES = ("layer_idx", "block_idx", "layer_id")
"""What decoder layers call their own number when they are built."""

_LOCK = threading.RLock()


@contextmanager
def own_layers(config: Any, *, built: Built | None = None) -> Iterator[None]:
    """While entered, decoder layers that are built with this configuration are those of their own places.

    Args:
        config: of the model; nothing happens where all its layers are alike and nobody wants to be told.
        built: told of every layer that was built.
    """
    parts = list(parts_of(config))
    differing = [part for part in parts if getattr(part, "is_heterogeneous", False)]
    if not differing and built is None:
        yield
        return
    for part in differing:
        # The model as a whole reads such numbers for its losses only.
        part.allow_global_per_layer_attribute_access = True
    import transformers.modeling_layers as layers

    with _LOCK:
        _import_modeling(parts)
        found: list[Any] = list(_subclasses(layers.GradientCheckpointingLayer))
        originals = {kind: kind.__init__ for kind in found}
        try:
            for kind, original in originals.items():
                kind.__init__ = _by_place(original, built)
            yield
        finally:
            for kind, original in originals.items():
                kind.__init__ = original


def parts_of(config: Any) -> Iterator[Any]:
    """A configuration and those inside it."""
    yield config
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if part is not None:
            yield from parts_of(part)


def _import_modeling(configs: Sequence[Any]) -> None:
    """Import the modules that define the layers, so that their classes are known."""
    for config in configs:
        package = type(config).__module__.rpartition(".")[0]
        name = type(config).__module__.rpartition(".")[2].replace("configuration_", "modeling_")
        if importlib.util.find_spec(f"{package}.{name}") is not None:
            importlib.import_module(f"{package}.{name}")


def _subclasses(kind: type) -> Iterator[type]:
    child: type
    for child in kind.__subclasses__():
        if "__init__" in vars(child):
            yield child
        yield from _subclasses(child)


def _by_place(original: Callable[..., None], built: Built | None) -> Callable[..., None]:
    """``__init__`` of a decoder layer, with the configuration of its place in the place of the model's."""
    signature = inspect.signature(original)

    def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        config: Any = bound.arguments.get("config")
        place = next((bound.arguments[name] for name in _PLACES if name in bound.arguments), None)
        own = config
        if place is not None and getattr(config, "is_heterogeneous", False):
            own = bound.arguments["config"] = config.per_layer_config[place]
        original(*bound.args, **bound.kwargs)
        for module in self.modules() if own is not config else ():
            # Settings of the whole model, such as how experts are run, are changed in its one configuration.
            if getattr(module, "config", None) is own:
                module.config = config
        if built is not None:
            built(self, config, place)

    return init
