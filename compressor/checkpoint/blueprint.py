"""Plan + checkpoint -> every tensor of the result, before anything is written."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from compressor.checkpoint.depth import drop_layers, leave_out_prediction
from compressor.checkpoint.editing import LayerEditing
from compressor.checkpoint.files import Checkpoint
from compressor.checkpoint.fit import check_layers, check_model, check_quantized, check_shared
from compressor.checkpoint.layers import Decoder, ExpertReader, read_decoder
from compressor.checkpoint.outputs import Output, OutputFile, whole
from compressor.families.config_fields import LayerSizes, TextConfig, find_text_config, shared_width, write_sizes
from compressor.plan import LayerKey, Plan, kept_layers
from moescope.errors import PlanError

if TYPE_CHECKING:
    from compressor.edits.layer import LayerEdit
    from compressor.edits.moments import LayerMoments


@dataclass(frozen=True)
class Blueprint:
    """The result as it will be.

    Attributes:
        files: its safetensors files.
        config: its configuration.
        per_layer: layers differ, so that ``compressor.load`` has to load it.
        copied: tensors whose bytes are those of the source.
        edited: tensors that are computed or put together anew.
        removed: tensors of the source that are no more.
        notes: sentences for the reader.
    """

    files: tuple[OutputFile, ...] = field(repr=False)
    config: dict[str, Any] = field(repr=False)
    per_layer: bool
    copied: int
    edited: int
    removed: int
    notes: tuple[str, ...]

    @property
    def bytes_on_disk(self) -> int:
        """Size of all files."""
        return sum(file.size for file in self.files)


def draw(plan: Plan, checkpoint: Checkpoint, moments: Mapping[LayerKey, LayerMoments] | None = None) -> Blueprint:
    """Check that the plan fits, and say what every file of the result holds.

    Raises:
        PlanError: the plan is for another model, or asks for what this checkpoint cannot hold.
        ModelError: the checkpoint is not complete, or of a family whose names are not known.
    """
    config = copy.deepcopy(checkpoint.config)
    text = find_text_config(config)
    check_model(plan, config, text)
    decoder = read_decoder(checkpoint, model_type=text.model_type, num_layers=text.layers)
    check_layers(plan, checkpoint, decoder)
    quantized = check_quantized(plan, checkpoint, decoder)
    check_shared(plan, decoder)
    edits = _edits(plan, moments or {})
    places = {old: new for new, old in enumerate(kept_layers(plan))}
    shared, per_layer = _configure(plan, text, edits, decoder, places, checkpoint)
    _check_blocks(edits, text)
    notes = _notes(plan, decoder, quantized)
    filled = {layer: width for layer, width in shared.items() if width != edits[layer, 0].shared_width}
    if filled:
        notes.append(
            f"shared experts are filled up with zeros to {max(filled.values())} neurons: the configuration ties their width to"
            " that of the routed experts"
        )
    keep_beyond = config == checkpoint.config
    if not keep_beyond and decoder.beyond:
        leave_out_prediction(text)
        notes.append(
            f"left out: {', '.join(decoder.beyond)} (prediction of further tokens), whose experts no run has seen and which"
            " would no longer fit"
        )
    outputs = defaultdict(list)
    for key, edit in edits.items():
        editing = _editing(plan, text, decoder, edit, key, places, shared, quantized)
        for entry, output in editing.outputs():
            outputs[entry.name].append(output)
    return _put_together(checkpoint, decoder, outputs, places, keep_beyond, config, per_layer, notes)


def _edits(plan: Plan, moments: Mapping[LayerKey, LayerMoments]) -> dict[LayerKey, LayerEdit]:
    from compressor.edits.layer import layer_edits

    return layer_edits(plan, moments)


def _configure(
    plan: Plan, text: TextConfig, edits: Mapping[LayerKey, LayerEdit], decoder: Decoder, places: dict[int, int],
    checkpoint: Checkpoint,
) -> tuple[dict[int, int], bool]:  # fmt: skip
    """Write the configuration; the stored width of the shared experts by layer, and whether layers differ."""
    before, after, fields, shared = {}, {}, {}, {}
    for (layer, _), edit in edits.items():
        shape = edit.shape
        before[layer] = LayerSizes(shape.num_experts, shape.width, shape.shared_width)
        shared[layer], fields[layer] = shared_width(text, layer, before[layer], edit.shared_width, edit.width)
        after[layer] = LayerSizes(edit.count, edit.width, shared[layer])
        if shared[layer] == shape.shared_width and edit.width == shape.width:
            fields[layer] = {}
    _check_ties(text, before, after, decoder, checkpoint)
    differ = write_sizes(text, before, after, fields)
    drop_layers(text, sorted(places), checkpoint.entries, decoder.stack)
    return shared, differ


def _check_ties(
    text: TextConfig, before: dict[int, LayerSizes], after: dict[int, LayerSizes], decoder: Decoder, checkpoint: Checkpoint
) -> None:
    """Fields that also size something else must not change."""
    counts = any(after[layer].count != before[layer].count for layer in after)
    widths = any(after[layer].width != before[layer].width for layer in after)
    if counts and text.model_type == "jetmoe":
        raise PlanError(
            "jetmoe chooses attention heads by as many experts as feed-forward ones (num_local_experts), so neither count can"
            " change alone: plan to slim experts"
        )
    if widths and not text.width:
        raise PlanError(f"the configuration of {text.model_type} does not say how wide an expert is: plan with form masked")
    if widths and text.width == "intermediate_size":
        sizes = {sizes.width for sizes in before.values()}
        for name in decoder.names.values():
            dense = name.stack == decoder.stack and 0 <= name.layer < text.layers and name.layer not in decoder.layers
            if dense and name.name.endswith(("up_proj.weight", "gate_up_proj.weight", "w3.weight")):
                if checkpoint.entries[name.name].shape[0] in sizes:
                    raise PlanError(
                        f"{text.model_type} gives dense layers the width of the experts (intermediate_size), and layer"
                        f" {name.layer} is one: plan with form masked"
                    )


def _check_blocks(edits: Mapping[LayerKey, LayerEdit], text: TextConfig) -> None:
    """Experts that give back their input cannot be silenced by zeros."""
    silent = next((key for key, edit in edits.items() if edit.zero_output), None)
    if silent is not None and text.content.get("zero_expert_num"):
        raise PlanError(
            f"the MoE block of layer {silent[0]} cannot be dropped: some of its experts give back their input, whatever the"
            " weights"
        )


def _editing(
    plan: Plan, text: TextConfig, decoder: Decoder, edit: LayerEdit, key: LayerKey, places: dict[int, int],
    shared: dict[int, int], quantized: bool,
) -> LayerEditing:  # fmt: skip
    layer, shape = decoder.layers[key[0]], edit.shape
    experts = None
    if not quantized:
        experts = ExpertReader(layer, shape.num_experts, shape.width, plan.source.expert_size, text.model_type)
    return LayerEditing(layer, edit, places[key[0]], shared[key[0]], experts, plan.source.hidden_size, text.model_type)


def _put_together(
    checkpoint: Checkpoint, decoder: Decoder, outputs: Mapping[str, list[Output]], places: dict[int, int], keep_beyond: bool,
    config: dict[str, Any], per_layer: bool, notes: list[str],
) -> Blueprint:  # fmt: skip
    placed = {
        entry.name
        for number, layer in decoder.layers.items()
        for _, entry in (*layer.experts, *layer.shared, *layer.around)
    }
    files, removed = [], 0
    for file, entries in checkpoint.shards.items():
        tensors: list[Output] = []
        for entry in entries:
            if entry.name in placed:
                own = outputs.get(entry.name, [])
            else:
                new = _new_name(decoder, entry.name, places, keep_beyond)
                own = [whole(entry, new)] if new else []
            removed += not own
            tensors += own
        if tensors:
            files.append(OutputFile.of(file, tensors, checkpoint.metadata[file]))
    every = [output for file in files for output in file.tensors]
    edited = sum(output.edited for output in every)
    return Blueprint(tuple(files), config, per_layer, len(every) - edited, edited, removed, tuple(notes))


def _new_name(decoder: Decoder, name: str, places: dict[int, int], keep_beyond: bool) -> str:
    """Name in the result of a tensor that is no part of an MoE block; empty where it is left out."""
    read = decoder.names[name]
    for part in decoder.beyond:
        if name.startswith(f"{part}.") or (read.stack == part and part != decoder.stack):
            return name if keep_beyond else ""
    if read.stack != decoder.stack:
        return name
    return read.renumbered(layer=places[read.layer]) if read.layer in places else ""


def _notes(plan: Plan, decoder: Decoder, quantized: bool) -> list[str]:
    notes = []
    if plan.source.fingerprint:
        notes.append("the fingerprint of the run is that of loaded weights and was not compared with the files")
    if quantized:
        first = next(iter(decoder.layers.values())).quantized
        notes.append(f"quantized experts were left out whole, the others copied as they are: {first}")
    return notes
