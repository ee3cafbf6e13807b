"""Whether a plan is for this checkpoint, and whether its edits can be made on it: asked before anything is written."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from compressor.checkpoint.files import Checkpoint
from compressor.checkpoint.headers import FLOATS
from compressor.checkpoint.layers import Decoder, check_layer
from compressor.families import EXPERT_MAP
from compressor.families.checkpoint import REFUSED, TensorName
from compressor.families.config_fields import TextConfig
from compressor.plan import ROUTE, DropStep, Plan
from moescope.errors import PlanError

_ADVICE = "dequantize the checkpoint first"


def check_model(plan: Plan, config: dict[str, Any], text: TextConfig) -> None:
    """Refuse a plan for another model, and families whose checkpoints are not edited.

    Raises:
        PlanError: with what differs.
    """
    source = plan.source
    types = {text.model_type, *_model_types(config)}
    if source.model_type not in types:
        raise PlanError(
            f"the plan is for a {source.model_type} ({source.model}); the checkpoint is a {text.model_type}"
        )
    for name in types & set(REFUSED):
        raise PlanError(f"checkpoints of {name} are not edited: {REFUSED[name]}")
    if text.content.get(EXPERT_MAP):
        raise PlanError("the checkpoint was merged in form shared already (moescope_expert_map): plan for its source")
    if text.content.get(ROUTE):
        raise PlanError(f"the checkpoint has a route step already ({ROUTE}): plan for its source")
    unpadded = source.model_copy(update={"model_type": text.model_type}).unpadded
    if unpadded and any(step.form == "padded" and step.layers for step in plan.for_checkpoint):
        raise PlanError(f"{unpadded}: use form per_layer")
    if source.num_layers != text.layers:
        raise PlanError(
            f"the plan is for a model of {source.num_layers} decoder layers; the checkpoint has {text.layers}"
            f" ({text.num_layers})"
        )
    hidden = text.content.get("hidden_size", text.content.get("d_model"))
    if isinstance(hidden, int) and hidden != source.hidden_size:
        raise PlanError(
            f"the plan is for a model of width {source.hidden_size}; the checkpoint's is {hidden} (hidden_size)"
        )
    for shape in source.layers:
        for field, wanted, what in (
            (text.count, shape.num_experts, "experts"),
            (text.top_k, shape.top_k, "experts per token"),
            (text.width, shape.width, "neurons per expert"),
        ):
            found = text.number(field, shape.layer)
            if found is not None and found != wanted:
                raise PlanError(
                    f"the plan is for {wanted} {what} in layer {shape.layer}; the checkpoint has {found} ({field})"
                )


def _model_types(config: dict[str, Any]) -> Iterator[str]:
    """The families that a configuration and its parts name: a run may have seen the whole or a part."""
    if isinstance(config.get("model_type"), str):
        yield config["model_type"]
    for part in config.values():
        if isinstance(part, dict):
            yield from _model_types(part)


def check_layers(plan: Plan, checkpoint: Checkpoint, decoder: Decoder, text: TextConfig) -> None:
    """Refuse a checkpoint whose MoE layers are not those of the plan, or not complete.

    Raises:
        PlanError: other layers, or shared experts of another width.
        ModelError: a tensor is missing or not known.
    """
    planned = {shape.layer: shape for shape in plan.source.layers}
    if set(planned) != set(decoder.layers):
        other = min(set(planned) ^ set(decoder.layers))
        where = "the checkpoint, not in the plan" if other in decoder.layers else "the plan, not in the checkpoint"
        raise PlanError(f"layer {other} has experts in {where}: the plan is for another model")
    by_layer: dict[int, list[TensorName]] = defaultdict(list)
    for name in decoder.names.values():
        if name.stack == decoder.stack:
            by_layer[name.layer].append(name)
    entries = checkpoint.entries
    for number, layer in decoder.layers.items():
        shape = planned[number]
        check_layer(
            layer, by_layer[number], entries, num_experts=shape.num_experts, extra_rows=text.extra_rows
        )  # fmt: skip
        for name, entry in layer.shared:
            plain = name.part == "up" and name.what == "weight" and len(entry.shape) == 2 and entry.dtype in FLOATS
            if plain and shape.shared_width != entry.shape[0]:
                raise PlanError(
                    f"the plan is for shared experts of {shape.shared_width} neurons in layer {number}; the"
                    f" checkpoint's have {entry.shape[0]}"
                )


def check_quantized(plan: Plan, checkpoint: Checkpoint, decoder: Decoder) -> bool:
    """Whether the experts are quantized; whole experts of those can go where they are stored one by one.

    Raises:
        PlanError: the plan needs more than that.
    """
    if _names_numbers(checkpoint.config.get("quantization_config") or {}, plan):
        raise PlanError(f"quantization_config names single experts or layers, whose numbers would change: {_ADVICE}")
    packed = next((text for layer in decoder.layers.values() if (text := layer.quantized)), "")
    if not packed:
        return False
    if not all(layer.separate for layer in decoder.layers.values()):
        raise PlanError(f"the experts are quantized and stored together, {packed}: {_ADVICE}")
    for step in plan.for_checkpoint:
        if not isinstance(step, DropStep) or step.blocks or step.form == "padded":
            kind = "a dropped block" if isinstance(step, DropStep) and step.blocks else f"a {step.step} step"
            raise PlanError(f"the experts are quantized, {packed}, and the plan has {kind}: {_ADVICE}")
    return True


def _names_numbers(value: Any, plan: Plan) -> bool:
    """Whether a setting speaks of experts by number (``...experts.3...``), or of layers where those move up."""
    if isinstance(value, dict):
        return any(_names_numbers(entry, plan) or _names_numbers(name, plan) for name, entry in value.items())
    if isinstance(value, (list, tuple)):
        return any(_names_numbers(entry, plan) for entry in value)
    moves = any(isinstance(step, DropStep) and step.decoder_layers for step in plan.steps)
    names = "(experts|layers)" if moves else "experts"
    pattern = names + r"\\?\.\(?(\?:)?\d"  # also in regular expressions: experts\.3\., experts\.(3|4)\.
    return isinstance(value, str) and bool(re.search(pattern, value))
