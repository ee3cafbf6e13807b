"""What a run knows of its model, as plans need it: shapes, groups, biases, shared experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import polars as pl

import store
from compressor.plan import LayerShape, Source
from moescope.errors import PlanError

TYPE_BYTES = {
    "float32": 4, "bfloat16": 2, "float16": 2, "float64": 8, "float8_e4m3fn": 1, "float8_e5m2": 1,
}  # fmt: skip
"""Bytes of one weight, by the names that runs give to types."""

_GROUPS = ("n_group", "num_expert_group", "num_expert_groups")
_CHOSEN = ("topk_group", "topk_groups")
_NO_GATE = ("nemotron_h", "switch_transformers", "nllb-moe")  # where the run has no weights to tell by
_BIASED = ("use_expert_bias", "use_routing_bias", "moe_router_enable_expert_bias")


def source_of(run: store.Run) -> Source:
    """The model of a run.

    Widths of shared experts, biases and whether experts have a gate projection are read from its recorded weights
    (level activations); without these, from its configuration.

    Raises:
        PlanError: a model whose experts are no list of their own per decoder layer, or whose width is not known.
    """
    _refuse_other_layouts(run)
    info = run.info
    configs = list(_configs(info.model_config))
    groups, chosen = _groups(configs)
    shared, weighted = _shared_widths(run), _routed_counts(run)
    layers = []
    for layer in run.layers:
        key = (layer.layer, layer.step)
        width = shared.get(layer.layer, _configured_shared(configs, layer)) if layer.num_shared else 0
        layers.append(
            LayerShape(
                layer=layer.layer, step=layer.step, num_experts=weighted[key], top_k=min(layer.top_k, weighted[key]),
                width=layer.expert_width, shared_width=width, groups=groups, chosen_groups=chosen,
            )
        )  # fmt: skip
    return Source(
        model=info.model,
        revision=info.model_revision,
        fingerprint=info.model_fingerprint,
        model_type=info.model_type or "unknown",
        hidden_size=info.hidden_size,
        expert_size=_expert_size(run),
        num_layers=max(info.num_layers, run.layers[-1].layer + 1),
        gated=gated_experts(run) is not False,
        selection_bias=_selection_bias(run, configs),
        layers=tuple(layers),
    )


def value_bytes(run: store.Run) -> int | None:
    """Bytes of one weight as the checkpoint keeps it, else in the run's type; None where neither is known."""
    config = run.info.model_config
    stored = run.info.settings.get("stored_dtype") or run.info.dtype or config.get("dtype", config.get("torch_dtype"))
    named = str(stored or "")
    return TYPE_BYTES.get(named.removeprefix("torch."))


PACKED_BITS = {"mxfp4": 4.25, "fp8": 8.0, "fbgemm_fp8": 8.0, "bitsandbytes_4bit": 4.5, "bitsandbytes_8bit": 8.0}
"""Bits of a weight with its scales, by the name of a checkpoint's quantization."""


def packed_bits(run: store.Run) -> float | None:
    """Bits of a weight of the experts where the checkpoint is quantized, scales counted; None where it is not.

    From ``quantization_config``; of those that state ``bits``, one scale of 16 bits and one zero point per group.
    """
    given = next((one["quantization_config"] for one in _configs(run.info.model_config)
                  if isinstance(one.get("quantization_config"), Mapping)), None)  # fmt: skip
    if given is None:
        return None
    method = str(given.get("quant_method", "")).lower()
    if method == "bitsandbytes":
        method += "_8bit" if given.get("load_in_8bit") else "_4bit"
    bits, group = given.get("bits"), given.get("group_size") or 128
    if method in PACKED_BITS or not isinstance(bits, int) or not isinstance(group, int):
        return PACKED_BITS.get(method)
    return bits + (16 + bits) / group if group > 0 else float(bits)


