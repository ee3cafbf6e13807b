"""Which fields of a configuration hold the counts and widths of experts, and how each is changed.

Field names differ between families, and the one that a class really reads may be another than the one in the file:
``attribute_map`` translates ``num_experts`` for some. ``per_layer_config`` (transformers 5) takes the real name only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from moescope.errors import ModelError, PlanError

COUNTS: tuple[str, ...] = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts")
TOP_K: tuple[str, ...] = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_top_k",
    "moe_k",
)
WIDTHS: tuple[str, ...] = ("moe_intermediate_size", "expert_ffn_hidden_size", "ffn_hidden_size", "intermediate_size")
NUM_LAYERS: tuple[str, ...] = ("num_hidden_layers", "n_layers", "num_layers", "n_layer")
LAYER_LISTS = ("layers_block_type",)
"""Lists with one entry per decoder layer, which say their number where no field does (Nemotron-H)."""

SHARED_WIDTHS = (
    "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_experts_intermediate_size",
    "shared_intermediate_size", "share_expert_dim",
)  # fmt: skip
SHARED_COUNTS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
ALIKE_ONLY = {
    "axk2": "reads one number for the whole model",
    "dbrx": "keeps such numbers in a part of its configuration that cannot differ from layer to layer",
    "diffusion_gemma_text": "has kinds of layers that have to be alike",
    "dots3_note_text": "has kinds of layers that have to be alike",
    "gemma4_text": "has kinds of layers that have to be alike",
    "openai_privacy_filter": "builds all its layers from one configuration",
    "qwen4_exp_text": "reads one number for the whole model",
}
"""Families whose layers nothing loads with counts or widths of their own."""

PREDICTION_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "mtp_num_layers")
"""Layers that predict further tokens; such layers are left out where their experts would no longer fit."""

READS_NUM_LOCAL_EXPERTS = (
    "gpt_oss", "kolibri1", "mellum", "minimax", "minimax_m2", "minimax_m3_vl_text", "mixtral", "openai_privacy_filter",
    "qwen3_moe", "qwen3_vl_moe_text",
)  # fmt: skip
"""Families whose ``num_experts`` is only another name of ``num_local_experts``; other readers know one of the two."""

IGNORES_SHARED_COUNT = ("deepseek_v4", "hunyuan_v1_moe", "inkling_text")
"""Families that size each shared expert like a routed one, whatever a count beside it says."""

_NOT_TEXT = re.compile(r"vision|audio|talker|code2wav|token2wav|mtp|image")


@dataclass(frozen=True)
class TextConfig:
    """The part of a configuration that speaks of the text decoder; the dictionary itself, not a copy.

    Attributes:
        content: that part.
        experts: where the fields of the experts stand in it; itself but for DBRX (``ffn_config``).
        model_type: of the part, or of the whole where the part has none.
        count: field with the number of experts.
        top_k: field with experts per token; empty where there is none.
        width: field with the neurons per expert; empty where none says it.
        num_layers: field with the number of decoder layers, or a list with one entry for each.
    """

    content: dict[str, Any]
    experts: dict[str, Any]
    model_type: str
    count: str
    top_k: str
    width: str
    num_layers: str

    @property
    def layers(self) -> int:
        """Decoder layers."""
        value = self.content[self.num_layers]
        return len(value) if isinstance(value, list) else int(value)

    @property
    def extra_rows(self) -> int:
        """Rows of the router behind those of the routed experts: of experts without weights, or of shared ones."""
        if self.model_type == "zaya":
            return 1
        name = "n_shared_experts" if self.model_type == "inkling_text" else "zero_expert_num"
        return int(self.content.get(name) or 0)

    def number(self, field: str, layer: int) -> int | None:
        """An integer field, also where it is a list with one entry per layer; None without."""
        value = self.experts.get(field) if field else None
        own = (self.content.get("per_layer_config") or {}).get(str(layer), {}).get(field)
        value = value if own is None else own
        if isinstance(value, list):
            value = value[layer] if layer < len(value) else None
        return value if isinstance(value, int) else None


def find_text_config(config: dict[str, Any]) -> TextConfig:
    """The part of a configuration that has decoder layers and experts.

    Raises:
        ModelError: it has none.
    """
    for part in _parts(config):
        layers = next((name for name in NUM_LAYERS if isinstance(part.get(name), int)), "")
        layers = layers or next((name for name in LAYER_LISTS if isinstance(part.get(name), list)), "")
        nested = part.get("ffn_config")
        experts = nested if isinstance(nested, dict) and "moe_num_experts" in nested else part
        model_type = str(part.get("model_type") or config.get("model_type") or "")
        count = _count_field(experts, model_type)
        if layers and count:
            return TextConfig(
                content=part,
                experts=experts,
                model_type=model_type,
                count=count,
                top_k=next((name for name in TOP_K if name in experts), ""),
                width=next((name for name in WIDTHS if experts.get(name) is not None), ""),
                num_layers=layers,
            )
    raise ModelError(f"the configuration of {config.get('model_type', 'the model')} names no number of experts")


def _parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield config
    for name, value in config.items():
        if isinstance(value, dict) and not _NOT_TEXT.search(name) and name != "ffn_config":
            yield from _parts(value)


def _count_field(experts: dict[str, Any], model_type: str) -> str:
    if model_type in READS_NUM_LOCAL_EXPERTS and experts.get("num_experts") is not None:
        experts.setdefault("num_local_experts", experts["num_experts"])
    return next((name for name in COUNTS if experts.get(name) is not None), "")


@dataclass(frozen=True)
class LayerSizes:
    """What the configuration has to say of one MoE layer.

    Attributes:
        count: stored experts.
        width: neurons per routed expert.
        shared: neurons of the shared experts, merged; 0 without.
    """

    count: int
    width: int
    shared: int = 0


def shared_width(
    text: TextConfig, layer: int, before: LayerSizes, wanted: int, width: int
) -> tuple[int, dict[str, int]]:
    """Neurons that the shared experts are stored with, and the fields that say so.

    Where the configuration ties their width to that of a routed expert, they are filled up to its next multiple.

    Args:
        text: configuration of the source.
        layer: number of the layer in the source.
        before: sizes of the source.
        wanted: neurons that the shared experts keep.
        width: neurons per routed expert afterwards.

    Raises:
        PlanError: the configuration cannot say it.
    """
    if not before.shared:
        return 0, {}
    count_field = next((name for name in SHARED_COUNTS if text.number(name, layer)), "")
    count = text.number(count_field, layer) or 1
    for name in SHARED_WIDTHS:
        value = text.number(name, layer)
        if value and value * count == before.shared and value != before.shared:
            return -(-wanted // count) * count, {name: -(-wanted // count)}
        if value == before.shared:
            return wanted, {name: wanted}
    if (wanted, width) == (before.shared, before.width):
        return wanted, {}
    if text.model_type in IGNORES_SHARED_COUNT or not count_field or count * before.width != before.shared:
        raise PlanError(
            f"{text.model_type} gives its shared expert the width of the routed ones ({text.width}), so neither can be"
            " slimmed alone: plan with form masked"
        )
    return -(-wanted // width) * width, {count_field: -(-wanted // width)}


def write_sizes(
    text: TextConfig, before: dict[int, LayerSizes], after: dict[int, LayerSizes], shared: dict[int, dict[str, int]]
) -> bool:
    """Write the sizes of all MoE layers into the configuration, by their numbers in the source.

    Args:
        text: configuration, changed in place.
        before: sizes of the source.
        after: sizes of the result.
        shared: fields of the shared experts.

    Returns:
        Whether layers differ, so that stock classes cannot load the result.
    """
    fields: dict[int, dict[str, int]] = {}
    for layer, sizes in after.items():
        own = fields[layer] = dict(shared[layer])
        if sizes.count != before[layer].count:
            own[text.count] = sizes.count
        if sizes.width != before[layer].width:
            own[text.width] = sizes.width
    names = {name for own in fields.values() for name in own}
    values = {layer: {name: own.get(name, text.number(name, layer)) for name in names} for layer, own in fields.items()}
    differ = False
    for name in sorted(names):
        column = {layer: int(own[name] or 0) for layer, own in values.items()}
        differ |= _write(text, name, column)
    return differ


def _write(text: TextConfig, name: str, column: dict[int, int]) -> bool:
    largest = max(column.values())
    old = text.experts.get(name)
    if isinstance(old, list):
        text.experts[name] = [column.get(layer, value) for layer, value in enumerate(old)]
    else:
        text.experts[name] = largest
    if name in ("num_experts", "num_local_experts") and text.model_type in READS_NUM_LOCAL_EXPERTS:
        text.experts["num_experts"] = text.experts["num_local_experts"] = text.experts[name]
    if len(set(column.values())) == 1:
        return False
    if text.model_type in ALIKE_ONLY:
        raise PlanError(
            f"the plan leaves layers of {text.model_type} with {min(column.values())} to {largest} ({name}), and it"
            f" {ALIKE_ONLY[text.model_type]}: plan with form uniform"
        )
    own = text.content.setdefault("per_layer_config", {})
    for layer, value in column.items():
        if value != largest:
            own.setdefault(str(layer), {})[name] = value
    return True
