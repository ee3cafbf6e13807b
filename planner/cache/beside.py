"""What else is published, beside the answer: policies at one size, ways to put sequences together, bit planes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import store
from compressor.plan import Plan
from planner.cache.batches import BatchFigures, batches
from planner.cache.bit_planes import PlaneFigures, bit_planes
from planner.cache.policies import PolicyFigures, compare
from planner.cache.setting import setting_of
from planner.machine import Machine


@dataclass(frozen=True)
class Beside:
    """Three comparisons on the requests for judging.

    Attributes:
        policies: which expert makes room, the best first.
        batches: what runs together, order of arrival first.
        planes: in which order bit planes of nested widths are loaded; empty where the run has no gate weights.
    """

    policies: tuple[PolicyFigures, ...]
    batches: tuple[BatchFigures, ...]
    planes: tuple[PlaneFigures, ...]

    def content(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def beside(
    run: store.Run,
    machine: Machine,
    *,
    plan: Plan | None = None,
    seed: int = 0,
    tell: Callable[[str], None] = lambda _: None,
    **asked: Any,
) -> Beside:
    """All three, with the slots that the device has; some seconds.

    Args:
        run: with a trace.
        machine: on which.
        plan: what is done to the checkpoint first.
        seed: of what policies draw, and of resampling.
        tell: told what is being replayed.
        asked: as :func:`planner.caching.study`.

    Raises:
        PlanError: as there.
    """
    setting = setting_of(run, machine, plan=plan, **asked)
    slots = min(setting.slots, setting.all_slots)
    policies = compare(setting, slots=slots, seed=seed, tell=tell)
    tell("putting sequences together")
    return Beside(
        tuple(policies), tuple(batches(setting, slots=slots)), tuple(bit_planes(setting, size=max(setting.batch, 8)))
    )
