"""While a model is built: every decoder layer gets numbers of its own, and the experts that its file holds.

Where several rows of a layer's router stand for one expert (``moescope_expert_map``), the layer is built for all rows;
then its experts are cut down to those that are stored, and the map is put before them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from compressor.families import EXPERT_MAP, SeparateLayout, adapter_of, takes_expert_map
from compressor.families.per_layer import own_layers, parts_of
from compressor.journal import Journal
from compressor.replacement import cut_experts
from moescope.errors import ModelError


@contextmanager
def building(config: Any) -> Iterator[None]:
    """While entered, decoder layers that are built with this configuration are those of their own places.

    Raises:
        ModelError: on leaving, where a layer was not built that shares experts between rows of its router.
    """
    waiting = {int(place) for part in parts_of(config) for place in getattr(part, EXPERT_MAP, None) or ()}

    def share(layer: nn.Module, own: Any, place: Any) -> None:
        places = (getattr(own, EXPERT_MAP, None) or {}).get(str(place))
        if places is not None and _share(layer, places):
            waiting.discard(int(str(place)))

    with own_layers(config, built=share if waiting else None):
        yield
    if waiting:
        raise ModelError(
            f"layer {min(waiting)} of {config.model_type} cannot be built with experts that stand for several rows of"
            f" its router ({EXPERT_MAP})"
        )


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
