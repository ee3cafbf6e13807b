"""The experts that a token id used most in other text: what the word alone says, before any layer has run. Ours.

A lower end for predictors that read token ids, such as ExpertFlow's transformer (arXiv 2410.17954), which also sees the
words around and is not reproduced here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

import store
from moescope.errors import PlanError
from planner.simulate.prefetch.predicted import Predicted, checked_width, foreseeable
from planner.simulate.prefetch.seen_sets import count_after, joined
from planner.simulate.workload import Workload
from profiler.metrics._arrays import ratio


def predict(
    workload: Workload,
    *,
    train: Workload,
    tokens: NDArray[Any],
    train_tokens: NDArray[Any],
    ahead: int = 1,
    width: int | None = None,
    across_passes: bool = False,
) -> Predicted:
    """Experts by how often this token id chose them in ``train``, with one pass's worth spread by popularity.

    tokens, train_tokens: (passes,) the token id of every pass, :func:`token_ids_of`; -1 = not known. The rest as for
    :func:`planner.simulate.prefetch.popularity.predict`.

    Raises:
        PlanError: passes of several tokens, ids that are not one per pass, or as
            :func:`~planner.simulate.prefetch.predicted.checked_width`.
    """
    from planner.simulate._prefetch import rank_by_tables

    width = checked_width(workload, train, ahead=ahead, width=width, across_passes=across_passes)
    for work, given in ((workload, tokens), (train, train_tokens)):
        if len(given) != work.num_passes:
            raise PlanError(f"{len(given)} token ids for {work.num_passes} passes: give one for every pass")
    asked, seen = ((np.asarray(given, np.int64) + 1).astype(np.uint64) for given in (tokens, train_tokens))
    one = np.zeros((1, workload.num_passes, 1), np.int16)  # a single source that always says: popularity
    always = np.ones((1, workload.num_passes, 1), np.uint16)
    popular = train.counts().astype(np.float64)
    result = np.full((workload.num_layers, workload.num_passes, width), -1, np.int16)
    for layer in range(workload.num_layers):
        table = count_after(seen, train.ids[layer], train.tokens[layer], num_experts=train.num_experts)
        shares = ratio(popular[layer], popular[layer].sum(), empty=0.0)
        rank_by_tables(one, always, shares[None, None], table.rows_of(asked)[None], *joined([table]), result[layer])
    return Predicted("token_frequency", foreseeable(workload, result, ahead=ahead, across_passes=across_passes), ahead)


def token_ids_of(run: store.Run, workload: Workload) -> NDArray[np.int64]:
    """(passes,) the token id of every pass of a workload of this run, -1 = not kept.

    Raises:
        PlanError: the run keeps no token ids, or the workload does not hold every token of its sequences.
    """
    if not run.has_tokens:
        raise PlanError(f"run {run.name!r} keeps no token ids: collect it with its text, or foresee by transitions")
    known = run.token_ids()
    place = {int(number): at for at, number in enumerate(known.sequences)}
    parts = []
    for request, number in enumerate(workload.sequences):
        at = place.get(int(number))
        length = int(workload.offsets[request + 1] - workload.offsets[request])
        found = np.empty(0, np.int32) if at is None else known.ids[known.offsets[at] : known.offsets[at + 1]]
        if len(found) != length:
            raise PlanError(
                f"sequence {number} has {len(found)} tokens in run {run.name!r} and {length} passes in the workload:"
                " token ids go with workloads of all tokens, one per pass"
            )
        parts.append(found)
    return np.concatenate(parts).astype(np.int64)
