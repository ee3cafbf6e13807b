"""Hit rates of text that is yet to come, forecast from the requests for fitting and held against those for judging."""

from __future__ import annotations

from dataclasses import dataclass

from moescope.errors import PlanError
from planner.cache.setting import Setting
from planner.simulate.curves import curve, popularity
from planner.simulate.forecast import Forecast, Measure, forecast_domain, forecast_later, measure_of
from planner.simulate.workload import Workload

POLICIES = {"lru": "LRU caches", "static": "the most used experts"}


@dataclass(frozen=True)
class OutlookFigures:
    """A forecast for one policy, with as many slots in every layer.

    Attributes:
        policy: in words.
        text: what is forecast: later requests of the same domains, or a domain that is not recorded.
        rate: hit rate that is expected; low, high: 95 % prediction interval.
        came: hit rate of the requests for judging; None where nothing can be held against the forecast.
    """

    policy: str
    text: str
    rate: float
    low: float
    high: float
    came: float | None


def outlook(setting: Setting, *, slots: int) -> list[OutlookFigures]:
    """Forecasts by policy: none of an unseen domain with fewer than three, none at all with too few requests.

    Args:
        setting: model, machine and requests; single tokens count.
        slots: experts that the device holds over all layers.
    """
    train, test = setting.apart or (setting.train, setting.test)
    at = max(slots // test.num_layers, 1) - 1
    rows = []
    for name, words in POLICIES.items():
        measure, fitted = measure_of(name), name == "static"
        found = popularity(train, test) if fitted else curve(test, policy="lru")
        came = float(found.rates()[at])
        for text, forecast, true in (
            ("later requests", _later, came), ("an unseen domain", _unseen, None)
        ):  # fmt: skip
            try:
                told = forecast(train, measure, fitted, test.num_requests)
            except PlanError:  # too few requests, or domains, to know how they differ
                continue
            rows.append(_row(words, text, told.rate[at], told.lower[at], told.upper[at], true))
    return [row for row in rows if row.rate == row.rate]  # no size below what a step needs


def _later(train: Workload, measure: Measure, fitted: bool, requests: int) -> Forecast:
    return forecast_later(train, measure, fitted=fitted, requests=requests)


def _unseen(train: Workload, measure: Measure, fitted: bool, requests: int) -> Forecast:
    return forecast_domain(train, measure, fitted=fitted)


def _row(policy: str, text: str, rate: float, low: float, high: float, came: float | None) -> OutlookFigures:
    return OutlookFigures(policy, text, float(rate), float(max(low, 0.0)), float(min(high, 1.0)), came)
