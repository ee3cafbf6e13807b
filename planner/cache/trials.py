"""Widths and ways tried together: what each gives, and why some do not go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from compressor.plan import Bits, Prefetch, QuantizeStep, Target
from moescope.errors import PlanError
from planner.cache.bound import Bound
from planner.cache.offer import PRESET, Offer, domains_of, offer_of, plan_of
from planner.cache.setting import Setting
from planner.cache.study import DomainFigures
from planner.cache.tiers import tiers_of, widths_by_tier
from planner.cache.ways import Flags, Served, Way, allotted, serve
from planner.entry import make
from planner.estimate.memory import ExpertSizes, expert_sizes
from planner.presets import DEFAULT_QUANTIZER
from planner.simulate.workload import Workload
from planner.source import value_bytes
from planner.task import Task

PAIRS: tuple[tuple[Bits, Bits], ...] = ((8, 8), (8, 4), (8, 3), (8, 2), (4, 4), (4, 3), (4, 2), (3, 3), (3, 2), (2, 2))
"""(width on the device, width elsewhere) that are tried; equal ones also serve caches, whose experts move."""

MIXED = (3.0, 4.0, 5.0)
"""Bits per weight for which the quantization planner finds a width per expert."""


@dataclass(frozen=True)
class Widths:
    """How wide experts are.

    Attributes:
        words: for the reader, behind "experts".
        near: of those that lie on the device for good; None = as they are.
        far: of all others.
        mixed: a width per expert, whatever its place; None = by place.
    """

    words: str
    near: Bits | None = None
    far: Bits | None = None
    mixed: QuantizeStep | None = None

    def step(self, task: Task, device: Flags) -> QuantizeStep | None:
        """The step that gives them, where ``device`` (layers, E) never leaves the device; None = as they are."""
        if self.mixed is not None or self.near is None or self.far is None:
            return self.mixed
        return widths_by_tier(task, near=self.near, far=self.far, device=device)


def widths_of(task: Task, *, keep: bool = False) -> Iterator[Widths]:
    """What is tried: as they are; uniform and by place; and mixtures of the quantization planner that the run allows.

    Args:
        task: the run.
        keep: experts stay as they are.
    """
    yield Widths("as they are")
    if keep:
        return
    for near, far in PAIRS:
        yield Widths(
            f"in {near} bits" if near == far else f"in {near} bits on the device and {far} elsewhere", near, far
        )
    for bits in MIXED:
        try:
            plan = make(
                task.run, preset=DEFAULT_QUANTIZER, bits=bits, domains=task.domains, guard=task.guard.active,
                allow_invalid=True, kept=task.kept,
            )  # fmt: skip
        except PlanError:  # a run that does not know what widths cost
            return
        yield Widths(f"in {bits:g} bits on average, by {DEFAULT_QUANTIZER}", mixed=plan.steps[0])  # type: ignore[arg-type]


@dataclass
class Trials:
    """Everything that was tried.

    Attributes:
        setting: model and machine.
        task: the run, its domains and its guard.
        offers: what goes.
        refused: what does not, and why.
    """

    setting: Setting
    task: Task
    offers: list[Offer] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    _origin: dict[str, tuple[Way, Widths]] = field(default_factory=dict, repr=False)
    _bound: Bound | None = None
    _alone: dict[str, Setting] = field(default_factory=dict, repr=False)

    def take(self, way: Way, widths: Widths) -> None:
        """Try one way with one choice of widths; of ways that come to the same plan, the first stays."""
        try:
            found = self._offer(way, widths)
        except PlanError as error:
            self.refused[f"{way.title}, experts {widths.words}"] = str(error)
            return
        if found.plan.digest not in self._origin:
            self._origin[found.plan.digest] = (way, widths)
            self.offers.append(found)

    def all_fit(self, widths: Widths) -> bool:
        """Whether the device holds every expert where all are as wide as those that lie on it."""
        every = np.ones((self.setting.train.num_layers, self.setting.train.num_experts), np.bool_)
        return self._sized(widths, every).total <= self.setting.budget.left

    def take_prefetching(self, offer: Offer, name: Prefetch) -> None:
        """Try an offer's way with prefetching beside it."""
        way, widths = self._origin[offer.plan.digest]
        if name == "cross_layer_gate" and self.setting.recorded is None:
            return
        title = f"{way.title}, prefetching by {name.replace('_', ' ')}"
        self.take(replace(way, name=f"{way.name}+{name}", title=title, prefetch=name), widths)

    def way(self, offer: Offer) -> Way:
        """The way of an offer."""
        return self._origin[offer.plan.digest][0]

    def _offer(self, way: Way, widths: Widths) -> Offer:
        near = self._sized(widths, np.ones((self.setting.train.num_layers, self.setting.train.num_experts), np.bool_))
        left = max(self.setting.budget.left, 0.0)
        fits = near.total <= left
        slots = self.setting.all_slots if fits else min(int(left // float(near.largest.max())), self.setting.all_slots)
        if way.policy == "static" and not fits and widths.near == widths.far:
            slots = self._most(way, near, left, slots)
        if slots < 1:
            raise PlanError("not one expert fits on the device")
        pinned = self._pinned(way, slots)
        if not pinned.any() and (way.pinned > 0 or widths.near != widths.far):
            raise PlanError(f"of {slots} experts that fit on the device, none would stay there for good")
        sizes = self._sized(widths, pinned)
        setting = self.setting.with_sizes(sizes)
        if way.policy != "static" and slots < setting.least_slots:
            raise PlanError(
                f"{slots} experts fit on the device, and a token needs {setting.least_slots} over all layers"
            )
        served = serve(setting, way, slots=slots)
        tiers = tiers_of(setting, way, device=served.pinned, slots=served.slots)
        if tiers.disk.any():
            served = serve(setting, way, slots=slots, disk=tiers.disk)
        step = widths.step(self.task, served.pinned)
        self._bound = Bound.of(setting, self._bound)
        domains = self._domains(served, sizes, tiers.disk)
        return offer_of(
            setting, self.task, served, tiers, step=step, widths=widths.words, bound=self._bound, domains=domains
        )

    def _domains(self, served: Served, sizes: ExpertSizes, disk: Flags) -> tuple[DomainFigures, ...]:
        """By domain; where passes are of several sequences, of each domain served alone."""
        if self.setting.apart is None:
            return domains_of(served)
        train, test = self.setting.apart
        if not self._alone:
            self._alone = {name: self._only(train, test.of_domain(name)) for name in sorted(set(test.domains))}
        found = [serve(one.with_sizes(sizes), served.way, slots=served.slots, disk=disk)
                 for one in self._alone.values()]  # fmt: skip
        return tuple(sorted((domains_of(one)[0] for one in found), key=lambda row: -row.ms))

    def _only(self, train: Workload, test: Workload) -> Setting:
        return replace(self.setting, test=self.setting.together(test), apart=(train, test))

    def _most(self, way: Way, sizes: ExpertSizes, left: float, slots: int) -> int:
        """How many experts stay on the device where some are smaller than the largest; ``slots`` do for sure."""
        low, high = slots, self.setting.all_slots
        while low < high:
            middle = (low + high + 1) // 2
            fits = float(sizes.bytes[self._pinned(way, middle)].sum()) <= left
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    def _pinned(self, way: Way, slots: int) -> Flags:
        """Experts that will never leave the device: those of static ways, and the pinned part of others."""
        return allotted(self.setting, way, slots)[1]

    def _sized(self, widths: Widths, device: Flags) -> ExpertSizes:
        weight = value_bytes(self.task.run) or 2
        step = widths.step(self.task, device)
        if step is None:
            return self.setting.sizes
        plan = plan_of(self.task, (step,), target=Target(preset=PRESET), selections={}, notes=())
        return expert_sizes(plan, source_bits=8.0 * weight)
