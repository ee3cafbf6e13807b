"""What no way to serve can beat, whatever it caches, foresees, loads or leaves to the CPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from planner.cache.setting import Setting
from planner.simulate.bounds import bounds
from planner.simulate.workload import Workload
from profiler.metrics._arrays import FloatArray


@dataclass(frozen=True)
class Bound:
    """The least time per token, for every number of slots.

    Three things take their time: what is dense, one layer after another, during which the CPU has nothing to run (no
    router has answered); experts, on the device or on the CPU; and copies, which may run all the time. So with U uses,
    of which m miss even under the offline optimum with one cache for all layers (``min_bypass``), less one per slot
    since a cache may be filled before the first pass, e and c seconds of an expert on the device and on the CPU and tau
    of a copy, the time T of all passes is at least::

        dense + U / (1 / e + 1 / c)                            all experts run somewhere
        (m + dense / c) / (1 / tau + 1 / c)                    each miss is copied, T / tau at most, or run by the CPU

    with e, c and tau of the smallest expert of the fastest layer. Ours.

    Attributes:
        misses: (sizes + 1,) m by number of slots, of caches filled beforehand.
        uses: U.
        dense: seconds of all passes.
        run: e.
        cpu: c; infinite where the CPU runs none, as where it shares its memory with the device.
        copy: tau.
        tokens: of all passes.
    """

    misses: FloatArray
    uses: int
    dense: float
    run: float
    cpu: float
    copy: float
    tokens: int

    @staticmethod
    def of(setting: Setting, known: Bound | None = None) -> Bound:
        """From the requests for judging; ``known`` of the same requests on another machine or in other widths."""
        work, costs = setting.test, setting.test_costs
        uses, ran = int(work.needed.sum()), work.needed > 0
        smallest = np.where(work.counts() > 0, costs.size, np.inf).min(axis=1, keepdims=True)
        if setting.has_mixed_sizes:
            costs = setting.with_sizes(replace(setting.sizes, bytes=np.minimum(costs.size, smallest))).test_costs
        alone = costs.cpu is None or setting.machine.shares_memory
        return Bound(
            misses=_least_misses(work) if known is None else known.misses,
            uses=uses,
            dense=float(costs.dense.sum() + costs.tail.sum()),
            run=float(np.broadcast_to(costs.expert, ran.shape)[ran].min()),
            cpu=float("inf") if alone else float(np.broadcast_to(costs.cpu, ran.shape)[ran].min()),  # type: ignore[arg-type]
            copy=setting.machine.link.seconds(float(smallest.min())),
            tokens=max(int(work.pass_tokens.sum()), 1),
        )

    def ms(self, slots: int) -> float:
        """Milliseconds per token with so many slots."""
        least = float(self.misses[min(slots, len(self.misses) - 1)])
        fast = min(self.run, self.cpu) <= 0
        all_run = self.dense + (0.0 if fast else self.uses / (1 / self.run + 1 / self.cpu))
        if min(self.copy, self.cpu) <= 0:
            return 1e3 * all_run / self.tokens
        all_come = (least + self.dense / self.cpu) / (1 / self.copy + 1 / self.cpu)
        return 1e3 * max(all_run, all_come) / self.tokens


def _least_misses(work: Workload) -> FloatArray:
    """(sizes + 1,) uses that find nothing even under the offline optimum, from 0 slots on; the slots begin full."""
    hits = bounds(work, names=["min_bypass"], shared=True)["min_bypass"].hits[:, 0].sum(axis=0)
    cold = int(work.needed.sum()) - np.concatenate([[0.0], hits])
    misses: FloatArray = np.maximum(cold - np.arange(len(cold)), 0.0)
    return misses
