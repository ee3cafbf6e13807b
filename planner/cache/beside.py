"""What else is known beside the answer: published policies, ways to foresee, forecasts, batches and bit planes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import store
from compressor.plan import Plan
from planner.cache.batches import BatchFigures, batches
from planner.cache.bit_planes import PlaneFigures, bit_planes
from planner.cache.foreseen import ForeseenFigures, foreseen
from planner.cache.outlook import OutlookFigures, outlook
from planner.cache.policies import PolicyFigures, compare
from planner.cache.setting import setting_of
from planner.machine import Machine


@dataclass(frozen=True)
class Beside:
    """Comparisons on the requests for judging.

    Attributes:
        policies: which expert makes room, the best first.
        foreseen: which experts come next, by each way to foresee them.
        outlook: hit rates of text yet to come.
        batches: what runs together, order of arrival first.
        planes: in which order bit planes of nested widths are loaded; empty where the run has no gate weights.
    """

    policies: tuple[PolicyFigures, ...]
    foreseen: tuple[ForeseenFigures, ...]
    outlook: tuple[OutlookFigures, ...]
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
    """All of them, with the slots that the device has; some seconds.

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
    ahead = foreseen(run, setting, slots=slots, tell=tell)
    tell("putting sequences together")
    return Beside(
        policies=tuple(policies), foreseen=tuple(ahead), outlook=tuple(outlook(setting, slots=slots)),
        batches=tuple(batches(setting, slots=slots)), planes=tuple(bit_planes(setting, size=max(setting.batch, 8))),
    )  # fmt: skip
