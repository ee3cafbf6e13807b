"""Takes decoder layers out of a loaded model: those behind them move up, and what counts layers is counted anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compressor.families.config_fields import NUM_LAYERS
from compressor.journal import Journal
from compressor.sites import Decoder
from moescope.errors import ModelError

_NUMBERS = ("mlp_only_layers", "moe_layers", "local_layer_ids")
"""Fields with a list of layer numbers."""

_PREFIXES = ("first_k_dense_replace", "num_dense_layers")
"""Fields that count layers from the first on."""

_KINDS = ("layer_types", "layers_block_type")
"""Fields with the kind of every layer; some configurations work it out from periods instead."""

_BETWEEN_LAYERS = ("hidden_size_per_layer_input", "num_kv_shared_layers", "kv_source_layers", "ple_layer_ids")
"""Fields that say that layers depend on others by their numbers."""


def require_removable(decoder: Decoder, kept: Sequence[int]) -> None:
    """Refuse to take layers out where that cannot be done.

    Raises:
        ModelError: layers of this family depend on each other's numbers.
    """
    if len(kept) == len(decoder.layers):
        return
    config = decoder.config
    tied = next((name for name in _BETWEEN_LAYERS if getattr(config, name, None)), None)
    why = f"its configuration says {tied}" if tied else ""
    if not tied and getattr(config, "num_hidden_layers", None) != len(decoder.layers):
        why = "its configuration does not count them"
    stated = any(vars(config).get(name) for name in _KINDS)
    for name in _KINDS if not stated else ():
        kinds = getattr(config, name, None)
        if kinds and [kinds[old] for old in kept] != list(kinds[: len(kept)]):
            why = f"its configuration works {name} out by a rule that the rest would not follow"
    if why:
        raise ModelError(f"decoder layers of {getattr(config, 'model_type', 'this model')} cannot go: {why}")
    for number, layer in enumerate(decoder.layers):
        for module in layer.modules():
            if vars(module).get("layer_idx", number) != number:
                raise ModelError(f"layer {number} calls itself {module.layer_idx}: its decoder layers cannot go")


def remove_layers(journal: Journal, decoder: Decoder, kept: Sequence[int]) -> None:
    """Keep the layers of these numbers; all of them is no change."""
    count, field = len(decoder.layers), _count_field(decoder)
    if len(kept) == count:
        return
    for new, old in enumerate(kept):
        for module in decoder.layers[old].modules():
            if "layer_idx" in vars(module):
                journal.attribute(module, "layer_idx", new)
    journal.modules(decoder.layers, {str(new): decoder.layers[old] for new, old in enumerate(kept)})
    journal.config(decoder.config)
    _recount(decoder.config, field, count, kept)


def _count_field(decoder: Decoder) -> str | None:
    return next((name for name in NUM_LAYERS if vars(decoder.config).get(name) == len(decoder.layers)), None)


def _recount(config: Any, field: str | None, count: int, kept: Sequence[int]) -> None:
    own = vars(config)
    for name, value in list(own.items()):
        if name in _NUMBERS and isinstance(value, list):
            own[name] = [new for new, old in enumerate(kept) if old in value]
        elif isinstance(value, list) and len(value) == count and "layer" in name:
            own[name] = [value[old] for old in kept]
        elif name in _PREFIXES and isinstance(value, int):
            own[name] = sum(old < value for old in kept)
    if field is not None:
        own[field] = len(kept)
