"""While a model is built: every decoder layer gets numbers of its own, and the experts that its file holds.

The library (transformers 5) keeps numbers that differ from layer to layer in ``config.per_layer_config`` and has no
classes that read them. So each layer is built with the configuration of its own place. Where several rows of a layer's
router stand for one expert (``moescope_expert_map``), the layer is built for all rows; then its experts are cut down to
those that are stored, and the map is put before them. Nothing of that stays behind in the process, and the model is one
of the library's own classes, which saves itself as any other.
"""

from __future__ import annotations

import importlib.util
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from compressor.families import EXPERT_MAP, SeparateLayout, adapter_of, takes_expert_map
from compressor.journal import Journal
from compressor.replacement import cut_experts
from moescope.errors import ModelError

_PLACES = ("layer_idx", "block_idx", "layer_id")
"""What decoder layers call their own number when they are built."""

_LOCK = threading.RLock()


@contextmanager
def building(config: Any) -> Iterator[None]:
    """While entered, decoder layers that are built with this configuration are those of their own places.

    Raises:
        ModelError: on leaving, where a layer was not built that shares experts between rows of its router.
    """
    parts = list(_parts(config))
    differing = [part for part in parts if getattr(part, "is_heterogeneous", False)]
    waiting = {int(place) for part in parts for place in getattr(part, EXPERT_MAP, None) or ()}
    if not differing and not waiting:
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
                kind.__init__ = _by_place(original, waiting)
            yield
        finally:
            for kind, original in originals.items():
                kind.__init__ = original
    if waiting:
        raise ModelError(
            f"layer {min(waiting)} of {config.model_type} cannot be built with experts that stand for several rows of"
            f" its router ({EXPERT_MAP})"
        )


def _parts(config: Any) -> Iterator[Any]:
    """A configuration and those inside it."""
    yield config
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if part is not None:
            yield from _parts(part)


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


def _by_place(original: Callable[..., None], waiting: set[int]) -> Callable[..., None]:
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
        places = (getattr(config, EXPERT_MAP, None) or {}).get(str(place))
        if places is not None and _share(self, places):
            waiting.discard(int(str(place)))

    return init


def _share(layer: nn.Module, places: Sequence[int]) -> bool:
    """Cut the experts of a layer down to those that are stored; whether it has such experts."""
    count = len(set(places))
    for module in layer.modules():
        adapter = adapter_of(module)
        layout = adapter.layout(module) if adapter is not None and takes_expert_map(adapter) else None
        if layout is None or isinstance(layout, SeparateLayout):
            continue
        if layout.num_weighted == len(places) and set(places) == set(range(count)):
            journal = Journal(remember=False)
            cut_experts(journal, module, layout, count)
            journal.expert_map(module, places, len(layout.weightless))
            return True
    return False
