"""What a plan may not ask of channels and activations, and what of it no checkpoint can hold."""

from __future__ import annotations

from compressor.plan.bits import QuantizeStep
from compressor.plan.document import Plan
from moescope.errors import PlanError


def check_smoothing(plan: Plan) -> None:
    """Refuse smoothing that lacks channels, or that the form cannot hold.

    Raises:
        PlanError: with the layer, and what would do.
    """
    source = plan.source
    for step in plan.steps:
        if not isinstance(step, QuantizeStep) or step.smoothing is None:
            continue
        if step.form != "dense":
            raise PlanError(f"smoothing changes norms and routers, which form {step.form} lacks: use form dense")
        if source.expert_size != source.hidden_size:
            raise PlanError(
                f"the experts of {source.model_type} read {source.expert_size} channels of their own, not the"
                f" {source.hidden_size} of a norm: plan without smoothing"
            )
        named = [(layer.layer, layer.step) for layer in step.layers]
        known = [(layer.layer, layer.step) for layer in step.channels]
        for key in sorted({*named, *known}):
            if named.count(key) != 1 or known.count(key) != 1:
                raise PlanError(
                    f"layer {key[0]} stands {named.count(key)} times among the layers and {known.count(key)} times"
                    " among the channels of the plan's quantize step: smoothing takes each once"
                )
        for channels in step.channels:
            try:
                channels.values(source.hidden_size)
            except ValueError as error:
                raise PlanError(f"the plan's channels: {error}") from error


def require_stored(plan: Plan) -> None:
    """Refuse what a model in memory can be given and no checkpoint.

    Raises:
        PlanError: with what to do.
    """
    for step in plan.steps:
        if not isinstance(step, QuantizeStep):
            continue
        if step.activation_bits is not None:
            raise PlanError(
                f"the plan narrows activations to {step.activation_bits} bits, which is the engine's to do and stands"
                " in no checkpoint, and no exporter carries it yet: measure the plan in memory (compressor.edited), or"
                " apply one without activation_bits"
            )
        if step.smoothing is not None:
            raise PlanError(
                "the plan smooths channels, which changes norms and routers that a checkpoint job leaves alone: edit"
                " the model in memory (compressor.edit) and save it, or plan without smoothing"
            )
