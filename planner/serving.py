"""The entry to "how do I run it on my machine?": a run and a machine in, plans that say where experts lie out.

Widths of experts, where each lies, which cache, whether the CPU runs what is missing, and prefetching are tried
together: narrower experts cost quality, take fewer bytes over the link, and let more of them fit. The planner runs no
model: costs of widths are priced from the run's sums, times come from replaying its trace.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, overload

import store
from compressor.plan import Plan, Prefetch
from moescope.errors import PlanError
from moescope.sizes import size
from planner.cache.offer import Offer
from planner.cache.setting import Setting, notes_of, setting_of
from planner.cache.trials import Trials, widths_of
from planner.cache.ways import RESIDENT, way_of
from planner.candidates import Request
from planner.guard import Rule
from planner.machine import Machine
from planner.recommendation import CARE
from planner.source import packed_bits

Word = Literal["as it is", "serve", "with care", "leave it"]
"""``as it is``: all experts fit on the device in the width that they have. ``serve``: the first plan costs little.
``with care``: it costs more than was allowed, and nothing cheaper fits. ``leave it``: nothing fits."""

STEPS = 200_000
"""Layer-steps that each of some fifty combinations is replayed on."""

PLAIN = ("layers_cpu",)
"""What engines do without a trace."""

STATIC = ("static_cpu", "half_pinned")
"""Ways that may give what lies on the device for good another width than the rest."""

MOVING = ("lru", "lru_split", "lru_shared")
"""Ways whose experts all have widths of their own wherever they lie, since any may come to the device."""

HARDLY = 1.03
"""How many times as long a plan may take as the fastest to be preferred for costing less quality; ours."""

UNPRICED = "The run cannot price narrower experts: collect it with levels activations and errors."

SLOWER = 1.02
"""How many times the time per token a domain takes that is worth a sentence."""

TOLD = 2
"""Ways that do not go whose reasons are told where none goes: the last, of the narrowest experts."""

KEPT = 12
"""Offers whose plans are kept whole in a file, beside those on the front."""

PREFETCHES: tuple[Prefetch, ...] = ("transitions", "cross_layer_gate")
"""Tried beside the best way, where that is an LRU cache per layer with nothing pinned."""


@dataclass(frozen=True)
class Serving(Sequence[Plan]):
    """How to run a model on a machine. As a sequence, its plans, the best first.

    Attributes:
        word: see :data:`Word`.
        reasons: why.
        offers: within the quality that was allowed, the fastest first; then others, by what they cost. Where all
            experts fit as they are, that comes before all.
        refused: combinations that do not go, and why.
        memory: bytes of the device: total, other, kv, activations, experts.
        machine: name and title.
        quality: largest KL divergence allowed, nats per token.
        notes: what was assumed.
    """

    word: Word
    reasons: tuple[str, ...]
    offers: tuple[Offer, ...]
    refused: Mapping[str, str]
    memory: Mapping[str, float]
    machine: tuple[str, str]
    quality: float
    notes: tuple[str, ...] = field(default=())

    @property
    def front(self) -> tuple[int, ...]:
        """Places of offers than which no other is both as fast and as cheap, the fastest first."""
        known = sorted((one.ms, one.kl, at) for at, one in enumerate(self.offers) if one.kl is not None)
        front, least = [], float("inf")
        for _, kl, at in known:
            if kl < least:
                front.append(at)
                least = kl
        return tuple(front)

    @overload
    def __getitem__(self, place: int) -> Plan: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Plan]: ...
    def __getitem__(self, place: int | slice) -> Plan | Sequence[Plan]:
        plans = [one.plan for one in self.offers]
        return plans[place]

    def __len__(self) -> int:
        return len(self.offers)

    def content(self) -> dict[str, Any]:
        """As plain data, for a file."""
        return {
            "kind": "serving", "word": self.word, "quality": self.quality, "machine": list(self.machine),
            **{name: list(getattr(self, name)) for name in ("reasons", "notes")},
            "refused": dict(self.refused), "memory": dict(self.memory),
            "offers": [one.content() for at, one in enumerate(self.offers) if at < KEPT or at in self.front],
        }  # fmt: skip

    @staticmethod
    def of(content: Mapping[str, Any]) -> Serving:
        """From plain data.

        Raises:
            PlanError: it is none.
        """
        try:
            return Serving(
                word=content["word"], quality=float(content["quality"]), machine=tuple(content["machine"]),
                reasons=tuple(content["reasons"]), notes=tuple(content["notes"]), refused=dict(content["refused"]),
                memory=dict(content["memory"]), offers=tuple(Offer.of(one) for one in content["offers"]),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"this is no advice on serving by moescope: {error}") from error


def serving(
    run: store.Run,
    machine: Machine,
    *,
    quality: float = CARE,
    keep_widths: bool = False,
    guard: bool | Rule = True,
    allow_invalid: bool = False,
    tell: Callable[[str], None] = lambda _: None,
    steps: int = STEPS,
    **asked: Any,
) -> Serving:
    """Plans for running a run's model on a machine, the fastest within a quality first.

    Args:
        run: with a trace; with level errors, narrower experts are tried too.
        machine: with the memory that may be used.
        quality: largest predicted KL divergence, nats per token.
        keep_widths: experts stay as wide as they are.
        guard: super experts keep the widest width.
        allow_invalid: take a run whose checks failed.
        tell: told what is being worked out.
        steps: layer-steps that each combination is replayed on.
        asked: context, batch, other_weights, domains, phase: as :func:`planner.cache.setting.setting_of`.

    Raises:
        PlanError: as there; a run that is still being collected, has no trace, or whose checks failed.
    """
    _require_usable(run, allow_invalid)
    tell("reading the trace")
    setting = setting_of(run, machine, narrow=True, steps=steps, **asked)
    request = Request(run=run, memory=0, domains=asked.get("domains"), guard=guard, allow_invalid=allow_invalid)
    task = replace(request.task(), form="packed", bits=16.0)
    tried = Trials(setting, task)
    packed = packed_bits(run)
    for widths in widths_of(task, keep=keep_widths or packed is not None):
        tell(f"serving experts {widths.words}")
        if tried.all_fit(widths):
            if widths.near == widths.far:
                tried.take(RESIDENT, widths)
            continue
        for name in (*PLAIN, *STATIC, *(MOVING if widths.near == widths.far else ())):
            tried.take(way_of(name), widths)
    ranked = _ranked(tried.offers, quality)
    if ranked and tried.way(ranked[0]).can_prefetch:
        tell("prefetching")
        for name in PREFETCHES:
            tried.take_prefetching(ranked[0], name)
        ranked = _ranked(tried.offers, quality)
    word, reasons = _advice(setting, ranked, quality, tried.refused)
    if word == "as it is":
        ranked = tuple(sorted(ranked, key=lambda one: one.kl != 0.0))
    budget = setting.budget
    return Serving(
        word=word, reasons=reasons, offers=ranked, refused=tried.refused,
        memory={"total": float(budget.total), "other": budget.other, "kv": budget.kv,
                "activations": budget.activations, "experts": budget.left},
        machine=(machine.name, machine.title), quality=quality, notes=notes_of(setting),
    )  # fmt: skip


def _require_usable(run: store.Run, allow_invalid: bool) -> None:
    if run.live:
        raise PlanError(f"run {run.name!r} is still being collected: plan when it is finished")
    if not run.has_trace:
        raise PlanError(
            f"run {run.name!r} holds counts and no trace, and times depend on the order of tokens: record or import"
            " selections token by token"
        )
    if run.badge.status == "invalid" and not allow_invalid:
        raise PlanError(
            f"the checks of run {run.name!r} failed ({run.badge.reason}): collect it again, or allow an invalid run"
        )


def _ranked(offers: Sequence[Offer], quality: float) -> tuple[Offer, ...]:
    """Within the quality, the fastest first; then the others by what they cost, those of unknown cost last.

    Of those that are hardly slower than the fastest, the one that costs least comes first.
    """

    def place(one: Offer) -> tuple[float, float, float]:
        if one.kl is None:
            return 2.0, one.ms, 0.0
        return (0.0, one.ms, one.kl) if one.kl <= quality else (1.0, one.kl, one.ms)

    ranked = sorted(offers, key=lambda one: (*place(one), one.plan.digest))
    allowed = [one for one in ranked if place(one)[0] == 0]
    if allowed:
        near = [one for one in allowed if one.ms <= HARDLY * allowed[0].ms]
        best = min(near, key=lambda one: (one.kl or 0.0, one.ms, one.plan.digest))
        ranked = [best, *(one for one in ranked if one is not best)]
    return tuple(ranked)


def _advice(
    setting: Setting, offers: Sequence[Offer], quality: float, refused: Mapping[str, str]
) -> tuple[Word, tuple[str, ...]]:
    budget = setting.budget
    room = f"The device has {size(budget.total)}, of which {size(budget.left)} are left for experts"
    if not offers:
        last = {reason: what for what, reason in refused.items()}
        why = (f"{what[:1].upper()}{what[1:]}: {reason}." for reason, what in list(last.items())[-TOLD:])
        return "leave it", (f"{room}: no way to serve them fits. Give more memory, a shorter context, or a disk.", *why)
    best = offers[0]
    reasons = [f"{room}, which take {size(setting.sizes.total)} as they are."]
    if setting.slots >= setting.all_slots:
        resident = next((one for one in offers if one.kl == 0.0), best)
        reasons.append(f"All of them fit: {resident.ms:.3g} ms per token, and nothing has to be cached.")
        return "as it is", (*reasons, *_faster(resident, best))
    cost = "its cost is not known" if best.kl is None else f"predicted cost {best.kl:.2g} nats per token"
    cost = "no weight changes" if best.kl == 0.0 else cost
    reasons.append(
        f"{best.way[0].upper()}{best.way[1:]}, experts {best.widths}: {_rate(best)}"
        f" ({best.ms:.3g} ms, {best.low:.3g} to {best.high:.3g}), {cost}."
    )
    unchanged = next((one for one in offers if one.kl == 0.0), None)
    if unchanged is not None and unchanged is not best:
        reasons.append(f"Without changing a weight, {unchanged.way}: {_rate(unchanged)} ({unchanged.ms:.3g} ms).")
    plain = min((one for one in offers if one.way == way_of(PLAIN[0]).title and one.widths == best.widths),
                key=lambda one: one.ms, default=None)  # fmt: skip
    if plain is not None and plain is not best:
        reasons.append(f"The same widths without a trace, {plain.way}: {plain.ms:.3g} ms.")
    if len(best.domains) > 1 and best.worst.ms > SLOWER * best.ms:
        reasons.append(f"The slowest domain is {best.worst.domain}: {best.worst.ms:.3g} ms.")
    if best.kl is None:
        return "with care", (*reasons, UNPRICED)
    faster = [one for one in offers if one.kl is None and one.ms < 0.9 * best.ms]
    if faster:
        blind = min(faster, key=lambda one: (one.plan.estimate.bytes_saved, one.ms))  # the widest will cost least
        reasons.append(f"Experts {blind.widths} would take {blind.ms:.3g} ms, {blind.way}. {UNPRICED}")
    if best.kl > quality:
        return "with care", (
            *reasons,
            f"That is more than the {quality:g} that were allowed, and nothing cheaper fits.",
        )
    return "serve", tuple(reasons)


def _rate(offer: Offer) -> str:
    value = offer.tokens_per_second
    return f"{value:,.0f} tokens/s" if value >= 100 else f"{value:.3g} tokens/s"


def _faster(resident: Offer, best: Offer) -> list[str]:
    if best is resident or best.ms > 0.9 * resident.ms:
        return []
    return [
        f"Experts {best.widths} would be faster: {best.ms:.3g} ms, at a predicted cost of {best.kl or 0.0:.2g} nats per"
        " token."
    ]
