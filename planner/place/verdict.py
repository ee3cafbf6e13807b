"""Is a placement worth it: loads and traffic of later text as experts lie, as they would, and beside controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

import store
from compressor.plan import Plan
from moescope.errors import PlanError
from planner.place.dispatch import Dispatch
from planner.place.lpt import lpt
from planner.place.score import Score, score
from planner.place.slots import Placement, contiguous
from planner.place.stream import Requests
from planner.place.stream import chance as by_chance
from planner.placing import BATCH, WINDOWS, Text, expert_bytes, placement_of, text_of

WORTH = 0.05
"""Part of the MoE layers' time that a placement must save to be advised; ours."""


@dataclass(frozen=True)
class Verdict:
    """What a placement is worth on text that it was not made from.

    Attributes:
        before: of the contiguous placement without replicas: as engines begin.
        after: of the plan.
        packed: of LPT with swaps and no replicas, made from the same text as the plan: what replicas have to beat.
        best: of LPT with swaps made from the later text itself: what no placement without replicas does much better.
        chance: the plan, with uniformly random experts: what cannot be mended by placing.
        domains: ``after`` of each domain's later text alone. It has fewer requests, so fewer of them run together.
        domains_before: ``before`` likewise.
        changed_slots: of the plan against the contiguous map with as many slots.
        copied: experts that a device has to be sent which it does not hold in that map.
        expert_bytes: of one expert; 0 = not known.
        batch: requests decoded together; 0 where prompts were read in chunks.
        sentence: what a user would conclude.
    """

    before: Score
    after: Score
    packed: Score
    best: Score
    chance: Score
    domains: dict[str, Score]
    domains_before: dict[str, Score]
    changed_slots: int
    copied: int
    expert_bytes: int
    batch: int
    sentence: str

    @property
    def gain(self) -> float:
        """Part of the MoE layers' time that is saved if every layer of every pass waits for its busiest device."""
        return saved(self.before, self.after)

    @property
    def worst_domain(self) -> str:
        """The domain on whose text devices are busy least, per pass; the first of several."""
        return min(self.domains, key=lambda one: self.domains[one].pass_balancedness)

    @property
    def bytes_changed(self) -> int:
        """Changed slots times bytes of an expert; 0 = not known."""
        return self.changed_slots * self.expert_bytes

    @property
    def bytes_copied(self) -> int:
        """Bytes that have to be sent to devices; 0 = not known."""
        return self.copied * self.expert_bytes


def verdict(
    run: store.Run, plan: Plan, *, train_part: float = 0.5, batch: int = BATCH, chunk: int | None = None,
    dispatch: Dispatch = "local", max_tokens: int | None = None, seed: int = 0, text: Text | None = None,
) -> Verdict:  # fmt: skip
    """Score a plan on the text that it was not made from.

    Args:
        run: with a trace; the plan's.
        plan: with a placement.
        train_part: as the plan was made with.
        batch: requests decoded together.
        chunk: instead, tokens of one prompt per pass.
        dispatch: which replica of an expert a token is sent to.
        max_tokens: as the plan was made with.
        seed: of the uniform control.
        text: what ``planner.placing.text_of`` read by the same arguments; None = it is read.

    Raises:
        PlanError: the run has no trace, or the plan no placement.
    """
    placement = placement_of(plan)
    domains: Sequence[str] = plan.provenance.domains or run.domains
    text = text or text_of(run, plan.source, domains=domains, train_part=train_part, max_tokens=max_tokens)
    if text.later is None:
        raise PlanError(
            f"run {run.name!r} holds counts and no trace: what a placement is worth on later text, per pass and in"
            " traffic is not known; record or import selections token by token"
        )
    later, devices, nodes = text.later, placement.devices, placement.nodes
    layers, experts = text.load.shape
    plain = experts % devices == 0  # else only replicas make slots divisible, and every placement needs some
    spare = 0 if plain else placement.slots - experts
    first = contiguous(num_layers=layers, num_experts=experts, devices=devices, nodes=nodes, slots=experts + spare)
    start = contiguous(num_layers=layers, num_experts=experts, devices=devices, nodes=nodes, slots=placement.slots)

    def on(one: Placement, work: Requests = later) -> Score:
        return score(work, one, count=WINDOWS, batch=batch, chunk=chunk, dispatch=dispatch)

    before, after = on(first), on(placement)
    packed = on(lpt(load=text.load, devices=devices, nodes=nodes, redundant=spare))
    best = on(lpt(load=later.counts(), devices=devices, nodes=nodes, redundant=spare))
    chance = on(placement, by_chance(later, seed=seed))
    texts = {name: later.of_domain(name) for name in sorted(set(later.domains))}
    replicas = placement.slots - experts - spare
    return Verdict(
        before=before, after=after, packed=packed, best=best, chance=chance,
        domains={name: on(placement, text) for name, text in texts.items()},
        domains_before={name: on(first, text) for name, text in texts.items()},
        changed_slots=placement.changed_slots(start), copied=placement.copied_from(start),
        expert_bytes=expert_bytes(run, plan.source), batch=0 if chunk else batch,
        sentence=sentence(before, after, packed, chance, replicas),
    )  # fmt: skip


def _change(gain: float) -> str:
    if abs(gain) < 0.0005:
        return "as much"
    return f"{abs(gain):.1%} {'less' if gain > 0 else 'more'}"


def _slots(replicas: int) -> str:
    return f"{replicas} redundant slot{'' if replicas == 1 else 's'}"


def saved(before: Score, after: Score) -> float:
    """Part of the time of ``before`` that ``after`` saves where all wait for the busiest device; NaN without load."""
    whole = int(before.pass_largest.sum())
    return 1.0 - int(after.pass_largest.sum()) / whole if whole else float(np.nan)


def sentence(before: Score, after: Score, packed: Score, chance: Score, replicas: int) -> str:
    """What a user would conclude, with the figures that it rests on."""
    gain, alone = saved(before, after), saved(before, packed)
    figures = (
        f"per pass, devices are {before.pass_balancedness:.0%} busy as experts lie and {after.pass_balancedness:.0%}"
        f" with this placement; uniformly random experts would make it {chance.pass_balancedness:.0%}"
    )
    change = (
        f"The busiest device would have {_change(gain)} to do, and {WORTH:.0%} less is what we take to be worth it."
    )
    if gain < WORTH and alone < WORTH:
        if before.pass_balancedness >= chance.pass_balancedness * (1 - WORTH):
            return f"No: expert parallelism is balanced enough as experts lie: {figures}. {change}"
        return f"No: later text loads other experts than the text that this was made from: {figures}. {change}"
    if gain < WORTH and not replicas:
        return f"Not this placement: {figures}; LPT with swaps makes it {packed.pass_balancedness:.0%}. {change}"
    if replicas and gain - alone < WORTH:
        return (
            f"Yes, but without replicas: {figures}; experts moved and none replicated, it is"
            f" {packed.pass_balancedness:.0%}. With {_slots(replicas)} per layer the busiest device has"
            f" {_change(gain - alone)} to do than with these, and {WORTH:.0%} less is what we take to be worth it."
        )
    with_them = f", {gain - alone:.1%} of it by {_slots(replicas)} per layer" if replicas else ""
    return f"Yes: {figures}. The busiest device has {gain:.1%} less to do{with_them}."
