"""Ways to foresee experts beside each other: how often they are right, and what that does to a cache and its times."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

import store
from moescope.errors import PlanError
from planner.cache.setting import Setting
from planner.simulate.prefetch import Method, find
from planner.simulate.prefetch.predicted import Predicted
from planner.simulate.prefetch.score import score
from planner.simulate.prefetch.token_frequency import token_ids_of
from planner.simulate.split import equal_split
from planner.simulate.timeline import prefetching
from planner.simulate.workload import Workload

ACCURACIES = (0.9, 1.0)
"""Of true routes with mistakes: what a trained predictor could be, and routes that are known beforehand."""


@dataclass(frozen=True)
class ForeseenFigures:
    """One way, on single tokens, as many experts foreseen one layer ahead as a token uses.

    Attributes:
        title: in words.
        source: where it was published.
        drawn: true routes with mistakes, not a prediction.
        recall: part of the needed experts that were foreseen; chance: of as many drawn uniformly.
        precision: part of the foreseen experts that were needed.
        exact: part of the steps foreseen whole.
        recall_of_missing: of what an LRU cache lacked, which is all that can be saved.
        hit_rate: of the LRU cache with prefetching.
        loads_per_token: bytes over the link; wasted_per_token: of which were never used.
        ms: per token.
    """

    title: str
    source: str
    drawn: bool
    recall: float
    chance: float
    precision: float
    exact: float
    recall_of_missing: float
    hit_rate: float
    loads_per_token: float
    wasted_per_token: float
    ms: float


def foreseen(
    run: store.Run, setting: Setting, *, slots: int, tell: Callable[[str], None] = lambda _: None
) -> list[ForeseenFigures]:
    """All ways that the run allows, in the order of ``planner.simulate.prefetch.METHODS``; none for one layer alone.

    Args:
        run: the one of the setting.
        setting: model, machine and requests.
        slots: experts that the device holds.
        tell: told what is being replayed.
    """
    train, work = setting.apart or (setting.train, setting.test)
    each = np.minimum(equal_split(num_layers=work.num_layers, slots=slots), work.num_experts)
    if work.num_layers < 2 or slots < setting.least_slots or setting.machine.shares_memory:
        return []
    rows = []
    for method, words, arguments in _methods(run, setting, train, work):
        tell(f"foreseeing experts: {method.title.lower()}")
        width = min(max(work.top_k), work.num_experts)
        predicted = method.predict(work, train=train, ahead=1, width=width, **arguments)
        rows.append(_figures(setting, work, predicted, each, f"{method.title}{words}", method))
    return rows


def _methods(
    run: store.Run, setting: Setting, train: Workload, work: Workload
) -> Iterator[tuple[Method, str, dict[str, Any]]]:
    """(method, what is added to its title, its arguments)."""
    for name in ("popularity", "previous_token", "transitions", "activation_matrix"):
        yield find(name), "", {}
    try:
        tokens = {"tokens": token_ids_of(run, work), "train_tokens": token_ids_of(run, train)}
    except PlanError:  # a run without token ids
        tokens = {}
    if tokens:
        yield find("token_frequency"), "", tokens
    if setting.recorded is not None:
        yield find("cross_layer_gate"), "", {"recorded": setting.recorded}
    for accuracy in ACCURACIES:
        yield find("corrupted"), f": {accuracy:.0%}", {"accuracy": accuracy}


def _figures(
    setting: Setting, work: Workload, predicted: Predicted, each: Any, title: str, method: Method
) -> ForeseenFigures:
    # layers differ by one slot at most; what is scored without a clock takes the smaller number for all
    scored = score(predicted, work, slots=max(int(each.min()), 1))
    clock = prefetching(
        work, setting.costs_of(work), predicted=predicted.ids, slots=each, link=setting.machine.link, ahead=1
    )
    tokens = max(int(work.pass_tokens.sum()), 1)
    return ForeseenFigures(
        title=title, source=method.source, drawn=method.drawn, recall=scored.recall, chance=scored.chance_recall,
        precision=scored.precision, exact=scored.exact_share, recall_of_missing=scored.recall_of_missing,
        hit_rate=clock.hit_rate, loads_per_token=clock.bytes / tokens, wasted_per_token=clock.wasted_bytes / tokens,
        ms=clock.ms_per_token,
    )  # fmt: skip
