"""Hit rates of text that was not replayed: intervals over requests, later requests, and a domain nobody has seen.

Requests are what was sampled; tokens inside one are not independent. :func:`hit_rate_interval` is about text just like
what was replayed. What comes is a sample, too, and may differ: two forecasts have *prediction* intervals, which no
number of requests makes arbitrarily narrow.

- :func:`forecast_later`: more requests of the same domains. Text drifts, as when files are sorted by subject: the
  workload is cut into stretches, and what is to come is one more.
- :func:`forecast_domain`: requests of a domain that the workload does not hold. Each recorded domain is replayed alone,
  as if it were the unseen one.

Both are random-effects prediction intervals (Higgins, Thompson and Spiegelhalter, 2009) on the logit scale, where rates
keep between 0 and 1: the spread between parts beyond that of their requests (method of moments), the spread of the new
requests, and that of the weighted mean; Student's t with two degrees fewer than parts. Nobody knows how domains are
distributed, and a few may be unlike the rest: instead of a normal distribution any with one peak is allowed, by the
inequality of Vysochanskij and Petunin (1980); at 95 % that is 1.5 times as wide. Text of another kind than all that was
recorded is outside of any forecast.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moescope.errors import PlanError
from planner.simulate.bounds import BOUNDS, bounds
from planner.simulate.curves import curve, popularity
from planner.simulate.outcome import Curve, Outcome
from planner.simulate.workload import Workload, strata
from profiler.metrics._arrays import BoolArray, FloatArray, ratio
from profiler.metrics._intervals import interval

Measure = Callable[[Workload, Workload], Curve | Outcome]
"""(what it may be fitted on, what is replayed) -> hits. Policies that fit nothing leave the first alone."""

_Tallies = tuple[FloatArray, FloatArray]
_STRETCHES = 6  # enough to see drift, few enough that each holds many requests


@dataclass(frozen=True)
class Forecast:
    """Hit rates with an interval, each (sizes,): of every cache size of a curve, or of the one that was replayed.

    Attributes:
        rate: hit rate, 0..1; NaN where the size holds no step.
        lower, upper: ends of the interval.
        confidence: that the interval was made for.
        requests: that it is about: those measured, or as many to come.
    """

    rate: FloatArray
    lower: FloatArray
    upper: FloatArray
    confidence: float
    requests: int

    def holds(self, rate: ArrayLike) -> BoolArray:
        """Whether hit rates lie inside, per size."""
        given = np.asarray(rate, np.float64)
        found: BoolArray = (self.lower <= given) & (given <= self.upper)
        return found

    def width(self, *, misses: bool = False) -> FloatArray:
        """Width of the interval over the hit rate, or over the miss rate, per size."""
        return ratio(self.upper - self.lower, 1.0 - self.rate if misses else self.rate)


def measure_of(name: str, *, shared: bool = False) -> Measure:
    """The measure of a policy or bound with a curve of all sizes, for the forecasts.

    Args:
        name: ``lru``, ``lfu``, ``static`` (the most used experts of what it is fitted on), or a bound.
        shared: one cache for all layers.

    Raises:
        PlanError: another name.
    """
    if name == "static":
        return lambda train, workload: popularity(train, workload, shared=shared)
    if name in ("lru", "lfu"):
        return lambda _, workload: curve(workload, policy=name, shared=shared)  # type: ignore[arg-type]
    if name in BOUNDS:
        return lambda _, workload: bounds(workload, names=[name], shared=shared)[name]
    raise PlanError(f"{name!r} has no curve to forecast: use lru, lfu, static or {', '.join(BOUNDS)}")


def hit_rate_interval(
    measured: Curve | Outcome,
    *,
    domains: tuple[str, ...] | None = None,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> Forecast:
    """The hit rate of text like this, if there were much of it: bootstrap of whole requests, percentiles.

    Args:
        measured: hits per request.
        domains: (requests,) of each: as many are drawn of each domain as there are; domains of one request each, which
            alone would vary by nothing, are drawn as one. None = drawn from all alike.
        confidence: 0..1.
        num_resamples: from 2.
        seed: of the draws; the same seed draws the same requests for every policy.

    Raises:
        PlanError: settings out of range, or domains that are not one per request.
    """
    _check(confidence, None)
    if num_resamples < 2:
        raise PlanError(f"num_resamples is {num_resamples}: an interval takes at least 2, usually 1000")
    hits, uses = _tallies(measured)
    names = np.asarray(strata(domains) if domains is not None else ["all"] * len(uses))
    if len(names) != len(uses):
        raise PlanError(f"{len(names)} domains are given for {len(uses)} requests: give one for each")
    drawn = np.zeros((num_resamples, len(uses)))
    generator = np.random.default_rng(seed)
    for name in dict.fromkeys(names.tolist()):
        mine = np.flatnonzero(names == name)
        drawn[:, mine] = generator.multinomial(len(mine), np.full(len(mine), 1.0 / len(mine)), size=num_resamples)
    rates = ratio(drawn @ hits, drawn @ uses[:, None])
    rate = _rate(hits, uses)
    lower, upper = interval(estimate=rate, resampled=rates, confidence=confidence, rule="percentile")
    return Forecast(rate, lower, upper, confidence, len(uses))


def forecast_later(
    train: Workload, measure: Measure, *, fitted: bool = False, requests: int | None = None, confidence: float = 0.95
) -> Forecast:
    """The hit rate of later requests of the same domains, with a prediction interval.

    Args:
        train: the requests recorded, at least 3, in order.
        measure: what is replayed; see :func:`measure_of`.
        fitted: it is fitted on what it gets first. Then each stretch is replayed with a fit on all others, since a fit
            flatters itself.
        requests: that will come; None = as many.
        confidence: that they fall inside, at least; 0..1.

    Raises:
        PlanError: settings out of range, fewer than 3 requests, or a count below 1.
    """
    _check(confidence, requests)
    if train.num_requests < 3:
        raise PlanError(f"{train.num_requests} requests cannot foretell others: record at least 3")
    stretches = _stretches(train)
    if fitted:
        parts = []
        for mine in stretches:
            rest = train.requests(np.setdiff1d(np.arange(train.num_requests), mine))
            parts.append(_tallies(measure(rest, train.requests(mine))))
    else:
        hits, uses = _tallies(measure(train, train))
        parts = [(hits[mine], uses[mine]) for mine in stretches]
    domains = [[train.domains[one] for one in mine] for mine in stretches]
    return _predict(parts, domains, train.num_requests if requests is None else requests, confidence)


def forecast_domain(
    train: Workload, measure: Measure, *, fitted: bool = False, requests: int | None = None, confidence: float = 0.95
) -> Forecast:
    """The hit rate of a domain that is not in ``train``, with a prediction interval.

    Args:
        train: requests of at least 3 domains; each is replayed alone.
        measure: what is replayed; see :func:`measure_of`.
        fitted: it is fitted on what it gets first: all domains but the one replayed.
        requests: of the unseen domain; None = the median over those recorded.
        confidence: that they fall inside, at least; 0..1.

    Raises:
        PlanError: fewer than 3 domains, or settings out of range.
    """
    _check(confidence, requests)
    names = tuple(dict.fromkeys(train.domains))
    if len(names) < 3:
        raise PlanError(
            f"{len(names)} domains do not show how domains differ: record at least 3 to forecast one that is unseen"
        )
    parts = []
    for name in names:
        alone = train.of_domain(name)
        parts.append(_tallies(measure(train.without_domain(name) if fitted else alone, alone)))
    counts = [len(uses) for _, uses in parts]
    domains = [[name] * count for name, count in zip(names, counts, strict=True)]
    return _predict(parts, domains, round(float(np.median(counts))) if requests is None else requests, confidence)


def _stretches(train: Workload) -> list[NDArray[np.int64]]:
    """Requests by their place in their domain, in parts of equal size: each holds its part of every domain."""
    totals, seen, places = Counter(train.domains), Counter[str](), []
    for name in train.domains:
        places.append((seen[name] + 0.5) / totals[name])
        seen[name] += 1
    order = np.argsort(np.array(places), kind="stable")
    return [np.sort(part) for part in np.array_split(order, min(_STRETCHES, train.num_requests))]


def _predict(parts: list[_Tallies], domains: list[list[str]], requests: int, confidence: float) -> Forecast:
    """The random-effects prediction interval of one more part, of so many requests."""
    counts = np.array([len(uses) for _, uses in parts])
    logits = np.stack([_logit(_rate(*part), part[1].sum()) for part in parts])  # shape: (parts, sizes)
    within = _request_variance(parts, domains)
    noise = within / counts[:, None]
    between = np.maximum(logits.var(axis=0, ddof=1) - noise.mean(axis=0), 0.0)
    weights = 1.0 / np.maximum(between + noise, np.finfo(np.float64).tiny)
    weights /= weights.max(axis=0)
    centre = (weights * logits).sum(axis=0) / weights.sum(axis=0)
    of_mean = ((weights / weights.sum(axis=0)) ** 2 * (between + noise)).sum(axis=0)
    reach = _reach(confidence, len(parts) - 2) * np.sqrt(between + within / requests + of_mean)
    rate, lower, upper = (1.0 / (1.0 + np.exp(-one)) for one in (centre, centre - reach, centre + reach))
    return Forecast(rate, lower, upper, confidence, requests)


def _request_variance(parts: list[_Tallies], domains: list[list[str]]) -> FloatArray:
    """(sizes,) variance of the log odds that one request gives, within its domain, pooled over domains."""
    hits, uses = np.concatenate([one for one, _ in parts]), np.concatenate([one for _, one in parts])
    names = np.array([name for part in domains for name in part])
    squares, freedom = np.zeros(hits.shape[1]), 0
    for name in dict.fromkeys(names.tolist()):
        mine = names == name
        total, rate = uses[mine].sum(), _rate(hits[mine], uses[mine])
        slope = np.clip(rate, 0.5 / total, 1.0 - 0.5 / total)
        error = (hits[mine] - rate * uses[mine, None]) / uses[mine].mean() / (slope * (1.0 - slope))
        squares += (error**2).sum(axis=0)
        freedom += int(mine.sum()) - 1
    return squares / max(freedom, 1)


def _logit(rate: FloatArray, uses: float) -> FloatArray:
    """Log odds; never sure of 0 or 1."""
    kept = np.clip(rate, 0.5 / uses, 1.0 - 0.5 / uses)
    return np.asarray(np.log(kept / (1.0 - kept)), np.float64)


def _reach(confidence: float, freedom: int) -> float:
    """Standard deviations that hold so much of any distribution with one peak; more where few parts show its spread."""
    from scipy.stats import norm, t

    outside = 1.0 - confidence
    peaked = np.sqrt(4.0 / (9.0 * outside)) if outside <= 1.0 / 6.0 else np.sqrt(4.0 / (3.0 * outside + 1.0))
    few = t.ppf(1.0 - outside / 2.0, freedom) / norm.ppf(1.0 - outside / 2.0)
    return float(peaked * few)


def _tallies(measured: Curve | Outcome) -> _Tallies:
    """Hits (requests, sizes) and uses (requests,) over all layers."""
    hits = np.asarray(measured.hits.sum(axis=1), np.float64)
    return hits.reshape(len(hits), -1), measured.uses.sum(axis=1).astype(np.float64)


def _rate(hits: FloatArray, uses: FloatArray) -> FloatArray:
    return ratio(hits.sum(axis=0), uses.sum())


def _check(confidence: float, requests: int | None) -> None:
    if not 0.0 < confidence < 1.0:
        raise PlanError(f"confidence is {confidence}: it lies between 0 and 1, usually 0.95")
    if requests is not None and requests < 1:
        raise PlanError(f"{requests} requests are none to forecast: ask for at least 1")
