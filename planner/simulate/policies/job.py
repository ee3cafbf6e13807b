"""What a policy is asked to do, and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from planner.simulate.workload import Workload


@dataclass(frozen=True)
class Job:
    """One workload through one cache.

    Attributes:
        workload: what is replayed.
        capacity: (layers,) slots of each layer's cache; of a shared one, [0] = all of its slots.
        shared: one cache for all layers.
        train: what a fitted policy learns from.
        warm: the cache goes on from one request to the next; False: every request finds it empty.
        seed: of what a policy draws.
        stretch: passes whose hits are noted one by one.
    """

    workload: Workload
    capacity: NDArray[np.int64]
    shared: bool
    train: Workload | None
    warm: bool
    seed: int
    stretch: range

    @property
    def slots(self) -> int:
        """Over all layers."""
        return int(self.capacity[0] if self.shared else self.capacity.sum())

    def ids(self) -> NDArray[np.int16]:
        """(layers, passes, width) as compiled code takes it."""
        return plain(self.workload.ids, np.int16)

    def starts(self) -> NDArray[np.bool_]:
        """(passes,) a request begins."""
        starts = np.zeros(self.workload.num_passes, np.bool_)
        starts[self.workload.offsets[:-1]] = True
        return starts

    def missing(self) -> NDArray[np.uint16]:
        """(layers, passes) zeros, to be filled in."""
        return np.zeros((self.workload.num_layers, self.workload.num_passes), np.uint16)

    def there(self) -> NDArray[np.bool_]:
        """(layers, passes of the stretch, width) to be filled in."""
        return np.zeros((self.workload.num_layers, len(self.stretch), self.workload.ids.shape[2]), np.bool_)


@dataclass(frozen=True)
class Served:
    """What happened.

    Attributes:
        missing: (layers, passes) experts that were not on the device.
        there: (layers, passes of the stretch, width) which of the needed were; False where there is none.
        slots: experts that the device holds at a time.
        capacity: slots by which a step overflows: of each layer, of a shared cache [0].
        narrow, skipped: of ``missing``; None without a second version.
    """

    missing: NDArray[np.uint16]
    there: NDArray[np.bool_]
    slots: int
    capacity: NDArray[np.int64]
    narrow: NDArray[np.uint16] | None = None
    skipped: NDArray[np.uint16] | None = None


def plain(array: NDArray[Any], kind: DTypeLike) -> NDArray[Any]:
    """Contiguous, of one type, and writable, so that compiled code is compiled once."""
    return np.require(array, kind, ["C", "W"])
