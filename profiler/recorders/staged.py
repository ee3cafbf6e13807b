"""Recorders of activations hold the parts of a forward back until it has ended well."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from profiler.capture.batch import ExpertRows
    from profiler.capture.check_rows import CheckRow


class Staged:
    """Keeps what has been computed on the device, and takes it into the sums at the end of the forward.

    A forward that fails half-way leaves nothing behind, and what goes to the host goes there once per forward.
    """

    def __init__(self) -> None:
        self._waiting: list[Callable[[], None]] = []

    def later(self, take: Callable[[], None]) -> None:
        """Call ``take`` when the forward has ended well."""
        self._waiting.append(take)

    def saw_rows(self, batch: ExpertRows) -> None:
        """Rows inside the experts; most probes need none."""

    def end_batch(self) -> None:
        """A batch of a corpus has ended: the next one is other text."""

    def begin_part(self, of_model: bool) -> None:
        """A part of a corpus begins, whose shard depends on that part alone.

        Args:
            of_model: whether tables about the weights are written with it; they are with one part of each corpus.
        """

    def checks(self) -> list[CheckRow]:
        """What a probe proves about itself; most have nothing to say."""
        return []

    def commit(self) -> None:
        """The forward has ended well."""
        for take in self._waiting:
            take()
        self._waiting.clear()

    def discard(self) -> None:
        """The forward has failed."""
        self._waiting.clear()
