"""Seconds to give 48 layers x 128 experts one of 4 widths, by the exact search, by HiGHS, and by the convex hull.

    python -m benchmarks.bit_allocation [--rounds N]

Every round draws another model: energies of experts and layers are log-normal, errors near the typical ones of widths
2, 3, 4 and 8 in groups of 128. Each solver gets the same problem, at three budgets. Baseline, in the same process:
HiGHS. The ratios' spread comes from resampling the rounds. Bounds: the exact search in 1 s, at HiGHS's optimum; the
hull in 0.1 s.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from compressor.plan import BITS, Bits, stored_bits
from planner.quantize.errors import TYPICAL
from planner.quantize.knapsack import Choice, hull, solve, solve_milp

LAYERS, EXPERTS = 48, 128
WEIGHTS = 3 * 768 * 2048
WIDTHS: tuple[Bits, ...] = (2, 3, 4, 8)
BUDGETS = (2.5, 3.0, 4.0)


def model(seed: int, weights: int = WEIGHTS) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """(units, widths) costs and sizes of a model whose experts are of unequal importance."""
    rng = np.random.default_rng(seed)
    energy = rng.lognormal(0, 1.5, (LAYERS, EXPERTS)) * rng.lognormal(0, 1, (LAYERS, 1))
    typical = np.array([TYPICAL[BITS.index(one)] for one in WIDTHS])
    costs = energy.reshape(-1, 1) * typical * rng.lognormal(0, 0.2, (LAYERS * EXPERTS, len(WIDTHS)))
    sizes = [round(weights * stored_bits(one, inputs=2048)) for one in WIDTHS]
    return -np.sort(-costs, axis=1), np.tile(sizes, (LAYERS * EXPERTS, 1))


def timed(work: Callable[[], Choice]) -> tuple[float, Choice]:
    """Seconds, and what was found."""
    began = time.perf_counter()
    choice = work()
    return time.perf_counter() - began, choice


def main() -> None:
    """Print a row per budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    costs, sizes = model(0)
    for function in (solve, solve_milp):  # imports and first calls
        function(costs=costs[:256], sizes=sizes[:256], capacity=int(3 * 256 * WEIGHTS))
    rng = np.random.default_rng(0)
    print(
        f"{LAYERS} layers x {EXPERTS} experts x {len(WIDTHS)} widths, {options.rounds} models, median seconds (slowest)"
    )
    for bits in BUDGETS:
        seconds, gaps = [], []
        for seed in range(options.rounds):
            costs, sizes = model(seed)
            asked = {"costs": costs, "sizes": sizes}
            room = int(bits * len(costs) * WEIGHTS)
            found = [
                timed(lambda: solve(**asked, capacity=room)),  # type: ignore[arg-type]  # noqa: B023
                timed(lambda: solve_milp(**asked, capacity=room)),  # type: ignore[arg-type]  # noqa: B023
                timed(lambda: hull(**asked).at(room)),  # type: ignore[arg-type]  # noqa: B023
            ]
            seconds.append([one for one, _ in found])
            gaps.append([choice.cost / found[1][1].cost - 1 for _, choice in found])
        times, off = np.array(seconds), np.array(gaps)
        print(f"\n{bits} effective bits")
        for column, name in enumerate(("exact search", "HiGHS", "hull")):
            ratio = times[:, 1] / times[:, column]
            draws = np.median(ratio[rng.integers(0, len(ratio), (2000, len(ratio)))], axis=1)
            low, high = np.quantile(draws, [0.025, 0.975])
            print(
                f"{name:14} {np.median(times[:, column]):7.3f} s ({times[:, column].max():.3f})"
                f"   {np.median(ratio):6.1f} times as fast ({low:.1f} to {high:.1f})"
                f"   cost over HiGHS's {np.median(off[:, column]):+.1e} (most {off[:, column].max():+.1e})",
                flush=True,
            )
    print(f"\nload {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
