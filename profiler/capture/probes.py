"""What levels beyond routing and activations are made of: recorders that put their own hooks on the model."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Protocol

import polars as pl

from profiler.capture.batch import BlockBatch
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
    """Whether :meth:`saw_experts` is to be called; it costs what level activations costs before any sum is made."""

    def attach(self, observer: Observer, hooks: Hooks, stack: ExitStack) -> None:
        """Put hooks on, through ``hooks``, and enter what else is needed on ``stack``; both end with the watching.

        ``observer.frame`` is the forward that is running (None: do nothing), ``observer.found`` the model's layers.
        """

    def saw_experts(self, layer: MoELayer, call: ExpertsCall, rows: TappedRows, block: BlockBatch) -> None:
        """The routed experts of a layer have run."""

    def commit(self) -> None:
        """The forward has ended well."""

    def discard(self) -> None:
        """The forward has failed."""

    def drain(self) -> dict[str, pl.DataFrame]:
        """The sums since the last drain, by table; they start again from nothing."""
