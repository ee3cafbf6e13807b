"""What levels beyond routing and activations are made of: recorders that put their own hooks on the model."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Protocol

import polars as pl

from profiler.capture.batch import BlockBatch, ExpertRows
from profiler.capture.check_rows import CheckRow
from profiler.capture.discovery import MoELayer
from profiler.capture.hooks import Hooks
from profiler.capture.tap import ExpertsCall, TappedRows

if TYPE_CHECKING:
    from profiler.capture.observer import Observer


class Probe(Protocol):
    """A recorder that sees the model at work.

    What it computes during a forward waits for :meth:`commit`; a forward that fails leaves nothing behind
    (:class:`profiler.recorders.staged.Staged` does both).
    """

    needs_rows: bool
    """Whether rows inside the experts are to be seen; it costs what level activations costs before any sum is made."""

    def attach(self, observer: Observer, hooks: Hooks, stack: ExitStack) -> None:
        """Put hooks on, through ``hooks``, and enter what else is needed on ``stack``; both end with the watching.

        ``observer.frame`` is the forward that is running (None: do nothing), ``observer.found`` the model's layers.
        """

    def saw_experts(
        self, layer: MoELayer, call: ExpertsCall, rows: TappedRows | None, block: BlockBatch | None
    ) -> None:
        """The routed experts of a layer have run; rows and block are None where no recorder asked for rows."""

    def saw_rows(self, batch: ExpertRows) -> None:
        """The real tokens' rows inside the experts of a layer, routed or shared; where a recorder asked for rows."""

    def commit(self) -> None:
        """The forward has ended well."""

    def discard(self) -> None:
        """The forward has failed."""

    def end_batch(self) -> None:
        """A batch of a corpus has ended: the next one is other text."""

    def begin_part(self, of_model: bool) -> None:
        """A part of a corpus begins, whose shard depends on it alone; ``of_model``: with tables about the weights."""

    def drain(self) -> dict[str, pl.DataFrame]:
        """The sums since the last drain, by table; they start again from nothing."""

    def checks(self) -> list[CheckRow]:
        """What the probe proves about itself, at the end of the session."""
