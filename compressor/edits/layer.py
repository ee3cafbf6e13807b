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

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compressor.edits.aligned import aligned
from compressor.edits.average import average
from compressor.edits.moments import LayerMoments
from compressor.edits.nearest import nearest
from compressor.edits.segments import THRESHOLD, Moved, assign, rebuild
from compressor.edits.silence import empty, silenced
from compressor.edits.slim import mask, slim, widen
from compressor.edits.subspace import subspace
from compressor.plan import (
    DropStep,
    LayerKey,
    LayerShape,
    MergeGroup,
    MergeLayer,
    MergeStep,
    NewExpert,
    Plan,
    Role,
    SlimStep,
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
        merge: the step that merges here, and its groups; None where nothing is merged.
        kept: (expert, role) -> (width,) bool mask of its neurons that stay.
        masked: neurons that go become zero, and stay in their places.
        moments: of the layer, for method ``subspace``.
    """

    shape: LayerShape
    experts: list[NewExpert]
    slots: list[NewExpert | None]
    width: int
    zero_output: bool = False
    merge: tuple[MergeStep, MergeLayer] | None = None
    kept: Mapping[tuple[int, Role], Tensor] = field(default_factory=dict)
    masked: bool = False
    moments: LayerMoments | None = None
    _chosen: dict[int, int] = field(default_factory=dict, repr=False)
    _moved: list[Moved] | None = field(default=None, repr=False)

    @staticmethod
    def of(plan: Plan, key: LayerKey, moments: LayerMoments | None = None) -> LayerEdit:
        """The edit of one layer.

        Raises:
            PlanError: the plan has no such layer afterwards, or its method lacks what it needs.
        """
        edits = layer_edits(plan, {key: moments} if moments is not None else {})
        if key not in edits:
            raise PlanError(f"the plan leaves no MoE layer {key[0]}, step {key[1]}")
        return edits[key]

    @property
    def count(self) -> int:
        """Stored experts, fillers included."""
        return len(self.slots)

    @property
    def shared_width(self) -> int:
        """Stored neurons of the shared experts, merged; 0 without."""
        kept = self.kept.get((0, "shared"))
        return self.shape.shared_width if kept is None or self.masked else max(int(kept.sum()), 1)

    @property
    def same_experts(self) -> bool:
        """All experts of the source in their order, each made of itself alone: nothing changes for the router."""
        leads = [slot.lead if slot is not None and not slot.merged else -1 for slot in self.slots]
        return leads == list(range(self.shape.num_experts))

    @property
    def changes(self) -> bool:
        """Whether anything of the layer changes."""
        cut = self.zero_output or self.width != self.shape.width or self.merge is not None
        return cut or not self.same_experts or not all(bool(kept.all()) for kept in self.kept.values())

    def decide(self, read: Read) -> None:
        """What depends on weights: which member stands for its group, and which neurons move where. Only done once.

        :meth:`expert` does it where it was not done. :meth:`untouched`, :meth:`rows` and :meth:`bias` cannot, and raise
        RuntimeError where it matters.
        """
        if self._method == "nearest":
            for expert in self.experts:
                if expert.lead not in self._chosen:
                    self._chosen[expert.lead] = nearest(expert.members, expert.weights, read)
        if self._method == "segments" and self._moved is None and self.merge is not None:
            step, layer = self.merge
            takers = [group.lead for group in layer.groups if not group.fixed]
            threshold = THRESHOLD if step.threshold is None else step.threshold
            self._moved = assign(takers, [entry.expert for entry in layer.given_up], read, threshold=threshold)

    def untouched(self, index: int) -> int | None:
        """The expert of the source that is stored at ``index`` as it is; None where it has to be computed."""
        slot = self.slots[index]
        if slot is None or self.zero_output or self.width != self.shape.width and not self.masked:
            return None
        kept = self.kept.get((slot.lead, "routed"))
        if kept is not None and not kept.all():
            return None
        if self._method == "segments":
            return None if self._received(slot.lead) else slot.lead
        if slot.merged:
            return self._stand_in(slot) if self._method == "nearest" else None
        return slot.lead

    def expert(self, index: int, read: Read) -> ExpertWeights:
        """The expert stored at ``index``, in the types of the source.

        Args:
            index: place, 0 to ``count`` - 1.
            read: weights of one expert of the source, as it has them.
        """
        self.decide(read)
        slot = self.slots[index]
        if slot is None:
            return empty(_cut(read(self.experts[0].lead), self.width))
        lead = read(slot.lead)
        weights = self._whole(slot, lead, read).like(lead)
        kept = self.kept.get((slot.lead, "routed"))
        if kept is not None:
            weights = mask(weights, kept) if self.masked else slim(weights, kept)
        weights = widen(weights, self.width)
        return silenced(weights) if self.zero_output else weights

    def rows(self, values: Tensor) -> Tensor:
        """(count, ...) what the router holds per expert, of (E, ...) values; fillers get zeros.

        Rows behind the E-th, of experts without weights, are kept behind all others. A merged expert has the row of the
        lead or the weighted mean, as the step says; with method ``nearest`` always that of the member that stands for
        the group.
        """
        return self._per_expert(values, 0.0)

    def bias(self, values: Tensor, *, selection: bool = True) -> Tensor:
        """(count,) what is added per expert, of (E,) values; fillers get a value with which no token selects them.

        Args:
            values: one per expert of the source.
            selection: it counts for choosing only; False: it belongs to the logits. Both are treated alike.
        """
        return self._per_expert(values, NEVER)

    def shared(self, weights: ExpertWeights) -> ExpertWeights:
        """The shared experts, merged in one module, with the neurons that stay."""
        kept = self.kept.get((0, "shared"))
        if kept is not None and not kept.all():
            weights = mask(weights, kept) if self.masked else widen(slim(weights, kept), self.shared_width)
        return silenced(weights) if self.zero_output else weights

    @property
    def _method(self) -> str:
        return self.merge[0].method if self.merge is not None else ""

    def _whole(self, expert: NewExpert, lead: ExpertWeights, read: Read) -> ExpertWeights:
        """The expert with all its neurons."""

        def members() -> Iterator[tuple[ExpertWeights, float]]:
            for member, part in zip(expert.members, expert.weights, strict=True):
                yield (lead if member == expert.lead else read(member)), part

        if self._method == "segments":
            return self._rebuilt(expert.lead, lead, read)
        if not expert.merged:
            return lead
        if self._method == "nearest":
            return read(self._stand_in(expert))
        if self._method == "aligned":
            return aligned(lead, members())
        if self._method == "subspace":
            return self._projected(
                expert, dict(zip(expert.members, (weights for weights, _ in members()), strict=True))
            )
        return average(members())

    def _projected(self, expert: NewExpert, members: dict[int, ExpertWeights]) -> ExpertWeights:
        assert self.merge is not None and self.merge[0].rank is not None and self.moments is not None
        return subspace(members, list(expert.weights), self.merge[0].rank, self.moments)

    def _rebuilt(self, number: int, own: ExpertWeights, read: Read) -> ExpertWeights:
        received = self._received(number)
        if not received or self.merge is None:
            return own
        layer = self.merge[1]
        given = {entry.expert: entry.weight for entry in layer.given_up}
        weight = next(group.weight for group in layer.groups if group.lead == number)
        parts = [(read(moved.source).neurons(moved.neurons), given[moved.source]) for moved in received]
        return rebuild(own, weight, parts)

    def _received(self, number: int) -> list[Moved]:
        if self._moved is None:
            raise RuntimeError("LayerEdit.decide(read) has to be called first: which neurons move is in the weights")
        return [moved for moved in self._moved if moved.target == number]

    def _stand_in(self, expert: NewExpert) -> int:
        if expert.lead not in self._chosen:
            raise RuntimeError("LayerEdit.decide(read) has to be called first: the nearest member is in the weights")
        return self._chosen[expert.lead]

    def _per_expert(self, values: Tensor, filler: float) -> Tensor:
        rows = [self._row(values, slot, filler) for slot in self.slots]
        return torch.cat([torch.stack(rows), values[self.shape.num_experts :]])

    def _row(self, values: Tensor, slot: NewExpert | None, filler: float) -> Tensor:
        if slot is None:
            return torch.full_like(values[0], filler)
        if slot.merged and self._method == "nearest":
            return values[self._stand_in(slot)]
        if not slot.merged or self.merge is None or self.merge[0].router == "lead":
            return values[slot.lead]
        parts = torch.tensor(slot.weights, dtype=torch.float64, device=values.device)
        members = values[list(slot.members)].double()
        return (torch.tensordot(parts, members, dims=1) / parts.sum()).to(values.dtype)


def layer_edits(plan: Plan, moments: Mapping[LayerKey, LayerMoments] | None = None) -> dict[LayerKey, LayerEdit]:
    """(layer, step) of the source -> its edit, for all MoE layers that stay.

    Raises:
        PlanError: a method lacks what it needs.
    """
    after, widths, shapes = experts_after(plan), widths_after(plan), plan.source.by_key
    masks: dict[LayerKey, dict[tuple[int, Role], Tensor]] = {}
    for (layer, number, expert, role), kept in neurons_after(plan).items():
        masks.setdefault((layer, number), {})[expert, role] = torch.from_numpy(kept)
    blocks = {layer for step in plan.steps if isinstance(step, DropStep) for layer in step.blocks}
    merges = {
        (layer.layer, layer.step): (step, layer)
        for step in plan.steps
        if isinstance(step, MergeStep)
        for layer in step.layers
    }
    padded = any(isinstance(step, (DropStep, MergeStep)) and step.form == "padded" for step in plan.steps)
    largest = max((len(experts) for experts in after.values()), default=0)
    edits = {}
    for key, experts in after.items():
        merge, own = merges.get(key), (moments or {}).get(key)
        if merge is not None:
            _require(key, *merge, own)
        edits[key] = LayerEdit(
            shape=shapes[key],
            experts=experts,
            slots=_slots(experts, shapes[key], largest if padded else len(experts)),
            width=widths[key],
            zero_output=key[0] in blocks,
            merge=merge,
            kept=masks.get(key, {}),
            masked=any(isinstance(step, SlimStep) and step.form == "masked" for step in plan.steps),
            moments=own,
        )
    return edits


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


def _require(key: LayerKey, step: MergeStep, layer: MergeLayer, moments: LayerMoments | None) -> None:
    if step.method == "subspace":
        if step.rank is None:
            raise PlanError(f"layer {key[0]} is merged by method subspace, which needs a rank")
        if moments is None:
            raise PlanError(
                f"layer {key[0]} is merged by method subspace, which needs the second moments of its inputs: collect a"
                " run at level moments"
            )
    if step.method == "segments":
        several: MergeGroup | None = next((group for group in layer.groups if len(group.members) > 1), None)
        if several is not None:
            raise PlanError(
                f"group {several.lead} of layer {key[0]} has {len(several.members)} members: method segments takes kept"
                " experts and ones given up, no groups of several"
            )


def _cut(weights: ExpertWeights, width: int) -> ExpertWeights:
    return weights.neurons(torch.arange(width, device=weights.up.device))
