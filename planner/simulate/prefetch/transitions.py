"""Transition tables: the experts of the two MoE layers before name those that follow (EdgeMoE, arXiv 2308.14352).

EdgeMoE keys one table by the exact experts of two layers. With k of E experts there are far more such keys than text:
of E = 128, k = 8 hardly one is met twice. So every key backs off, each level lending the next one pass's worth of
choices, as :func:`profiler.metrics.transitions.prediction_table` lends one:

1. the exact sets of both layers, as EdgeMoE;
2. the exact set of the nearer layer;
3. the mean of P(j | i) over the single experts i of both layers, E x E tables;
4. popularity, inside those tables.

Levels 1 and 2 hold the sets that were seen, no others, and one layer's tables at a time: for L = 48, E = 128, k = 8 and
20,000 passes about 5 MB, beside 0.3 MB for level 3.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from planner.simulate.prefetch.predicted import Predicted, Seen, checked_width, seen_before
from planner.simulate.prefetch.seen_sets import SeenSets, count_after, joined, pair_keys, set_keys
from planner.simulate.workload import Workload
from profiler.metrics.transitions import prediction_table, transition_counts

Floats = NDArray[np.float64]


def predict(
    workload: Workload,
    *,
    train: Workload,
    ahead: int = 1,
    width: int | None = None,
    across_passes: bool = False,
    layers_back: int = 2,
    sets: bool = True,
) -> Predicted:
    """The experts most often chosen after those of the layers ``ahead`` and ``ahead + 1`` before.

    Args:
        workload: what is foreseen.
        train: what the tables are counted on: other requests, best in passes of one token.
        ahead: layers between prediction and use.
        width: experts foreseen per step; None = k.
        across_passes: the last layers of the pass before foresee the first ones, but for a request's first pass.
        layers_back: 2, as EdgeMoE, or 1. Where only one layer lies before, one is used.
        sets: whether levels 1 and 2 are there; without them and with ``layers_back`` 1 this is the predictor of metric
            ``transition_recall``.

    Raises:
        PlanError: as :func:`~planner.simulate.prefetch.predicted.checked_width`.
    """
    from planner.simulate._prefetch import rank_by_tables

    width = checked_width(workload, train, ahead=ahead, width=width, across_passes=across_passes)
    result = np.full((workload.num_layers, workload.num_passes, width), -1, np.int16)
    for layer in range(workload.num_layers):
        known, seen = (
            [one for back in range(layers_back)
             if (one := seen_before(work, layer, ahead + back, across_passes=across_passes)) is not None]
            for work in (train, workload)
        )  # fmt: skip
        if not seen:
            continue
        tables = np.stack([_table(one, train, layer) for one in known])
        rows, levels = _set_levels(known, seen, train, layer) if sets else (_no_rows(workload), [])
        rank_by_tables(
            np.stack([one.ids for one in seen]), np.stack([one.tokens for one in seen]), tables, rows,
            *joined(levels), result[layer],
        )  # fmt: skip
    return Predicted("transitions", result, ahead)


def _table(known: Seen, train: Workload, layer: int) -> Floats:
    """P(j | i) of level 3, (E, E)."""
    counts = transition_counts(
        first=known.ids, second=train.ids[layer], offsets=np.array([0, train.num_passes], np.int64),
        num_experts=[train.num_experts] * 2,
    )  # fmt: skip
    return prediction_table(counts=counts[0])


def _set_levels(
    known: list[Seen], seen: list[Seen], train: Workload, layer: int
) -> tuple[NDArray[np.int64], list[SeenSets]]:
    """Rows (levels, passes) of the sets that the workload meets, and the tables of level 2, then 1."""
    rows: list[NDArray[np.int64]] = []
    levels: list[SeenSets] = []
    before = 0
    earlier = [set_keys(one.ids, num_experts=train.num_experts) for one in known]
    wanted = [set_keys(one.ids, num_experts=train.num_experts) for one in seen]
    for depth in range(len(known)):
        mine = earlier[0] if depth == 0 else pair_keys(earlier[0], earlier[depth])
        asked = wanted[0] if depth == 0 else pair_keys(wanted[0], wanted[depth])
        table = count_after(mine, train.ids[layer], train.tokens[layer], num_experts=train.num_experts)
        found = table.rows_of(asked)
        rows.append(np.where(found >= 0, found + before, -1))
        levels.append(table)
        before += len(table.keys)
    return np.stack(rows), levels


def _no_rows(workload: Workload) -> NDArray[np.int64]:
    return np.empty((0, workload.num_passes), np.int64)
