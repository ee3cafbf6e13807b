"""What the configuration of a loaded model says of its experts after an edit, so that it fits its modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from compressor.edits.layer import LayerEdit, expert_maps
from compressor.families import EXPERT_MAP
from compressor.families.config_fields import COUNTS, WIDTHS
from compressor.journal import Journal
from compressor.plan import LayerKey
from compressor.sites import Decoder
from moescope.errors import ModelError


def write_sizes(
    journal: Journal, model: nn.Module, decoder: Decoder, edits: Mapping[LayerKey, LayerEdit], kept: Sequence[int]
) -> None:
    """Counts and widths: as one number where layers agree, else layer by layer in ``per_layer_config``.

    The global number is then the largest, and reading it does not raise: modules have numbers of their own.
    """
    config = decoder.config
    part = getattr(config, "ffn_config", config)
    for owner in (config, part) if part is not config else (config,):
        journal.config(owner)
    places = {layer: place for place, layer in enumerate(kept)}
    old = _overrides(config)
    own: dict[int, dict[str, Any]] = {places[layer]: dict(values) for layer, values in old.items() if layer in places}
    for names, column in (
        (COUNTS, {key: (edit.shape.num_experts, edit.routed) for key, edit in edits.items()}),
        (WIDTHS, {key: (edit.shape.width, edit.width) for key, edit in edits.items()}),
    ):
        if all(before == after for before, after in column.values()):
            continue
        known = {before for before, _ in column.values()}
        known |= {vars(config).get(name) for values in old.values() for name in values if name in names}
        name = _field(part, names, known, len(decoder.layers))
        if name is None:
            continue
        sizes = {places[layer]: after for (layer, _), (_, after) in column.items()}
        largest = max(sizes.values())
        _write(part, name, sizes, largest)
        if part is config:  # DBRX keeps its sizes in a part that cannot differ from layer to layer
            for layer, size in sizes.items():
                own.setdefault(layer, {})[name] = size
        if names is COUNTS:
            _write_tops(journal, model, {before for before, _ in column.values()}, largest)
    _write_overrides(config, own)
    maps = expert_maps(edits, places)
    if maps:
        setattr(config, EXPERT_MAP, maps)


def _field(config: Any, names: Sequence[str], values: set[int], layers: int) -> str | None:
    """The first of the names under which a configuration really holds one of the values, or a list of them by layer."""
    for name in names:
        found = vars(config).get(name)
        if found in values if isinstance(found, int) else isinstance(found, list) and len(found) == layers:
            return name
    return None


def _write(config: Any, name: str, sizes: Mapping[int, int], largest: int) -> None:
    old = vars(config)[name]
    if isinstance(old, list):
        setattr(config, name, [sizes.get(layer, value) for layer, value in enumerate(old)])
    else:
        setattr(config, name, largest)


def _overrides(config: Any) -> dict[int, dict[str, Any]]:
    """What the configuration says of single layers already."""
    found = vars(config).get("_heterogeneity_spec")
    return dict(found.per_layer_overrides) if found is not None else {}


def _write_overrides(config: Any, own: dict[int, dict[str, Any]]) -> None:
    if not hasattr(config, "is_heterogeneous"):
        return
    differing = {
        layer: {name: value for name, value in values.items() if vars(config).get(name) != value}
        for layer, values in own.items()
    }
    differing = {layer: values for layer, values in differing.items() if values}
    vars(config).pop("_heterogeneity_spec", None)
    if differing:
        config.per_layer_config = differing
        config.allow_global_per_layer_attribute_access = True


def require_sizes(decoder: Decoder, edits: Mapping[LayerKey, LayerEdit]) -> None:
    """Refuse counts that differ where the family's modules have no count of their own.

    Raises:
        ModelError: it is such a family.
    """
    zaya = any(type(site.router).__name__ == "ZayaRouter" for site in decoder.sites.values())
    if zaya and len({edit.routed for edit in edits.values()}) > 1:
        raise ModelError("routers of Zaya count experts by the model's configuration: keep the same number everywhere")


def _write_tops(journal: Journal, model: nn.Module, before: set[int], after: int) -> None:
    """Counters of the whole model, by which it computes losses of balance."""
    for name in ("num_experts", "num_local_experts"):
        if vars(model).get(name) in before:
            journal.attribute(model, name, after)
