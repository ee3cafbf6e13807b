"""Dropping decoder layers: what the configuration says layer by layer moves up with them, or the plan is refused."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from compressor.families.config_fields import PREDICTION_LAYERS, TextConfig
from moescope.errors import PlanError

INDEX_LISTS = (
    "attn_layer_indices",
    "dense_layers",
    "full_attn_idxs",
    "local_layer_ids",
    "mlp_only_layers",
    "moe_layers",
    "ple_layer_ids",
)
"""Lists of layer numbers."""

REFERENCES = ("kv_source_layers",)
"""Lists with one entry per layer, which is the number of another layer."""

THRESHOLDS = (
    "first_k_dense_replace",
    "num_dense_layers",
    "max_window_layers",
    "num_hash_layers",
    "moe_layer_start_index",
)
"""Layers before this one differ from those behind it."""

LAST_LAYERS = ("moe_layer_end_index",)
"""The last layer of a kind."""

PERIODS = {
    "attn_layer_period": "",
    "decoder_sparse_step": "",
    "expert_layer_period": "",
    "full_attention_interval": "layer_types",
    "global_attn_every_n_layers": "layer_types",
    "interleave_moe_layer_step": "moe_layers",
    "layer_group_size": "layer_types",
    "moe_layer_freq": "mlp_layer_types",
    "moe_layer_interval": "",
    "no_rope_layer_interval": "no_rope_layers",
    "sliding_window_pattern": "layer_types",
}
"""Every n-th layer is different; and the list that says it layer by layer, which counts where there is one."""

REFUSED = {
    "hidden_size_per_layer_input": "keeps a slice of one embedding table per layer",
    "num_kv_shared_layers": "lets its last layers use the keys and values of earlier ones",
    "linear_attn_config": "numbers its linear attention layers in a table of its own",
}
"""Fields with which layers cannot be dropped, where they are set."""

REFUSED_FAMILIES = {"beam": "weighs its residual stream by the numbers of the layers"}
"""Families whose layers cannot be renumbered."""

_LOOKS_PERIODIC = re.compile(
    r"(layer|attn|attention|sparse|moe|rope|window).*(period|interval|every|step|freq|pattern)"
)
_NO_LAYERS = re.compile(r"token|architectures|label|section|mtp")


def drop_layers(text: TextConfig, kept: Sequence[int], names: Iterable[str], stack: str) -> None:
    """Make a configuration speak of the layers that are kept.

    Args:
        text: configuration, changed in place.
        kept: old numbers of the layers that stay, ascending.
        names: the tensors of the checkpoint.
        stack: path of the decoder layers.

    Raises:
        PlanError: layers follow a pattern that would break, or something else counts them.
    """
    content, count = text.content, text.layers
    if len(kept) == count:
        return
    _refuse(text, names, stack)
    places = {old: new for new, old in enumerate(kept)}
    _keep_patterns(text, places)
    predicted = max((value for name in PREDICTION_LAYERS if isinstance(value := content.get(name), int)), default=0)
    for name, value in list(content.items()):
        if name in INDEX_LISTS and isinstance(value, list):
            content[name] = [places[layer] for layer in value if layer in places]
        elif name in REFERENCES and isinstance(value, list) and len(value) == count:
            content[name] = _references(name, value, places)
        elif isinstance(value, list) and len(value) in (count, count + predicted) and not _NO_LAYERS.search(name):
            content[name] = [value[layer] for layer in kept]
        elif name in THRESHOLDS and isinstance(value, int):
            content[name] = sum(layer < value for layer in kept)
        elif name in LAST_LAYERS and isinstance(value, int) and value >= 0:
            content[name] = sum(layer <= value for layer in kept) - 1
        elif name == "moe_layers_enum" and isinstance(value, str):
            content[name] = ",".join(str(places[int(layer)]) for layer in value.split(",") if int(layer) in places)
        elif name == "per_layer_config" and isinstance(value, dict):
            content[name] = {str(places[int(layer)]): own for layer, own in value.items() if int(layer) in places}
        elif name == "hybrid_override_pattern" and isinstance(value, str) and len(value) == count:
            content[name] = "".join(value[layer] for layer in kept)
    if isinstance(content[text.num_layers], int):
        content[text.num_layers] = len(kept)


def _refuse(text: TextConfig, names: Iterable[str], stack: str) -> None:
    if text.model_type in REFUSED_FAMILIES:
        raise PlanError(
            f"decoder layers of {text.model_type} cannot be dropped: it {REFUSED_FAMILIES[text.model_type]}"
        )
    for name, reason in REFUSED.items():
        if text.content.get(name):
            raise PlanError(f"decoder layers of {text.model_type} cannot be dropped: it {reason} ({name})")
    root = stack.rpartition(".")[0]
    root = f"{root}." if root else ""
    numbered = re.compile(
        rf"^{re.escape(root)}(?!{re.escape(stack[len(root) :])}\.)(?P<list>[\w.]+?)\.(?P<number>\d+)(\.|$)"
    )
    groups: dict[str, set[int]] = {}
    for name in names:
        if found := numbered.match(name):
            groups.setdefault(found["list"], set()).add(int(found["number"]))
    other = next((group for group, numbers in groups.items() if len(numbers) >= text.layers), "")
    if other and root:
        raise PlanError(
            f"decoder layers of {text.model_type} cannot be dropped: {root}{other} also has one entry for each of them"
        )


def _keep_patterns(text: TextConfig, places: dict[int, int]) -> None:
    content = text.content
    for name, value in content.items():
        if name not in PERIODS and not _LOOKS_PERIODIC.search(name):
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value <= 1:
            continue
        listed = PERIODS.get(name, "")
        if listed and isinstance(content.get(listed), list):
            continue
        moved = next((old for old, new in places.items() if (old - new) % value), None)
        if moved is not None:
            raise PlanError(
                f"every {value}th layer of {text.model_type} differs ({name}); dropping these decoder layers would move"
                f" layer {moved} to {places[moved]} and break that: drop them in multiples of {value}"
            )


def _references(name: str, value: list[int], places: dict[int, int]) -> list[int]:
    for layer in places:
        if value[layer] not in places:
            raise PlanError(f"layer {layer} uses layer {value[layer]} ({name}), which the plan drops")
    return [places[value[layer]] for layer in places]


def leave_out_prediction(text: TextConfig) -> None:
    """No layers that predict further tokens any more."""
    for name in PREDICTION_LAYERS:
        if isinstance(text.content.get(name), int):
            text.content[name] = 0
