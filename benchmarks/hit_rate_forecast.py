"""Hit rates forecast for text that was not replayed: the later half of the requests, and each domain left out.

    python -m benchmarks.hit_rate_forecast
    python -m benchmarks.hit_rate_forecast --trace FILE.npz --label dataset

Without a trace: the bundled run. A trace holds ``experts`` (tokens, layers, k), ``offsets`` (sequences + 1,) and a
label of each sequence. Bounds: what happens falls inside the 95 % interval, and the upper end is at most 1.5 times the
lower one, at the median. "spread" is the largest over the smallest hit rate of the domains, each replayed alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import store
from planner.simulate.forecast import Forecast, Measure, forecast_domain, forecast_later, measure_of
from planner.simulate.outcome import Curve
from planner.simulate.workload import Workload, decode, workload_of
from sample_data import RUN

POLICIES = ("lru", "lfu", "static", "min_set", "min_bypass")
RATIOS = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
WIDTH = 1.5
Floats = NDArray[np.float64]


def read_trace(path: Path, label: str, num_experts: int) -> Workload:
    """Every sequence of an .npz file as a request, its domain from ``label``."""
    with np.load(path) as file:
        experts, offsets, names = file["experts"].astype(np.int16), file["offsets"].astype(np.int64), file[label]
    lengths = np.diff(offsets)
    tokens, layers, k = experts.shape
    selections = np.full((layers, len(lengths), int(lengths.max()), k), -1, np.int16)
    for one, (low, high) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        selections[:, one, : high - low] = experts[low:high].transpose(1, 0, 2)
    return decode(
        selections=selections, num_experts=num_experts or int(experts.max()) + 1, domains=[str(name) for name in names]
    )


def remembered(measure: Measure) -> Measure:
    """A measure that fits nothing, replayed once per workload: leaving domains out asks for the same ones again."""
    known: dict[bytes, Curve] = {}

    def ask(train: Workload, workload: Workload) -> Curve:
        key = workload.sequences.tobytes()
        if key not in known:
            known[key] = measure(train, workload)  # type: ignore[assignment]
        return known[key]

    return ask


class Score:
    """What forecasts held, and how wide they were."""

    def __init__(self, sizes: list[int]) -> None:
        self.at = np.array(sizes) - 1
        self.held: list[NDArray[np.bool_]] = []
        self.ends: list[Floats] = []
        self.misses: list[Floats] = []
        self.missed: list[str] = []

    def add(self, name: str, forecast: Forecast, rates: Floats) -> None:
        """One forecast against what happened."""
        held = forecast.holds(rates)[self.at]
        self.held.append(held)
        self.ends.append((forecast.upper / forecast.lower)[self.at])
        self.misses.append(((1 - forecast.lower) / (1 - forecast.upper))[self.at])
        for at, inside in zip(self.at, held, strict=True):
            if not inside:
                self.missed.append(
                    f"{name}, {at + 1} slots: {rates[at]:.3f}, not {forecast.lower[at]:.3f} to {forecast.upper[at]:.3f}"
                )

    def line(self) -> str:
        """Held, and the median width: upper over lower end, of hit and of miss rates."""
        held, ends = np.array(self.held), np.array(self.ends)
        by_size = " ".join(f"{one:5.2f}" for one in np.median(ends, axis=0))
        over = "" if np.median(ends) <= WIDTH else f"   OVER {WIDTH}"
        return (
            f"{held.sum():4d} of {held.size:4d} inside; upper / lower end: median {np.median(ends):.3f}{over}, by size"
            f" {by_size}; of misses {np.median(self.misses):.3f}"
        )


def report(workload: Workload, policies: list[str]) -> None:
    """Print both forecasts of every policy."""
    k = max(workload.top_k)
    sizes = sorted({min(round(ratio * k), workload.num_experts) for ratio in RATIOS})
    domains = list(dict.fromkeys(workload.domains))
    print(f"{workload.num_requests} requests, {len(domains)} domains, {workload.num_passes:,} tokens; slots {sizes}")
    first, second = workload.halves()
    totals = {"later half": Score(sizes), "unseen domain": Score(sizes)}
    for name in policies:
        began, fitted = time.perf_counter(), name == "static"
        measure = measure_of(name) if fitted else remembered(measure_of(name))
        cases: list[tuple[str, str, Workload, Workload, Callable[..., Forecast]]] = [
            ("later half", "later half", first, second, forecast_later)
        ]
        for domain in domains:
            others, alone = workload.without_domain(domain), workload.of_domain(domain)
            cases.append(("unseen domain", domain, others, alone, forecast_domain))
        scores = {kind: Score(sizes) for kind in totals}
        rates = []
        for kind, label, train, target, forecast in cases:
            found = forecast(train, measure, fitted=fitted, requests=target.num_requests)
            happened = measure(train, target)
            assert isinstance(happened, Curve)
            rates.append(happened.rates()[np.array(sizes) - 1])
            for score in (scores[kind], totals[kind]):
                score.add(f"{name}, {label}", found, happened.rates())
        spread = " ".join(f"{one:5.2f}" for one in np.max(rates[1:], axis=0) / np.min(rates[1:], axis=0))
        for kind, score in scores.items():
            print(f"{name:10} {kind:13} {score.line()}")
        print(f"{'':24} spread of domains, by size {spread}   ({time.perf_counter() - began:.1f} s)", flush=True)
    for kind, score in totals.items():
        print(f"{'all':10} {kind:13} {score.line()}")
        print("".join(f"    outside: {line}\n" for line in score.missed), end="")


def main() -> None:
    """Read the options and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="an .npz trace instead of the bundled run")
    parser.add_argument("--label", default="dataset", help="array of the trace that names each sequence's domain")
    parser.add_argument("--num-experts", type=int, default=0, help="of the trace; 0 = the largest id and one")
    parser.add_argument("--policies", default=",".join(POLICIES))
    options = parser.parse_args()
    if options.trace is None:
        with store.open_run(RUN) as run:
            workload = workload_of(run)
    else:
        workload = read_trace(options.trace, options.label, options.num_experts)
    report(workload, options.policies.split(","))


if __name__ == "__main__":
    main()
