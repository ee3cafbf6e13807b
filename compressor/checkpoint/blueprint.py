"""Plan + checkpoint -> every tensor of the result, before anything is written."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from compressor.checkpoint.depth import drop_layers, leave_out_prediction
from compressor.checkpoint.editing import LayerEditing
from compressor.checkpoint.files import Checkpoint
from compressor.checkpoint.fit import check_layers, check_model, check_quantized
from compressor.checkpoint.layers import Decoder, ExpertReader, read_decoder
from compressor.checkpoint.outputs import Output, OutputFile, whole
from compressor.checkpoint.packing import check_packable, result_settings
from compressor.checkpoint.ties import check_ties
from compressor.families import EXPERT_MAP
from compressor.families.config_fields import LayerSizes, TextConfig, find_text_config, shared_width, write_sizes
from compressor.packed.settings import stated_settings
from compressor.plan import ROUTE, LayerKey, Plan, kept_layers, route_after
from moescope.errors import ModelError, PlanError

if TYPE_CHECKING:
    from compressor.edits.layer import LayerEdit
    from compressor.edits.moments import LayerMoments


PACKED = (
    "weights are packed by compressed-tensors (pack-quantized), which compressor.load reads; AutoModel of transformers"
    " (5.17 and 5.23) takes one width for all experts, and gets other weights without a word where they have several",
    "vLLM reads compressed-tensors; its fused experts take one width per layer. Not tried here",
)
"""What a reader has to know of packed weights."""

ROUTED = (
    "tokens use other experts than their routers choose (moescope_route in config.json), which compressor.load sees to;"
    " AutoModel of transformers and engines that serve ignore the field without a word"
)
"""What a reader has to know of a route step."""


@dataclass(frozen=True)
class Blueprint:
    """The result as it will be.

    Attributes:
        files: its safetensors files.
        config: its configuration.
        per_layer: layers differ, share experts, or follow a route step, so that ``compressor.load`` has to load it.
        packed: so has it, because weights are packed and have widths of their own.
        copied: tensors whose bytes are those of the source.
        edited: tensors that are computed or put together anew.
        removed: tensors of the source that are no more.
        notes: sentences for the reader.
    """

    files: tuple[OutputFile, ...] = field(repr=False)
    config: dict[str, Any] = field(repr=False)
    per_layer: bool
    packed: bool
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
    from compressor.edits.layer import layer_edits

    config = copy.deepcopy(checkpoint.config)
    text = find_text_config(config)
    check_model(plan, config, text)
    decoder = read_decoder(checkpoint, model_type=text.model_type, num_layers=text.layers)
    quantized = check_quantized(plan, checkpoint, decoder)
    check_layers(plan, checkpoint, decoder, text)
    step = check_packable(plan, checkpoint, decoder)
    drawing = _Drawing(plan, checkpoint, text, decoder, layer_edits(plan, moments or {}), quantized)
    per_layer = drawing.configure()
    drawing.fits_beyond = config == checkpoint.config
    route = route_after(plan)
    if route is not None:
        text.content[ROUTE] = route.model_dump(mode="json")
    if text.content.get(EXPERT_MAP) or route is not None:
        _require_loadable(config, "without the route step" if route is not None else "with another form than shared")
    outputs = drawing.outputs()
    files, removed = drawing.files(outputs)
    every = [output for file in files for output in file.tensors]
    edited = sum(output.edited for output in every)
    notes = tuple(drawing.notes())
    if not drawing.fits_beyond and decoder.beyond:
        leave_out_prediction(text)
    if step is not None:
        config["quantization_config"] = result_settings(step, every)
        notes = (*notes, *PACKED)
    if route is not None:
        notes = (*notes, ROUTED)
        per_layer = True
    packed = len((stated_settings(config) or {}).get("config_groups") or ()) > 1 or step is not None
    return Blueprint(tuple(files), config, per_layer, packed, len(every) - edited, edited, removed, notes)


def _require_loadable(config: dict[str, Any], instead: str) -> None:
    from compressor.load import require_loadable

    try:
        require_loadable(config)
    except ModelError as error:
        raise PlanError(f"{error}: plan {instead}") from error


@dataclass
class _Drawing:
    """What is known while a blueprint is drawn.

    Attributes:
        plan: the plan.
        checkpoint: the source.
        text: configuration of the result, which begins as that of the source.
        decoder: the source's MoE layers.
        edits: what becomes of each of them.
        quantized: the experts are quantized.
        shared: layer -> neurons that its shared experts are stored with.
        fits_beyond: layers that predict further tokens still fit the configuration.
    """

    plan: Plan
    checkpoint: Checkpoint
    text: TextConfig
    decoder: Decoder
    edits: Mapping[LayerKey, LayerEdit]
    quantized: bool
    shared: dict[int, int] = field(default_factory=dict)
    fits_beyond: bool = True

    @property
    def places(self) -> dict[int, int]:
        """Number of a decoder layer that stays -> its new number."""
        return {old: new for new, old in enumerate(kept_layers(self.plan))}

    def configure(self) -> bool:
        """Make the configuration that of the result; whether stock classes cannot load it."""
        from compressor.edits.layer import expert_maps

        before, after, fields = {}, {}, {}
        for (layer, _), edit in self.edits.items():
            shape = edit.shape
            before[layer] = LayerSizes(shape.num_experts, shape.width, shape.shared_width)
            stored, own = shared_width(self.text, layer, before[layer], edit.shared_width, edit.width)
            unchanged = (stored, edit.width) == (shape.shared_width, shape.width)
            self.shared[layer], fields[layer] = stored, {} if unchanged else own
            after[layer] = LayerSizes(edit.routed, edit.width, stored)
        check_ties(self.text, self.edits, self.decoder, self.checkpoint)
        differ = write_sizes(self.text, before, after, fields)
        drop_layers(self.text, sorted(self.places), self.checkpoint.entries, self.decoder.stack)
        maps = expert_maps(self.edits, self.places)
        if maps:
            self.text.content[EXPERT_MAP] = maps
        return differ or bool(maps)

    def outputs(self) -> dict[str, list[Output]]:
        """Name of a tensor of an MoE block of the source -> what is written in its place."""
        outputs: dict[str, list[Output]] = {
            entry.name: []
            for layer in self.decoder.layers.values()
            for _, entry in (*layer.experts, *layer.shared, *layer.around)
        }
        places, source = self.places, self.plan.source
        for (number, _), edit in self.edits.items():
            layer, shape, experts = self.decoder.layers[number], edit.shape, None
            if not self.quantized:
                experts = ExpertReader(
                    layer, shape.num_experts, shape.width, source.expert_size, self.text.model_type
                )  # fmt: skip
            editing = LayerEditing(layer, edit, places[number], self.shared[number], experts, source.hidden_size)
            for entry, output in editing.outputs():
                outputs[entry.name].append(output)
        return outputs

    def files(self, outputs: Mapping[str, list[Output]]) -> tuple[list[OutputFile], int]:
        """The files of the result, and how many tensors of the source are no more."""
        files, removed, places = [], 0, self.places
        for file, entries in self.checkpoint.shards.items():
            tensors: list[Output] = []
            for entry in entries:
                own = outputs.get(entry.name)
                if own is None:
                    name = self._new_name(entry.name, places)
                    own = [whole(entry, name)] if name else []
                removed += not own
                tensors += own
            if tensors:
                files.append(OutputFile.of(file, tensors, self.checkpoint.metadata[file]))
        return files, removed

    def _new_name(self, name: str, places: Mapping[int, int]) -> str:
        """Name in the result of a tensor that is no part of an MoE block; empty where it is left out."""
        read, stack = self.decoder.names[name], self.decoder.stack
        if any(name.startswith(f"{part}.") or read.stack == part for part in self.decoder.beyond):
            return name if self.fits_beyond else ""
        if read.stack != stack:
            return name
        return read.renumbered(layer=places[read.layer]) if read.layer in places else ""

    def notes(self) -> list[str]:
        """Sentences for the reader."""
        notes = []
        if self.plan.source.fingerprint:
            notes.append("the fingerprint of the run is that of loaded weights and was not compared with the files")
        if self.quantized:
            first = next(iter(self.decoder.layers.values())).quantized
            notes.append(f"quantized experts were left out whole, the others copied as they are: {first}")
        filled = {layer: width for layer, width in self.shared.items() if width != self.edits[layer, 0].shared_width}
        if filled:
            notes.append(
                f"shared experts are filled up with zeros to {max(filled.values())} neurons: the configuration ties"
                " their width to that of the routed experts"
            )
        if self.decoder.beyond and not self.fits_beyond:
            notes.append(
                f"left out: {', '.join(self.decoder.beyond)} (prediction of further tokens), whose experts no run has"
                " seen and which would no longer fit"
            )
        return notes
