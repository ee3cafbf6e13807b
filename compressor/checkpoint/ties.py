"""Edits that a configuration cannot say, because one of its fields sizes something else, too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from compressor.checkpoint.files import Checkpoint
from compressor.checkpoint.layers import Decoder
from compressor.families.config_fields import TextConfig
from compressor.plan import LayerKey
from moescope.errors import PlanError

if TYPE_CHECKING:
    from compressor.edits.layer import LayerEdit


def check_ties(text: TextConfig, edits: Mapping[LayerKey, LayerEdit], decoder: Decoder, checkpoint: Checkpoint) -> None:
    """Refuse edits that would change something beside the experts.

    Raises:
        PlanError: with the field.
    """
    if any(edit.count != edit.shape.num_experts for edit in edits.values()) and text.model_type == "jetmoe":
        raise PlanError(
            "jetmoe chooses attention heads by as many experts as feed-forward ones (num_local_experts), so neither"
            " count can change alone: plan to slim experts"
        )
    silent = next((layer for (layer, _), edit in edits.items() if edit.zero_output), None)
    if silent is not None and text.content.get("zero_expert_num"):
        raise PlanError(
            f"the MoE block of layer {silent} cannot be dropped: some of its experts give back their input, whatever"
            " the weights"
        )
    if all(edit.width == edit.shape.width for edit in edits.values()):
        return
    if not text.width:
        raise PlanError(
            f"the configuration of {text.model_type} does not say how wide an expert is: plan with form masked"
        )
    _check_dense_layers(text, {edit.shape.width for edit in edits.values()}, decoder, checkpoint)


def _check_dense_layers(text: TextConfig, widths: set[int], decoder: Decoder, checkpoint: Checkpoint) -> None:
    """Some families size dense layers by the field of the experts."""
    if text.width != "intermediate_size":
        return
    for name in decoder.names.values():
        dense = name.stack == decoder.stack and 0 <= name.layer < text.layers and name.layer not in decoder.layers
        if not dense or not name.name.endswith(("up_proj.weight", "gate_up_proj.weight", "w3.weight")):
            continue
        if checkpoint.entries[name.name].shape[0] in widths:
            raise PlanError(
                f"{text.model_type} gives dense layers the width of the experts (intermediate_size), and layer"
                f" {name.layer} is one: plan with form masked"
            )
