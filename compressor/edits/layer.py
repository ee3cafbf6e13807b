"""One layer of a plan, put into effect: the weights of its experts, its router rows and its shared experts.

Checkpoint jobs and the edit in memory share this. It reads the plan and nothing else; who uses it hands in a function
that reads the weights of one expert of the source::

    edit = LayerEdit.of(plan, (3, 0))
    edit.decide(read)
    for index in range(edit.count):
        source = edit.untouched(index)
        weights = edit.expert(index, read) if source is None else ...   # copy the bytes of expert source
    router = edit.rows(router)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compressor.edits.factor import Factoring
from compressor.edits.merging import Merging
from compressor.edits.moments import LayerMoments
from compressor.edits.quantize import quantized
from compressor.edits.silence import empty, silenced
from compressor.edits.slim import mask, slim, widen
from compressor.edits.smooth import Smoothing
from compressor.plan import (
    DropStep,
    ExpertBits,
    FactorStep,
    LayerKey,
    LayerShape,
    MergeLayer,
    MergeStep,
    NewExpert,
    Plan,
    QuantizeStep,
    Role,
    SlimStep,
    bits_after,
    experts_after,
    widths_after,
)
from compressor.plan.result import neurons_after
from compressor.weights import ExpertWeights
from moescope.errors import PlanError

NEVER = -1e4
"""Bias of an expert that only fills up: no token selects it, in any floating type."""

Read = Callable[[int], ExpertWeights]


@dataclass(eq=False)
class LayerEdit:
    """What becomes of one MoE layer.

    Stored places ``index`` go from 0 to ``count`` - 1, fillers included. Fillers stand behind the experts; with group
    limited routing behind those of each group, as groups are blocks of equal size.

    Attributes:
        shape: the layer as it is.
        experts: the experts afterwards in order, without fillers.
        slots: what is stored, in order; None where an expert only fills up (form ``padded``).
        width: stored neurons per routed expert.
        zero_output: the block was dropped: down projections and their biases become zero.
        merging: how its groups become experts; None where nothing is merged.
        expert_map: (E,) int64 place in which the expert that each row of the router stands for is stored (form
            ``shared``); None where stored experts and rows are one to one.
        kept: (expert, role) -> (width,) bool mask of its neurons that stay.
        masked: neurons that go become zero, and stay in their places.
        factoring: which experts are rebuilt from factors, and how; None where none is.
        bits: (expert, role) -> widths of its projections; those that are not named stay as they are.
        grids: the step that says what the widths mean; None where nothing is quantized.
        smoothing: how ranges of channels move into the weights; None where they do not.
    """

    shape: LayerShape
    experts: list[NewExpert]
    slots: list[NewExpert | None]
    width: int
    zero_output: bool = False
    merging: Merging | None = None
    expert_map: Tensor | None = None
    kept: Mapping[tuple[int, Role], Tensor] = field(default_factory=dict)
    masked: bool = False
    factoring: Factoring | None = None
    bits: Mapping[tuple[int, Role], ExpertBits] = field(default_factory=dict)
    grids: QuantizeStep | None = None
    smoothing: Smoothing | None = None

    @staticmethod
    def of(plan: Plan, key: LayerKey, moments: LayerMoments | None = None) -> LayerEdit:
        """The edit of one layer; :func:`layer_edits` makes those of all layers at once.

        Raises:
            PlanError: the plan has no such layer afterwards, or its method lacks what it needs.
        """
        found = _Layers(plan)
        if key not in found.after:
            raise PlanError(f"the plan leaves no MoE layer {key[0]}, step {key[1]}")
        return found.edit(key, moments)

    @property
    def count(self) -> int:
        """Stored experts, fillers included."""
        return len(self.slots)

    @property
    def merge(self) -> tuple[MergeStep, MergeLayer] | None:
        """The step that merges here, and its groups; None where nothing is merged."""
        return None if self.merging is None else (self.merging.step, self.merging.layer)

    @property
    def shared_width(self) -> int:
        """Stored neurons of the shared experts, merged; 0 without."""
        kept = self.kept.get((0, "shared"))
        return self.shape.shared_width if kept is None or self.masked else max(int(kept.sum()), 1)

    @property
    def routed(self) -> int:
        """Experts that the router chooses from: with ``expert_map`` as many as before, else those that are stored."""
        return self.count if self.expert_map is None else self.shape.num_experts

    @property
    def same_router(self) -> bool:
        """Nothing changes for the router: it keeps its rows, or all experts stay in their order, unmerged."""
        return self.expert_map is not None or self.same_experts

    @property
    def same_experts(self) -> bool:
        """All experts of the source in their order, each made of itself alone."""
        leads = [slot.lead if slot is not None and not slot.merged else -1 for slot in self.slots]
        return leads == list(range(self.shape.num_experts))

    @property
    def changes(self) -> bool:
        """Whether anything of the layer may change."""
        cut = self.zero_output or self.width != self.shape.width or self.merging is not None
        whole = self.same_experts and all(bool(kept.all()) for kept in self.kept.values())
        factored = any(self._factored(one) for one in self.experts)
        return cut or not whole or factored or bool(self.bits) or self.smoothing is not None

    @property
    def activation_bits(self) -> int | None:
        """Width of what enters the experts and their second projections; None = as it is."""
        return self.grids.activation_bits if self.grids is not None and self.bits else None

    def decide(self, read: Read) -> None:
        """What depends on weights: which member stands for its group, and which neurons move where. Only done once.

        :meth:`expert` does it where it was not done. :meth:`untouched`, :meth:`rows` and :meth:`bias` cannot, and raise
        RuntimeError where it matters.
        """
        if self.merging is not None:
            self.merging.decide(self.experts, read)

    def smooth(self, read: Read, router: Tensor) -> Smoothing | None:
        """The smoothing of this layer with its scales, found in the weights of all experts and of the router.

        Args:
            read: weights of one expert of the source, as it has them.
            router: (E, H) rows of its projection.
        """
        if self.smoothing is not None and not self.smoothing.decided:
            places = [place for place, slot in enumerate(self.slots) if slot is not None]
            self.smoothing.decide((self.cut(place, read) for place in places), self.rows(router))
        return self.smoothing

    def untouched(self, index: int) -> int | None:
        """The expert of the source that is stored at ``index`` as it is; None where it has to be computed."""
        slot = self.slots[index]
        if slot is None or self.zero_output or self.width != self.shape.width or self.smoothing is not None:
            return None
        kept = self.kept.get((slot.lead, "routed"))
        if (kept is not None and not kept.all()) or (slot.lead, "routed") in self.bits or self._factored(slot):
            return None
        return slot.lead if self.merging is None else self.merging.untouched(slot)

    def expert(self, index: int, read: Read) -> ExpertWeights:
        """The expert stored at ``index``, in the types of the source, with the values of its grids.

        Args:
            index: place, 0 to ``count`` - 1.
            read: weights of one expert of the source, as it has them.
        """
        slot, weights = self.slots[index], self.cut(index, read)
        return weights if slot is None else self._on_grid(self._smoothed(weights), (slot.lead, "routed"))

    def cut(self, index: int, read: Read) -> ExpertWeights:
        """The expert stored at ``index`` before its weights are put on grids, rebuilt where it is factored.

        A merged expert is cut by the mask of its lead, after merging.
        """
        slot = self.slots[index]
        if slot is None or self.factoring is None or not self._factored(slot):
            return self._cut(index, read)
        places = {one.lead: place for place, one in enumerate(self.slots) if one is not None}
        return self.factoring.expert(slot.lead, lambda lead: self._cut(places[lead], read))

    def _cut(self, index: int, read: Read) -> ExpertWeights:
        self.decide(read)
        slot = self.slots[index]
        if slot is None:
            return empty(slim(read(self.experts[0].lead), torch.arange(self.shape.width) < self.width))
        lead = read(slot.lead)
        weights = lead if self.merging is None else self.merging.expert(slot, lead, read).like(lead)
        kept = self.kept.get((slot.lead, "routed"))
        if kept is not None and not kept.all():
            weights = mask(weights, kept) if self.masked else slim(weights, kept)
        weights = widen(weights, self.width)
        return silenced(weights) if self.zero_output else weights

    def rows(self, values: Tensor) -> Tensor:
        """(count, ...) what the router holds per expert, of (E, ...) values; fillers get zeros.

        Rows behind the E-th, of experts without weights, are kept behind all others. A merged expert has the row of the
        lead or the weighted mean, as the step says; with method ``nearest`` always that of the member that stands for
        the group. With ``expert_map`` all rows stay, (E, ...).
        """
        return values if self.expert_map is not None else self._per_expert(values, 0.0)

    def bias(self, values: Tensor, *, selection: bool = True) -> Tensor:
        """(count,) what is added per expert, of (E,) values; fillers get a value with which no token selects them.

        With ``expert_map`` all stay, (E,).

        Args:
            values: one per expert of the source.
            selection: it counts for choosing only; False: it belongs to the logits. Both are treated alike.
        """
        return values if self.expert_map is not None else self._per_expert(values, NEVER)

    def shared(self, weights: ExpertWeights) -> ExpertWeights:
        """The shared experts, merged in one module, with the neurons that stay and the values of their grids."""
        return self._on_grid(self._smoothed(self.cut_shared(weights)), (0, "shared"))

    def cut_shared(self, weights: ExpertWeights) -> ExpertWeights:
        """The shared experts before their weights are put on grids."""
        kept = self.kept.get((0, "shared"))
        if kept is not None and not kept.all():
            weights = mask(weights, kept) if self.masked else widen(slim(weights, kept), self.shared_width)
        return silenced(weights) if self.zero_output else weights

    def _factored(self, expert: NewExpert) -> bool:
        return self.factoring is not None and self.factoring.touches(expert.lead)

    def _smoothed(self, weights: ExpertWeights) -> ExpertWeights:
        return weights if self.smoothing is None else self.smoothing.expert(weights)

    def _on_grid(self, weights: ExpertWeights, unit: tuple[int, Role]) -> ExpertWeights:
        bits = self.bits.get(unit)
        return weights if bits is None or self.grids is None else quantized(weights, bits, self.grids)

    def _per_expert(self, values: Tensor, filler: float) -> Tensor:
        rows = [torch.full_like(values[0], filler) if slot is None else self._row(values, slot) for slot in self.slots]
        return torch.cat([torch.stack(rows), values[self.shape.num_experts :]])

    def _row(self, values: Tensor, slot: NewExpert) -> Tensor:
        parts = [(slot.lead, 1.0)] if self.merging is None else self.merging.rows(slot)
        if len(parts) == 1:
            return values[parts[0][0]]
        total = sum(part for _, part in parts)
        mean = torch.stack([values[member].double() * part for member, part in parts]).sum(0) / total
        return mean.to(values.dtype)


def layer_edits(plan: Plan, moments: Mapping[LayerKey, LayerMoments] | None = None) -> dict[LayerKey, LayerEdit]:
    """(layer, step) of the source -> its edit, for all MoE layers that stay.

    Raises:
        PlanError: a method lacks what it needs.
    """
    found = _Layers(plan)
    return {key: found.edit(key, (moments or {}).get(key)) for key in found.after}


def expert_maps(edits: Mapping[LayerKey, LayerEdit], places: Mapping[int, int]) -> dict[str, list[int]]:
    """What a configuration says of layers in which several rows of the router stand for one stored expert.

    Args:
        edits: (layer, step) of the source -> its edit.
        places: number of a layer in the source -> its new one.
    """
    return {
        str(places[layer]): edit.expert_map.tolist()
        for (layer, _), edit in sorted(edits.items())
        if edit.expert_map is not None
    }


class _Layers:
    """What a plan leaves, worked out once for all its layers."""

    def __init__(self, plan: Plan) -> None:
        self.shapes, self.after, self.widths = plan.source.by_key, experts_after(plan), widths_after(plan)
        self.kept: dict[LayerKey, dict[tuple[int, Role], Tensor]] = defaultdict(dict)
        for (layer, number, expert, role), kept in neurons_after(plan).items():
            self.kept[layer, number][expert, role] = torch.from_numpy(kept)
        self.bits: dict[LayerKey, dict[tuple[int, Role], ExpertBits]] = defaultdict(dict)
        for (layer, number, expert, role), (bits, _) in bits_after(plan).items():
            self.bits[layer, number][expert, role] = bits
        factors = [step for step in plan.steps if isinstance(step, FactorStep)]
        self.factors = {(layer.layer, layer.step): (step, layer) for step in factors for layer in step.layers}
        self.grids = next((step for step in plan.steps if isinstance(step, QuantizeStep)), None)
        self.channels = {(one.layer, one.step): one for one in (self.grids.channels if self.grids is not None else ())}
        self.hidden = plan.source.hidden_size
        merges = [step for step in plan.steps if isinstance(step, MergeStep)]
        drops = [step for step in plan.steps if isinstance(step, DropStep)]
        self.merges = {(layer.layer, layer.step): (step, layer) for step in merges for layer in step.layers}
        self.blocks = {layer for step in drops for layer in step.blocks}
        self.masked = any(isinstance(step, SlimStep) and step.form == "masked" for step in plan.steps)
        padded = "padded" in {*(step.form for step in drops), *(step.form for step in merges)}
        self.largest = max(map(len, self.after.values()), default=0) if padded else 0

    def edit(self, key: LayerKey, moments: LayerMoments | None) -> LayerEdit:
        """The edit of one layer."""
        experts, shape = self.after[key], self.shapes[key]
        return LayerEdit(
            shape=shape,
            experts=experts,
            slots=_slots(experts, shape, max(self.largest, len(experts))),
            width=self.widths[key],
            zero_output=key[0] in self.blocks,
            merging=Merging(*self.merges[key], moments) if key in self.merges else None,
            expert_map=self._expert_map(key, experts),
            kept=self.kept[key],
            masked=self.masked,
            factoring=Factoring(*self.factors[key]) if key in self.factors else None,
            bits=self.bits[key],
            grids=self.grids,
            smoothing=self._smoothing(key),
        )

    def _smoothing(self, key: LayerKey) -> Smoothing | None:
        if self.grids is None or self.grids.smoothing is None or key not in self.channels:
            return None
        return Smoothing(self.grids.smoothing, torch.from_numpy(self.channels[key].values(self.hidden)))

    def _expert_map(self, key: LayerKey, experts: list[NewExpert]) -> Tensor | None:
        if key not in self.merges or self.merges[key][0].form != "shared" or not any(one.merged for one in experts):
            return None
        places = torch.empty(self.shapes[key].num_experts, dtype=torch.int64)
        for place, expert in enumerate(experts):
            places[list(expert.members)] = place
        return places


def _slots(experts: list[NewExpert], shape: LayerShape, count: int) -> list[NewExpert | None]:
    """The experts with fillers up to ``count``, each group of the router filled up by itself."""
    if shape.groups == 1 or count == len(experts):
        return [*experts, *[None] * (count - len(experts))]
    size = shape.num_experts // shape.groups
    slots: list[NewExpert | None] = []
    for group in range(shape.groups):
        inside = [expert for expert in experts if expert.lead // size == group]
        slots += [*inside, *[None] * (count // shape.groups - len(inside))]
    return slots
