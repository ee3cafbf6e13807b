"""A stand-in for a Ray: every piece of work goes through a pickle, as to another process."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any


class Sent:
    """What planners use of :class:`moescope.cluster.Cluster`."""

    workers = 3

    def __init__(self) -> None:
        self.pieces = 0

    def in_order(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        """The results, in the order of the items."""
        self.pieces += len(items)
        for item in items:
            there, work = pickle.loads(pickle.dumps((function, item)))
            yield pickle.loads(pickle.dumps(there(work)))
