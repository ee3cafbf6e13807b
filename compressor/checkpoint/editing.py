"""One MoE layer of the source and its edit -> its tensors in the result."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from compressor.checkpoint.files import Reader
from compressor.checkpoint.headers import FLOATS, Entry, size_of
from compressor.checkpoint.layers import ExpertReader, StoredLayer, Tensor, read_shared, shared_slots
from compressor.checkpoint.outputs import Copied, Made, Output, Piece, Zeros, whole
from compressor.checkpoint.packing import StoredExpert, is_packed, pack_expert, packed_outputs, packed_widths
from compressor.families.checkpoint import TensorName
from compressor.plan import ExpertBits
from moescope.errors import PlanError

if TYPE_CHECKING:
    import torch

    from compressor.edits.layer import LayerEdit

_DENSE = "use form dense"


@dataclass(frozen=True)
class LayerEditing:
    """Makes the tensors of one layer.

    Attributes:
        layer: the layer as it is stored.
        edit: what becomes of it.
        place: its number in the result.
        shared_width: neurons that the shared experts are stored with.
        experts: reads its experts; None where they are quantized, so that they can only be copied or left out.
        hidden: channels of the residual stream, which shared experts read and write.
    """

    layer: StoredLayer
    edit: LayerEdit
    place: int
    shared_width: int
    experts: ExpertReader | None
    hidden: int

    def outputs(self) -> Iterator[tuple[Entry, Output]]:
        """(a tensor of the source in whose file it goes, tensor of the result)."""
        yield from self._separate() if self.layer.separate else self._fused()
        for name, entry in self.layer.shared:
            for output in self._shared(name, entry):
                yield entry, output
        for name, entry in self.layer.around:
            yield entry, self._around(name, entry)

    @property
    def _late(self) -> bool:
        """Which expert stands where is only known from the weights."""
        return self.edit.merge is not None and self.edit.merge[0].method in ("nearest", "segments")

    def _source_of(self, index: int, name: TensorName) -> int | None:
        """The expert whose bytes are copied; a dropped block keeps the bytes of all but down projections."""
        if self._late or (self.edit.zero_output and name.part == "down"):
            return None
        return replace(self.edit, zero_output=False).untouched(index)

    def _separate(self) -> Iterator[tuple[Entry, Output]]:
        by_expert: dict[int, list[Tensor]] = {}
        for name, entry in self.layer.experts:
            by_expert.setdefault(name.expert or 0, []).append((name, entry))
        for index, slot in enumerate(self.edit.slots):
            lead = index if slot is None else slot.lead
            for name, entry in by_expert[lead]:
                new, source = name.renumbered(layer=self.place, expert=index), self._source_of(index, name)
                bits = None if slot is None else packed_widths(self.edit, lead, "routed")
                if bits is not None and is_packed(name, bits):
                    yield from ((entry, output) for output in self._packed(index, name, new, bits))
                    continue
                if source is not None and source == lead:
                    yield entry, whole(entry, new)
                    continue
                shape = self._slot_shape(name)
                yield entry, Output(new, entry.dtype, shape, (self._piece(index, name, entry),), edited=True)

        for number in sorted(set(by_expert) - set(range(self.edit.shape.num_experts))):
            behind = number - self.edit.shape.num_experts + self.edit.count
            for name, entry in by_expert[number]:
                new, shape = name.renumbered(layer=self.place, expert=behind), self._slot_shape(name)
                # Nobody reads the weights of an expert without weights; only their shape has to fit.
                unread = Output(new, entry.dtype, shape, (Zeros(size_of(entry.dtype, shape)),), edited=True)
                yield entry, whole(entry, new) if shape == entry.shape else unread

    def _fused(self) -> Iterator[tuple[Entry, Output]]:
        for name, entry in self.layer.experts:
            rows = self._reader.rows(name)
            size = size_of(entry.dtype, entry.shape[1:]) * rows
            sources = [self._source_of(index, name) for index in range(self.edit.count)]
            pieces = tuple(
                self._piece(index, name, entry) if source is None else Copied(entry, entry.start + source * size, size)
                for index, source in enumerate(sources)
            )
            own = self._slot_shape(name)
            shape = (self.edit.count * own[0], *own[1:]) if name.packed else (self.edit.count, *own)
            same = shape == entry.shape and sources == list(range(self.edit.shape.num_experts))
            yield entry, Output(name.renumbered(layer=self.place), entry.dtype, shape, pieces, edited=not same)

    @property
    def _reader(self) -> ExpertReader:
        if self.experts is None:
            raise PlanError(
                f"the experts of layer {self.layer.layer} are quantized: {self.layer.quantized}; whole experts can be"
                " dropped where they are stored one by one; for anything else dequantize the checkpoint first"
            )
        return self.experts

    def _slot_shape(self, name: TensorName) -> tuple[int, ...]:
        reader = self._reader
        return reader.slots[name.name].shape(self.edit.width, reader.hidden)

    def _piece(self, index: int, name: TensorName, entry: Entry) -> Piece:
        shape = self._slot_shape(name)
        size = size_of(entry.dtype, shape)
        if self.edit.slots[index] is None or (self.edit.zero_output and name.part == "down"):
            return Zeros(size)
        slot = self._reader.slots[name.name]
        unit, make = ("expert", self.layer.layer, index), partial(self._expert, index)
        return Made(unit, make, lambda expert: slot.of(expert.weights), size)

    def _packed(self, index: int, name: TensorName, new: str, bits: ExpertBits) -> Iterator[Output]:
        if self._reader.slots[name.name].transposed:
            raise PlanError(f"{name.name} is stored as (inputs, outputs), which form packed does not hold: {_DENSE}")
        unit, make = ("expert", self.layer.layer, index), partial(self._expert, index)
        assert self.edit.grids is not None and name.part is not None
        return packed_outputs(new, name.part, self._slot_shape(name), bits, self.edit.grids, unit, make)

    def _expert(self, index: int, reader: Reader) -> StoredExpert:
        experts, slot = self._reader, self.edit.slots[index]
        bits = None if slot is None else packed_widths(self.edit, slot.lead, "routed")
        if bits is None or self.edit.grids is None:
            return StoredExpert(self.edit.expert(index, lambda number: experts.read(reader, number)))
        return pack_expert(self.edit.cut(index, lambda number: experts.read(reader, number)), bits, self.edit.grids)

    def _decide(self, reader: Reader) -> None:
        if self._late:
            experts = self._reader
            self.edit.decide(lambda number: experts.read(reader, number))

    def _shared(self, name: TensorName, entry: Entry) -> Iterator[Output]:
        new = name.renumbered(layer=self.place)
        kept = self.edit.kept.get((0, "shared"))
        same = (kept is None or bool(kept.all())) and self.shared_width == self.edit.shape.shared_width
        same = same and (0, "shared") not in self.edit.bits
        if self.edit.zero_output and name.part == "down":
            if same and entry.dtype in FLOATS:
                yield Output(new, entry.dtype, entry.shape, (Zeros(entry.size),), edited=True)
                return
        elif same:
            yield whole(entry, new)
            return
        if len(entry.shape) > 2 or entry.dtype not in FLOATS or name.what not in ("weight", "bias"):
            raise PlanError(f"{name.name} is quantized or keeps shared experts apart: plan without changing those")
        slot = shared_slots(self.layer, self.edit.shape.shared_width, self.hidden)[name.name]
        shape = slot.shape(self.shared_width, self.hidden)
        unit, bits, step = ("shared", self.layer.layer), packed_widths(self.edit, 0, "shared"), self.edit.grids
        if bits is not None and step is not None and is_packed(name, bits):
            if step.group_size and shape[1] % step.group_size:
                raise PlanError(
                    f"groups of {step.group_size} do not divide the {shape[1]} inputs of {name.name}: use a divisor, or"
                    " 0 for whole rows"
                )
            yield from packed_outputs(new, name.part or "", shape, bits, step, unit, self._shared_experts)
            return
        made = Made(unit, self._shared_experts, lambda expert: slot.of(expert.weights), size_of(entry.dtype, shape))
        yield Output(new, entry.dtype, shape, (made,), edited=True)

    def _shared_experts(self, reader: Reader) -> StoredExpert:
        from compressor.edits.slim import widen

        weights = read_shared(self.layer, self.edit.shape.shared_width, self.hidden, reader)
        bits = packed_widths(self.edit, 0, "shared")
        if bits is None or self.edit.grids is None:
            return StoredExpert(widen(self.edit.shared(weights), self.shared_width))
        # Zeros that fill it up are on every grid and move none.
        return pack_expert(widen(self.edit.cut_shared(weights), self.shared_width), bits, self.edit.grids)

    def _around(self, name: TensorName, entry: Entry) -> Output:
        new = name.renumbered(layer=self.place)
        if name.kind == "output_bias":
            return (
                Output(new, entry.dtype, entry.shape, (Zeros(entry.size),), edited=True)
                if self.edit.zero_output
                else whole(entry, new)
            )
        if self.edit.same_router:
            return whole(entry, new)
        if name.kind == "table":
            raise PlanError(
                f"layer {self.layer.layer} chooses experts by a table of token ids ({name.name}): none of them can go"
            )
        if entry.dtype not in FLOATS:
            raise PlanError(
                f"{name.name} is quantized ({entry.dtype}), so no row of it can go: dequantize the checkpoint first"
            )
        # Ernie keeps its bias as (1, E).
        flat = (entry.shape[1],) if len(entry.shape) == 2 and entry.shape[0] == 1 else entry.shape
        rows = flat[0] - self.edit.shape.num_experts + self.edit.count
        shape = (1, rows) if flat != entry.shape else (rows, *entry.shape[1:])

        def make(reader: Reader) -> torch.Tensor:
            self._decide(reader)
            values = reader.tensor(entry).reshape(flat)
            if name.kind in ("router_bias", "selection_bias"):
                return self.edit.bias(values, selection=name.kind == "selection_bias").reshape(shape)
            return self.edit.rows(values).reshape(shape)

        made = Made((name.name,), make, lambda values: values, size_of(entry.dtype, shape))
        return Output(new, entry.dtype, shape, (made,), edited=True)
