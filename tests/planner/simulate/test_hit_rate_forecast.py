"""Intervals and forecasts of hit rates: by hand, by simulated requests whose truth is known, and on the bundled run."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import t

import store
from moescope.errors import PlanError
from planner.simulate.curves import curve, popularity
from planner.simulate.forecast import (
    Measure,
    _reach,
    forecast_domain,
    forecast_later,
    hit_rate_interval,
    measure_of,
)
from planner.simulate.outcome import Curve
from planner.simulate.workload import Workload, decode, workload_of
from sample_data import RUN

USES = 400


def requests(domains: list[str]) -> Workload:
    """A request of one token for each domain given."""
    ids = np.zeros((1, len(domains), 1, 1), np.int16)
    return decode(selections=ids, num_experts=2, domains=domains)


def told(rates: NDArray[np.float64]) -> Measure:
    """A measure that hits what it is told, (all requests,)."""

    def measure(_: Workload, workload: Workload) -> Curve:
        hits = np.round(rates[workload.sequences] * USES)[:, None, None]
        return Curve("told", np.full((workload.num_requests, 1), USES), hits)

    return measure


def logit(rate: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.log(rate / (1 - rate))


def test_reach_is_that_of_one_peak() -> None:
    assert _reach(0.95, 10**8) == pytest.approx(np.sqrt(4 / (9 * 0.05)), rel=1e-4)  # 2.98, the normal one is 1.96
    assert _reach(0.95, 4) == pytest.approx(2.981 * 2.776 / 1.960, rel=1e-3)
    below, above = _reach(1 - 1 / 6 - 1e-9, 10**8), _reach(1 - 1 / 6 + 1e-9, 10**8)
    assert below == pytest.approx(above, rel=1e-6) == pytest.approx(np.sqrt(8 / 3), rel=1e-4)  # both branches meet


def test_domain_interval_by_hand() -> None:
    # requests of a domain are all alike, so that only domains vary: mean and spread of four log odds
    rates = np.array([0.5, 0.6, 0.65, 0.8])
    work = requests([f"d{one}" for one in range(4) for _ in range(5)])
    found = forecast_domain(work, told(np.repeat(rates, 5)))
    values = logit(rates)
    reach = 2.98142 * t.ppf(0.975, 2) / 1.959964 * values.std(ddof=1) * np.sqrt(1 + 1 / 4)
    assert logit(found.rate)[0] == pytest.approx(values.mean(), abs=1e-9)
    assert logit(found.lower)[0] == pytest.approx(values.mean() - reach, abs=1e-4)
    assert logit(found.upper)[0] == pytest.approx(values.mean() + reach, abs=1e-4)
    assert found.requests == 5
    assert found.holds(0.62)[0] and not found.holds(0.01)[0]


def test_requests_of_the_unseen_domain_widen_it() -> None:
    generator = np.random.default_rng(0)
    work = requests([f"d{one}" for one in range(6) for _ in range(20)])
    measure = told(generator.uniform(0.3, 0.8, work.num_requests))
    few, many = (forecast_domain(work, measure, requests=count) for count in (1, 100))
    assert few.width()[0] > 2 * many.width()[0]
    assert few.width(misses=True)[0] == pytest.approx(float((few.upper - few.lower)[0] / (1 - few.rate[0])), rel=1e-12)


@pytest.mark.parametrize("skewed", [False, True])
def test_domains_drawn_alike_fall_inside(skewed: bool) -> None:
    held, widths = [], []
    for seed in range(300):
        generator = np.random.default_rng(seed)
        between = generator.exponential(0.3, 8) if skewed else generator.normal(0, 0.3, 8)
        rates = 1 / (1 + np.exp(-(np.repeat(between, 6) + generator.normal(0, 0.2, 48))))
        work = requests([f"d{one}" for one in range(8) for _ in range(6)])
        found = forecast_domain(work.requests(range(42)), told(rates), requests=6)
        held.append(bool(found.holds(rates[42:].mean())[0]))
        widths.append(float(found.width()[0]))
    assert np.mean(held) >= 0.95
    assert np.median(widths) < 6.5 * 0.3 * np.sqrt(2)  # about 2 x 2.98 x t / z standard deviations, at slope 1/4


@pytest.mark.parametrize("drift", [0.0, 0.4])
def test_later_requests_fall_inside_also_where_text_drifts(drift: float) -> None:
    held, widths = [], []
    for seed in range(300):
        generator = np.random.default_rng(seed)
        subjects = np.repeat(generator.normal(0, drift, 12), 8)  # every eight requests of one subject
        rates = 1 / (1 + np.exp(-(subjects + generator.normal(0, 0.3, 96))))
        work = requests(["a"] * 96)
        found = forecast_later(work.requests(range(48)), told(rates), requests=48)
        held.append(bool(found.holds(rates[48:].mean())[0]))
        widths.append(float(found.width()[0]))
    assert np.mean(held) >= 0.95
    assert np.median(widths) < (0.35 if drift == 0 else 1.5)


def test_fitted_measures_never_see_what_they_are_judged_on() -> None:
    work = requests(["a"] * 7 + ["b"] * 5 + ["c"] * 4)
    replayed: list[int] = []

    def measure(train: Workload, workload: Workload) -> Curve:
        assert not set(train.sequences) & set(workload.sequences)
        assert len(train.sequences) + len(workload.sequences) == 16
        replayed.extend(workload.sequences.tolist())
        return told(np.linspace(0.4, 0.6, 16))(train, workload)

    forecast_later(work, measure, fitted=True)
    assert sorted(replayed) == list(range(16))
    replayed.clear()
    forecast_domain(work, measure, fitted=True)
    assert sorted(replayed) == list(range(16))


def test_interval_over_requests() -> None:
    generator = np.random.default_rng(1)
    rates = np.concatenate([generator.normal(0.3, 0.02, 50), generator.normal(0.7, 0.02, 50)])
    work = requests(["a"] * 50 + ["b"] * 50)
    measured = told(rates)(work, work)
    plain, stratified = hit_rate_interval(measured), hit_rate_interval(measured, domains=work.domains)
    exact = np.round(rates * USES) / USES
    assert plain.rate[0] == pytest.approx(exact.mean(), abs=1e-12) == stratified.rate[0]
    assert plain.upper[0] - plain.lower[0] == pytest.approx(2 * 1.96 * exact.std() / 10, rel=0.12)
    inside = np.sqrt((exact[:50].var() + exact[50:].var()) / 2)
    assert stratified.upper[0] - stratified.lower[0] == pytest.approx(2 * 1.96 * inside / 10, rel=0.12)
    again = hit_rate_interval(measured)
    assert again.lower == plain.lower and hit_rate_interval(measured, seed=1).lower != plain.lower


def test_measures_are_the_curves() -> None:
    work = decode(selections=np.array([[[[0, 1], [1, 2]], [[2, 3], [0, 1]]]]), num_experts=4, domains=["a", "b"])
    first, second = work.requests([0]), work.requests([1])
    np.testing.assert_array_equal(measure_of("lru")(first, second).hits, curve(second, policy="lru").hits)
    np.testing.assert_array_equal(measure_of("static")(first, second).hits, popularity(first, second).hits)
    assert measure_of("min_bypass", shared=True)(first, second).hits.shape == (1, 1, 4)


def test_forecasts_of_the_bundled_run_hold() -> None:
    with store.open_run(RUN) as run:
        work = workload_of(run)
    first, second = work.halves()
    sizes = np.array([2, 4, 6, 8]) - 1
    for name in ("lru", "lfu", "static"):
        measure = measure_of(name)
        found = forecast_later(first, measure, fitted=name == "static", requests=second.num_requests)
        assert found.holds(measure(first, second).rates())[sizes].all(), name  # type: ignore[union-attr]
        assert np.median(found.upper[sizes] / found.lower[sizes]) < 1.3
    measure = measure_of("lru")
    for name in ("french", "python"):
        found = forecast_domain(work.without_domain(name), measure, requests=work.of_domain(name).num_requests)
        assert found.holds(measure(work, work.of_domain(name)).rates())[sizes].all(), name  # type: ignore[union-attr]
    assert np.isnan(found.rate[0])  # one slot cannot hold a step of two experts


def test_forecast_refusals() -> None:
    work = requests(["a", "a", "b"])
    measure = told(np.full(3, 0.5))
    with pytest.raises(PlanError, match="2 domains do not show how domains differ: record at least 3"):
        forecast_domain(work, measure)
    with pytest.raises(PlanError, match="2 requests cannot foretell others: record at least 3"):
        forecast_later(work.requests([0, 1]), measure)
    with pytest.raises(PlanError, match="0 requests are none to forecast: ask for at least 1"):
        forecast_later(work, measure, requests=0)
    with pytest.raises(PlanError, match="confidence is 95"):
        forecast_later(work, measure, confidence=95)
    with pytest.raises(PlanError, match="'arc' has no curve to forecast: use lru, lfu, static or min_set"):
        measure_of("arc")
    with pytest.raises(PlanError, match="2 domains are given for 3 requests"):
        hit_rate_interval(measure(work, work), domains=("a", "b"))
    with pytest.raises(PlanError, match="num_resamples is 1: an interval takes at least 2"):
        hit_rate_interval(measure(work, work), num_resamples=1)


def test_domains_of_one_request_each_are_drawn_as_one() -> None:
    """Drawn alone, each would come back the same, and the interval would have no width."""
    hits = np.array([10, 90, 50, 30, 70])[:, None, None]
    measured = Curve("told", np.full((5, 1), 100), hits.astype(np.float64))
    apart = hit_rate_interval(measured, domains=("a", "b", "c", "d", "e"))
    alike = hit_rate_interval(measured)
    assert apart.lower == alike.lower < 0.4 and apart.upper == alike.upper > 0.6
