"""Published policies beside each other at one size: what each hits, and how long it takes where misses are loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from planner.cache.setting import Setting
from planner.simulate.forecast import hit_rate_interval
from planner.simulate.policies import policy
from planner.simulate.replay import replay
from planner.simulate.split import equal_split
from planner.simulate.timeline import timeline


@dataclass(frozen=True)
class Rule:
    """A policy as it is replayed.

    Attributes:
        policy: its name.
        shared: one cache for all layers, as its source has it.
        words: what else is said of it.
        narrow: small gate weights load a narrower version or none, and a part of the memory holds such versions.
        parameters: of the policy.
    """

    policy: str
    shared: bool = False
    words: str = ""
    narrow: bool = False
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """In words."""
        parts = [policy(self.policy).title, *([self.words] if self.words else [])]
        return ", ".join(parts + (["one cache for all layers"] if self.shared else []))


NARROW = 0.25
"""Bytes of a narrow version by those of a full one: fp16 and int4, or int8 and int2, HOBBIT's pairs."""

FULL = 0.75
"""Part of the slots that hold full versions, where narrow ones are loaded too; ours: the paper does not say."""

THRESHOLDS = (0.6, 0.9)
"""HOBBIT's T1 and T2 for Mixtral."""

RULES: tuple[Rule, ...] = (
    Rule("static", True), Rule("lru"), Rule("lru", True), Rule("lfu"), Rule("lfu", True), Rule("lfu_in_cache", True),
    Rule("arc"), Rule("mixtral_offloading"), Rule("moe_infinity", True, "as published"),
    Rule("moe_infinity", True, "as released", parameters={"behaviour": "released"}),
    Rule("hobbit", True, "distance corrected"),
    Rule("hobbit", True, "distance as printed", parameters={"distance": "paper"}),
    Rule("hobbit", True, "least weights in a quarter of the bits or left out", True, {"thresholds": THRESHOLDS}),
    Rule("edgemoe", True, "distance corrected"),
    Rule("fate"), Rule("window", words="the next pass known", parameters={"foresight": 1}),
    Rule("window", words="the next 4 known", parameters={"foresight": 4}),
    Rule("window", words="the next 16 known", parameters={"foresight": 16}), Rule("min_set"),
)  # fmt: skip
"""In the order in which they are replayed; windows and the best possible know what no engine knows."""


@dataclass(frozen=True)
class PolicyFigures:
    """A policy on the requests for judging.

    Attributes:
        title: in words.
        source: where it was published.
        engine: which ships it; empty = none that we know of.
        bound: it knows the future.
        hit_rate: 0..1; low, high: 95 % interval over requests.
        stalled: part of the steps that wait for an expert.
        ms: per token, where missing experts are loaded.
    """

    title: str
    source: str
    engine: str
    bound: bool
    hit_rate: float
    low: float
    high: float
    stalled: float
    ms: float


def compare(
    setting: Setting, *, slots: int, seed: int = 0, tell: Callable[[str], None] = lambda _: None
) -> list[PolicyFigures]:
    """Every policy with so many slots over all layers, the best first, those that know the future at the end.

    Args:
        setting: model, machine and requests.
        slots: experts that the device holds.
        seed: of what policies draw, and of resampling.
        tell: told which policy is being replayed.

    Raises:
        PlanError: slots that do not hold what one pass needs.
    """
    work = setting.test
    each = np.minimum(equal_split(num_layers=work.num_layers, slots=slots), work.num_experts)
    found = []
    for rule in RULES:
        if rule.policy == "fate" and slots < setting.least_slots:
            continue  # it leaves every layer what a token needs
        tell(f"replaying {rule.title}")
        room: dict[str, Any] = {"slots": slots, "shared": True} if rule.shared else {"layer_slots": each.tolist()}
        if rule.narrow:
            if work.weights is None or (work.pass_tokens > 1).any():
                continue  # it goes by the gate weights of one token
            full = round(FULL * slots)
            room = {"slots": full, "narrow_slots": int((slots - full) / NARROW), "shared": True}
        outcome = replay(work, policy=rule.policy, train=setting.train, seed=seed, **room, **rule.parameters)
        ends = hit_rate_interval(outcome, domains=work.domains, seed=seed)
        clock = timeline(work, outcome, setting.test_costs, link=setting.machine.link, narrow_part=NARROW)
        known = policy(rule.policy)
        found.append(
            PolicyFigures(
                title=rule.title, source=known.source, engine=known.engine, bound=known.bound,
                hit_rate=outcome.hit_rate, low=float(ends.lower.item()), high=float(ends.upper.item()),
                stalled=outcome.stalled_share, ms=clock.ms_per_token,
            )
        )  # fmt: skip
    return sorted(found, key=lambda one: (one.bound, -one.hit_rate, one.title))
