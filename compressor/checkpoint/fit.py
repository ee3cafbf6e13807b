"""Whether a plan is for this checkpoint, and whether its edits can be made on it: asked before anything is written."""

from __future__ import annotations

from typing import Any

from compressor.checkpoint.files import Checkpoint
from compressor.checkpoint.headers import FLOATS
from compressor.checkpoint.layers import Decoder, check_layer
from compressor.families.checkpoint import REFUSED
from compressor.families.config_fields import TextConfig
from compressor.plan import DropStep, LayerShape, Plan
from moescope.errors import PlanError


def check_model(plan: Plan, config: dict[str, Any], text: TextConfig) -> None:
    """Refuse a plan for another model, and families whose checkpoints are not edited.

    Raises:
        PlanError: with what differs.
    """
    source = plan.source
    types = {str(config.get("model_type")), text.model_type}
    if source.model_type not in types:
        raise PlanError(f"the plan is for a {source.model_type} ({source.model}); the checkpoint is a {text.model_type}")
    for name in types & set(REFUSED):
        raise PlanError(f"checkpoints of {name} are not edited: {REFUSED[name]}")
    if source.num_layers != text.layers:
        raise PlanError(
            f"the plan is for a model of {source.num_layers} decoder layers; the checkpoint has {text.layers}"
            f" ({text.num_layers})"
        )
    hidden = text.content.get("hidden_size", text.content.get("d_model"))
    if isinstance(hidden, int) and hidden != source.hidden_size:
        raise PlanError(f"the plan is for a model of width {source.hidden_size}; the checkpoint's is {hidden} (hidden_size)")
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


def check_layers(plan: Plan, checkpoint: Checkpoint, decoder: Decoder) -> None:
    """Refuse a checkpoint whose MoE layers are not those of the plan, or not complete.

    Raises:
        PlanError: other layers.
        ModelError: a tensor is missing or not known.
    """
    planned = {shape.layer: shape for shape in plan.source.layers}
    if set(planned) != set(decoder.layers):
        other = min(set(planned) ^ set(decoder.layers))
        where = "the checkpoint, not in the plan" if other in decoder.layers else "the plan, not in the checkpoint"
        raise PlanError(f"layer {other} has experts in {where}: the plan is for another model")
    entries = checkpoint.entries
    by_layer: dict[int, list[Any]] = {}
    for name in decoder.names.values():
        if name.stack == decoder.stack:
            by_layer.setdefault(name.layer, []).append(name)
    for number, layer in decoder.layers.items():
        check_layer(layer, by_layer[number], entries, planned[number].num_experts)


def check_shared(plan: Plan, decoder: Decoder) -> None:
    """Refuse shared experts of another width than the plan's.

    Raises:
        PlanError: with both widths.
    """
    for shape in plan.source.layers:
        for name, entry in decoder.layers[shape.layer].shared:
            if name.part == "up" and name.what == "weight" and len(entry.shape) == 2 and entry.dtype in FLOATS:
                if shape.shared_width != entry.shape[0]:
                    raise PlanError(
                        f"the plan is for shared experts of {shape.shared_width} neurons in layer {shape.layer}; the"
                        f" checkpoint's have {entry.shape[0]}"
                    )


def check_quantized(plan: Plan, checkpoint: Checkpoint, decoder: Decoder) -> bool:
    """Whether the experts are quantized; whole experts of those can go where they are stored one by one.

    Raises:
        PlanError: the plan needs more than that.
    """
    declared = checkpoint.config.get("quantization_config") or {}
    packed = next((text for layer in decoder.layers.values() if (text := layer.quantized)), "")
    if not packed:
        return False
    advice = "dequantize the checkpoint first"
    if not all(layer.separate for layer in decoder.layers.values()):
        raise PlanError(f"the experts are quantized and stored together, {packed}: {advice}")
    for step in plan.steps:
        if not isinstance(step, DropStep) or step.blocks or step.form == "padded":
            kind = "a dropped block" if isinstance(step, DropStep) and step.blocks else f"a {step.step} step"
            raise PlanError(f"the experts are quantized, {packed}, and the plan has {kind}: {advice}")
    for layer in decoder.layers.values():
        router = next((entry for name, entry in layer.around if entry.dtype not in FLOATS and name.kind != "table"), None)
        if router is not None:
            raise PlanError(f"{router.name} is quantized ({router.dtype}), so no row of it can go: {advice}")
    if _names_numbers(declared):
        raise PlanError(f"quantization_config names single experts or layers, whose numbers would change: {advice}")
    return True


def _names_numbers(value: Any) -> bool:
    """Whether a setting speaks of experts by number (``...experts.3...``)."""
    import re

    if isinstance(value, dict):
        return any(_names_numbers(entry) or _names_numbers(name) for name, entry in value.items())
    if isinstance(value, (list, tuple)):
        return any(_names_numbers(entry) for entry in value)
    return isinstance(value, str) and bool(re.search(r"experts\.\d+", value))


def shape_of(plan: Plan, layer: int) -> LayerShape:
    """The plan's only shape of a layer."""
    return plan.source.by_key[layer, 0]