def _refuse_other_layouts(run: store.Run) -> None:
    if not run.layers:
        raise PlanError(f"run {run.name!r} has no MoE layer, so there is nothing to plan")
    for layer in run.layers:
        if layer.stack != "decoder":
            raise PlanError(f"run {run.name!r} has MoE layers in its {layer.stack}; plans number decoder layers only")
        if layer.expert_width < 1 or run.info.hidden_size < 1:
            raise PlanError(
                f"run {run.name!r} does not know the width of the experts of layer {layer.layer}: import it with the"
                " model's --config, or collect it from the model"
            )
        if layer.step:
            raise PlanError(
                f"layer {layer.layer} of {run.info.model} calls its experts several times; they are no list of their"
                " own that could be cut"
            )
    table = run.table("expert")
    foreign = table.filter(pl.col("owner_layer").is_not_null() & (pl.col("owner_layer") != pl.col("layer")))
    if not foreign.is_empty():
        layer, owner = foreign.select("layer", "owner_layer").row(0)
        raise PlanError(f"layer {layer} of {run.info.model} runs the experts of layer {owner}: it has none to cut")


def _routed_counts(run: store.Run) -> dict[tuple[int, int], int]:
    """Routed experts that hold weights; zero, copy and constant experts come behind them."""
    empty = run.table("expert").filter(pl.col("kind") != "routed")
    counts = {}
    for layer in run.layers:
        mine = empty.filter((pl.col("layer") == layer.layer) & (pl.col("step") == layer.step))["expert"].to_list()
        counts[layer.layer, layer.step] = layer.num_experts - len(mine)
        if mine and min(mine) < layer.num_experts - len(mine):
            raise PlanError(
                f"expert {min(mine)} of layer {layer.layer} holds no weights and stands among those that do: such a"
                " layer cannot be cut"
            )
    return counts


def _configs(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The configuration of the text model first, then those around it."""
    for name, value in config.items():
        if isinstance(value, Mapping) and (name.endswith("text_config") or name == "thinker_config"):
            yield from _configs(value)
    yield config


def _first(configs: list[Mapping[str, Any]], *names: str) -> int:
    for config in configs:
        for name in names:
            value = config.get(name)
            if isinstance(value, int) and value > 0:
                return value
    return 0


def _groups(configs: list[Mapping[str, Any]]) -> tuple[int, int]:
    """(groups of experts, groups that a token chooses); (1, 1) where the router does not limit itself to groups."""
    groups = _first(configs, *_GROUPS)
    if groups < 2 or any(config.get("topk_method") == "greedy" for config in configs):
        return 1, 1
    return groups, min(_first(configs, *_CHOSEN) or groups, groups)


def _shared_widths(run: store.Run) -> dict[int, int]:
    rows = run.table("expert_weight").filter((pl.col("kind") == "shared") & pl.col("down_norm").is_not_null())
    return dict(rows.group_by("layer").agg(pl.col("down_norm").list.len().sum().cast(pl.Int64)).iter_rows())


def _configured_shared(configs: list[Mapping[str, Any]], layer: store.LayerInfo) -> int:
    whole = _first(configs, "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size")
    return whole or layer.num_shared * layer.expert_width


def _expert_size(run: store.Run) -> int:
    for table, column in (("expert_vector", "output_sum"), ("expert_similarity", "output_sum")):
        rows = run.table(table).filter(pl.col(column).is_not_null())
        if not rows.is_empty():
            return len(rows[column][0])
    return run.info.hidden_size


def gated_experts(run: store.Run) -> bool | None:
    """Whether experts have a gate projection beside the one up: 3 matrices instead of 2; None where the run knows
    neither their weights nor a model type that has none."""
    layer = run.layers[0].layer if run.layers else 0  # the same in all, and the lists of all are many bytes
    rows = run.table("expert_weight", layer=layer, columns=("gate_norm",)).filter(pl.col("kind") == "routed")
    if rows.is_empty():
        return False if run.info.model_type in _NO_GATE else None
    return bool(rows["gate_norm"].is_not_null().any())


def _selection_bias(run: store.Run, configs: list[Mapping[str, Any]]) -> bool:
    rows = run.table("router_row")
    if not rows.is_empty():
        return any(bool(rows[name].is_not_null().any()) for name in ("selection_bias", "bias") if name in rows.columns)
    return any(
        config.get("topk_method") == "noaux_tc" or any(config.get(name) is True for name in _BIASED)
        for config in configs
    )
