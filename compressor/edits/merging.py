"""How the groups of one layer become experts: by the method that the plan's merge step names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from compressor.edits.aligned import aligned
from compressor.edits.average import average
from compressor.edits.moments import LayerMoments
from compressor.edits.nearest import nearest
from compressor.edits.segments import THRESHOLD, Moved, assign, rebuild
from compressor.edits.subspace import subspace
from compressor.plan import MergeGroup, MergeLayer, MergeStep, NewExpert
from compressor.weights import ExpertWeights
from moescope.errors import PlanError

Read = Callable[[int], ExpertWeights]


@dataclass(eq=False)
class Merging:
    """The groups of one layer.

    Attributes:
        step: the step that merges.
        layer: its groups here.
        moments: of the layer, for method ``subspace``.
    """

    step: MergeStep
    layer: MergeLayer
    moments: LayerMoments | None = None
    _chosen: dict[int, int] = field(default_factory=dict, repr=False)
    _moved: list[Moved] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        number, method = self.layer.layer, self.step.method
        if method == "subspace" and self.step.rank is None:
            raise PlanError(f"layer {number} is merged by method subspace, which needs a rank")
        if method == "subspace" and self.moments is None:
            raise PlanError(
                f"layer {number} is merged by method subspace, which needs the second moments of its inputs: collect a"
                " run at level moments"
            )
        several = next((group for group in self.layer.groups if len(group.members) > 1), None)
        if method == "segments" and several is not None:
            raise PlanError(
                f"group {several.lead} of layer {number} has {len(several.members)} members: method segments takes kept"
                " experts and ones given up, no groups of several"
            )

    def decide(self, experts: Sequence[NewExpert], read: Read) -> None:
        """Which member stands for its group, and which neurons move where: it is in the weights. Only done once."""
        if self.step.method == "nearest":
            for expert in experts:
                if expert.merged and expert.lead not in self._chosen:
                    self._chosen[expert.lead] = nearest(expert.lead, expert.members, expert.weights, read)
        if self.step.method == "segments" and self._moved is None:
            takers = [group.lead for group in self.layer.groups if not group.fixed]
            given = [entry.expert for entry in self.layer.given_up]
            threshold = THRESHOLD if self.step.threshold is None else self.step.threshold
            self._moved = assign(takers, given, read, threshold=threshold)

    def untouched(self, expert: NewExpert) -> int | None:
        """The expert of the source whose weights it has; None where it has to be computed."""
        if self.step.method == "segments":
            return None if self._received(expert.lead) else expert.lead
        if not expert.merged:
            return expert.lead
        return self._stand_in(expert) if self.step.method == "nearest" else None

    def rows(self, expert: NewExpert) -> list[tuple[int, float]]:
        """(expert of the source, part) of its router row."""
        if expert.merged and self.step.method == "nearest":
            return [(self._stand_in(expert), 1.0)]
        if not expert.merged or self.step.router == "lead":
            return [(expert.lead, 1.0)]
        return list(zip(expert.members, expert.weights, strict=True))

    def expert(self, expert: NewExpert, lead: ExpertWeights, read: Read) -> ExpertWeights:
        """The expert with all its neurons; ``lead`` are the weights of its lead."""

        def members() -> Iterator[tuple[ExpertWeights, float]]:
            for member, part in zip(expert.members, expert.weights, strict=True):
                yield (lead if member == expert.lead else read(member)), part

        source = self.untouched(expert)
        if source is not None:
            return lead if source == expert.lead else read(source)
        if self.step.method == "segments":
            return self._rebuilt(expert.lead, lead, read)
        if self.step.method == "aligned":
            return aligned(lead, members())
        if self.step.method == "subspace":
            assert self.step.rank is not None and self.moments is not None
            found = dict(zip(expert.members, (weights for weights, _ in members()), strict=True))
            return subspace(found, list(expert.weights), self.step.rank, self.moments)
        return average(members())

    def _rebuilt(self, number: int, own: ExpertWeights, read: Read) -> ExpertWeights:
        weights = {entry.expert: entry.weight for entry in self.layer.given_up}
        group: MergeGroup = next(group for group in self.layer.groups if group.lead == number)
        received = [
            (read(moved.source).neurons(moved.neurons), weights[moved.source]) for moved in self._received(number)
        ]
        return rebuild(own, group.weight, received)

    def _received(self, number: int) -> list[Moved]:
        if self._moved is None:
            raise RuntimeError("decide(read) has to be called first: which neurons move is in the weights")
        return [moved for moved in self._moved if moved.target == number]

    def _stand_in(self, expert: NewExpert) -> int:
        if expert.lead not in self._chosen:
            raise RuntimeError("decide(read) has to be called first: the nearest member is in the weights")
        return self._chosen[expert.lead]
