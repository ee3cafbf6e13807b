"""The next layers' routers, run early on what an earlier router was given (HOBBIT, 2411.01433; Fate, 2502.12224).

A run records how well that works, per layer, distance and domain, and not which experts were foreseen for which token:
table ``lookahead`` holds sums. So nothing is predicted here. Of the experts that a token truly uses some are declared
foreseen, by lot, such that recall and the share of tokens that were foreseen whole come out as recorded at every width
from k to k + 8; the other places get wrong experts drawn by popularity. What the sums do not say is not there: that
sure choices are foreseen more often than close ones, that mistakes come in runs, and that experts which a cache lacks
are harder to foresee than those it holds. The last makes prefetching look better than it is: transition tables, which
can be held against a cache, foresee 4 to 6 points less of what it lacks than of everything.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

import store
from moescope.errors import PlanError
from planner.simulate.prefetch.corrupted import drawn
from planner.simulate.prefetch.predicted import Predicted, checked_width
from planner.simulate.workload import Workload
from profiler.metrics._arrays import ratio

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Recorded:
    """What a run says about routers run early at one distance.

    Attributes:
        distance: MoE layers between the input and the router.
        domains: of axis 0.
        tokens: (domains, layers); 0 where a layer has nothing so far before it.
        selections: (domains, layers) experts chosen.
        hits: (domains, layers, widths) of which among the k, k + 1, ... predicted ones.
        exact: tokens whose whole choice was among them, of the same shape.
    """

    distance: int
    domains: tuple[str, ...]
    tokens: NDArray[np.int64]
    selections: NDArray[np.int64]
    hits: NDArray[np.int64]
    exact: NDArray[np.int64]

    @property
    def recall(self) -> Floats:
        """(layers, widths) share of the chosen experts that were predicted, over all domains; NaN where unknown."""
        return ratio(self.hits.sum(axis=0), self.selections.sum(axis=0)[:, None])

    @property
    def exact_share(self) -> Floats:
        """(layers, widths) share of the tokens that were predicted whole."""
        return ratio(self.exact.sum(axis=0), self.tokens.sum(axis=0)[:, None])


def recall_of(run: store.Run, *, distance: int = 1, input: str = "router", first: bool = False) -> Recorded:
    """What level ``lookahead`` of a run recorded, phases added up.

    Args:
        run: collected with that level.
        distance: MoE layers between the input and the router.
        input: ``router`` = the input of the earlier router; ``residual`` = the earlier residual stream through the
            later layer's norm.
        first: position 0 counts too, which is unlike all others.

    Raises:
        PlanError: the run has nothing of the kind; the message says what it has.
    """
    table = run.table("lookahead")
    if table.is_empty():
        raise PlanError(f"run {run.name!r} does not say what routers foresee: collect it with level lookahead")
    wanted = table.filter((pl.col("distance") == distance) & (pl.col("input") == input) & (~pl.col("first") | first))
    if wanted.is_empty():
        known = table.select("input", "distance").unique().sort("input", "distance").iter_rows()
        there = ", ".join(f"{name} at distance {far}" for name, far in known)
        raise PlanError(f"run {run.name!r} has no lookahead of input {input!r} at distance {distance}; it has {there}")
    domains = tuple(dict.fromkeys(wanted.sort("domain")["domain"]))
    place = {(one.layer, one.step): at for at, one in enumerate(run.layers)}
    widths = int(wanted["hits"].list.len().max() or 0)  # type: ignore[arg-type]
    tokens, selections = (np.zeros((len(domains), len(place)), np.int64) for _ in range(2))
    hits, exact = (np.zeros((len(domains), len(place), widths), np.int64) for _ in range(2))
    for row in wanted.iter_rows(named=True):
        at = domains.index(row["domain"]), place[row["layer"], row["step"]]
        tokens[at] += row["tokens"]
        selections[at] += row["selections"]
        hits[at] += np.array(row["hits"], np.int64)
        exact[at] += np.array(row["exact"], np.int64)
    return Recorded(distance, domains, tokens, selections, hits, exact)


def predict(
    workload: Workload,
    *,
    train: Workload,
    recorded: Recorded,
    ahead: int = 1,
    width: int | None = None,
    across_passes: bool = False,
    seed: int = 0,
) -> Predicted:
    """Experts foreseen as often as recorded, in the order in which widening the prediction would bring them in.

    Requests take the figures of their own domain where the run has it, else those of all.

    Args:
        workload: whose true routes are drawn from, in passes of one token;
            :func:`~planner.simulate.prefetch.predicted.together` makes batches of the result.
        train: wrong experts are drawn by their popularity here.
        recorded: :func:`recall_of`.
        ahead: layers between prediction and use; the distance that was recorded.
        width: experts foreseen per step, k to k + 8; None = k.
        across_passes: not possible: a later token's input does not exist yet.
        seed: of all draws.

    Raises:
        PlanError: another distance or width than recorded, predictions across passes, passes of several tokens, or as
            :func:`~planner.simulate.prefetch.predicted.checked_width`.
    """
    width = checked_width(workload, train, ahead=ahead, width=width, across_passes=across_passes)
    _check(workload, recorded, ahead, width, across_passes)
    generator = np.random.default_rng([seed, 3])
    flags = np.full((workload.num_layers, workload.num_passes, width), -1, np.int8)
    domains = np.array(workload.domains)[workload.request_of_pass]
    for name in dict.fromkeys(workload.domains):
        own = [at for at, known in enumerate(recorded.domains) if known == name] or list(range(len(recorded.domains)))
        tokens, hits, exact = (sums[own].sum(axis=0) for sums in (recorded.tokens, recorded.hits, recorded.exact))
        for layer in np.flatnonzero(tokens > 0):
            mine = np.flatnonzero((domains == name) & (workload.needed[layer] > 0))
            start, gains = growth(k=workload.top_k[layer], hits=hits[layer] / tokens[layer],
                                  exact=exact[layer] / tokens[layer])  # fmt: skip
            flags[layer, mine] = _flags(generator, start, gains, len(mine))[:, :width]
    return Predicted("cross_layer_gate", drawn(workload, flags, train=train, seed=seed), ahead)


def growth(*, k: int, hits: Floats, exact: Floats) -> tuple[Floats, Floats]:
    """How many of k experts are among the k predicted first, and how one more prediction after another finds the rest.

    Args:
        k: experts chosen.
        hits: (widths,) of which are among the k, k + 1, ... predicted ones, on average per token, rising.
        exact: (widths,) share of tokens for which all are, rising.

    Returns:
        start: (k + 1,) probability of 0..k right ones among the first k: k with the recorded probability, otherwise
            binomial over 0..k - 1 with the mean that is left.
        gains: (widths - 1, k + 1) probability that the next predicted expert is one that was missing, by the number
            that were right before. Mean and share come out exactly as recorded unless a probability would exceed 1.
    """
    rest = float(np.clip(ratio(hits[0] - k * exact[0], (1.0 - exact[0]) * max(k - 1, 1), empty=0.0), 0.0, 1.0))
    start = np.append(_binomial(k - 1, rest) * (1.0 - exact[0]), exact[0])
    gains = np.zeros((len(hits) - 1, k + 1))
    right = start.copy()
    for wider in range(1, len(hits)):
        found, whole = hits[wider] - right @ np.arange(k + 1), exact[wider] - right[k]
        last = float(np.clip(ratio(whole, right[k - 1], empty=0.0), 0.0, 1.0))
        others = float(np.clip(ratio(found - last * right[k - 1], right[: k - 1].sum(), empty=0.0), 0.0, 1.0))
        gain = np.array([others] * (k - 1) + [last, 0.0])
        gains[wider - 1] = gain
        moved = right * gain
        right = right - moved + np.concatenate([[0.0], moved[:-1]])
    return start, gains


def _flags(generator: np.random.Generator, start: Floats, gains: Floats, passes: int) -> NDArray[np.bool_]:
    """(passes, k + 8) which predictions are right, drawn by :func:`growth`."""
    k = len(start) - 1
    right = np.searchsorted(np.cumsum(start)[:-1], generator.random(passes), side="right")
    flags = [generator.permuted(np.arange(k) < right[:, None], axis=1)]
    for gain in gains:
        found = generator.random(passes) < gain[right]
        right = right + found
        flags.append(found[:, None])
    return np.concatenate(flags, axis=1)


def _binomial(trials: int, share: float) -> Floats:
    """(trials + 1,) probabilities of 0..trials."""
    result = np.ones(1)
    for _ in range(trials):
        result = np.append(result * (1.0 - share), 0.0) + np.append(0.0, result * share)
    return result


def _check(workload: Workload, recorded: Recorded, ahead: int, width: int, across_passes: bool) -> None:
    if across_passes:
        raise PlanError("the input of a router is not there before its token: gates do not foresee across passes")
    if ahead != recorded.distance:
        raise PlanError(f"recorded at distance {recorded.distance}, asked for {ahead} layers ahead: give the same")
    if recorded.tokens.shape[1] != workload.num_layers:
        raise PlanError(f"recorded for {recorded.tokens.shape[1]} layers, the workload has {workload.num_layers}")
    least, most = max(workload.top_k), min(workload.top_k) + recorded.hits.shape[2] - 1
    if not least <= width <= most:
        raise PlanError(f"{width} experts foreseen per layer: the run recorded {least} to {most}")
    if (workload.pass_tokens > 1).any():
        raise PlanError("routers are recorded token by token: foresee single tokens, then put predictions together")
