"""A running watch: what the observer sees goes to the recorders, and from there into the shards of a run."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import polars as pl
from torch import Tensor, nn

import store as run_store
from moescope.errors import CaptureError, MoescopeError
from profiler.capture.axes import axis_value, is_single, require_axis
from profiler.capture.backward import require_gradients
from profiler.capture.discovery import inspect_model
from profiler.capture.engine import engine_rows
from profiler.capture.inputs import end_tokens, modality_tokens
from profiler.capture.levels import RecordingOptions
from profiler.capture.memory import MemoryWatch, grows_by_itself
from profiler.capture.observer import Observer
from profiler.capture.precision import precision_checks, precision_of
from profiler.capture.provenance import describe_run
from profiler.capture.recording import Recording
from profiler.capture.score_checks import steering
from profiler.capture.sequences import Label, SequenceTracker
from profiler.capture.session_rules import (
    require_one_to_one,
    require_predictions,
    require_rows,
    require_same,
    require_weights,
)
from profiler.capture.stacks import DECODER
from profiler.inspect.memory import FLUSH_BYTES, extra_memory
from profiler.recorders.gradients import GradientRecorder
from profiler.recorders.predictions import PredictionRecorder

WRITING_SHARE = 0.1
"""Largest part of the time that shards may take: the vectors of a large model are hundreds of megabytes each time."""

LOSS_SHARE = 0.01
"""Largest part of the time spent that a kill may cost once it exceeds ``flush_seconds``: shards come ever more rarely,
so that weeks make hundreds of them, not tens of thousands."""

PROGRESS_SECONDS = 1.0
"""Readers of a live run learn so often how far it is."""


class WatchSession:
    """A running watch; made by :func:`watch`.

    Attributes:
        path: the finished run's file, once the context has been left.
        tokens: real tokens recorded so far in this session.
        tokens_before: real tokens that the interrupted run had, when it was resumed.
        planned_tokens: real tokens that are to come in all, 0 where nobody knows.
        memory: compares what recording takes with what was said before.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        directory: Path,
        options: RecordingOptions,
        tokenizer: Any = None,
        domain: str = "text",
        token_budget: int | None = None,
        flush_seconds: float = 15.0,
        resume: bool = False,
        model_name: str = "",
        revision: str = "",
        settings: Mapping[str, Any] | None = None,
        origin: str = "watch",
        stack: str | None = None,
    ) -> None:
        self.model: nn.Module = getattr(model, "_orig_mod", model)
        self.found = inspect_model(self.model, stack)
        levels = options.levels
        require_one_to_one(self.found.layers)
        require_rows(self.found.layers, levels)
        require_weights(self.found.layers, levels)
        if "gradients" in levels:
            require_gradients(self.found.layers)
        if "predictions" in levels:
            require_predictions(self.model, self.found.name, keeps_text=tokenizer is not None)
        self.name, self.resuming = name, resume
        self._options, self.memory = options, MemoryWatch(model_grows=grows_by_itself(self.model))
        self.path: Path | None = None
        self.tokens = self.tokens_before = 0
        self.planned_tokens = token_budget or 0
        self._directory, self._budget, self._flush_seconds = directory, token_budget, flush_seconds
        self._info = describe_run(
            self.model,
            self.found,
            name=model_name,
            revision=revision,
            origin=origin,
            levels=levels,
            settings={**(settings or {}), "recording": options.settings()},
            text_kept=tokenizer is not None,
        )
        precision = precision_of(self.model)
        if precision is not None:
            self._info.settings["weights"] = {"stored": precision.stored, "dequantized": precision.dequantized}
        if self.found.name != DECODER:
            self._info.settings["stack"] = self.found.name
        ends, pads = end_tokens(self.model)
        self._tracker = SequenceTracker(
            domain=domain, end_ids=ends, pad_ids=pads, modality_ids=modality_tokens(self.model)
        )
        self._recording = Recording(self.found.layers, options=options, tokenizer=tokenizer)
        self.checks = self._recording.checks
        self.checks.left_out = self.found.left_out
        self.checks.steered_by = {layer.key: steering(layer, self.model) for layer in self.found.layers}
        self._stated = precision_checks(self.model, self.found.layers, levels)
        self._observer = Observer(
            self.model, self.found, recording=self._recording, tracker=self._tracker, ended=self._forward_ended
        )
        self._seconds = self._seconds_before = 0.0
        self._pause = flush_seconds
        self._open_ended, self._tokens_written = False, 0
        self._writer: run_store.RunWriter | None = None

    @property
    def writer(self) -> run_store.RunWriter:
        """The run that is being written."""
        if self._writer is None:
            raise CaptureError(f"run {self.name!r} is not being watched: enter the context first")
        return self._writer

    @property
    def seconds(self) -> float:
        """Wall time of the forwards so far."""
        return self._seconds

    @property
    def budget_reached(self) -> bool:
        """Whether the token budget is used up; nothing more is recorded then."""
        return self._budget is not None and self.tokens >= self._budget

    def label(
        self,
        *,
        domains: Iterable[str] | str | None = None,
        sequences: Iterable[int] | None = None,
        sources: Iterable[str] | None = None,
        mask: Tensor | None = None,
        **axes: Any,
    ) -> None:
        """Say what the rows of the next batch are; it holds for the sequences that begin there.

        Args:
            domains: label of each row; a single one holds for all rows until another is given.
            sequences: number of each row's sequence in the run; by default they are counted on.
            sources: document of each row.
            mask: (batch, length) 2-D attention mask, where the model is called with another.
            axes: where each row lies on further axes, such as ``timestep=[0, 0, 250, 250]`` or ``patch_size=2``: a
                value per row, or a single one that holds for all rows until another is given; None ends it.

        Raises:
            InputError: a name that is no axis, or a value that is no text or number of at most 200 characters.
        """
        rows = {}
        for axis, given in axes.items():
            require_axis(axis)
            if given is None:
                self._tracker.axes.pop(axis, None)
            elif is_single(given):
                self._tracker.axes[axis] = axis_value(axis, given)
            else:
                rows[axis] = [axis_value(axis, value) for value in given]
        if isinstance(domains, str):
            self._tracker.domain = domains
            domains = None
        self._tracker.label(
            Label(
                domains=None if domains is None else [str(domain) for domain in domains],
                sequences=None if sequences is None else [int(sequence) for sequence in sequences],
                sources=None if sources is None else [str(source) for source in sources],
                mask=mask,
                axes=rows,
            )
        )

    # The life of a run

    def open(self) -> None:
        """Make the run's folder, or take up that of an interrupted run; entering the context does it too.

        Raises:
            StoreError: the name is taken, or there is nothing to resume.
            InputError: the interrupted run has another model, level or corpus.
        """
        if self._writer is not None:
            return
        if self.resuming:
            self._writer = run_store.RunWriter.resume(self._directory, self.name)
            require_same(self.name, self._writer.info, self._info)
            done = self._writer.sequences_done
            self._tracker.next_sequence = max(done, default=-1) + 1
            if done:
                self.tokens_before = int(run_store.open_run(self._writer.folder).table("sequence")["tokens"].sum())
        else:
            self._writer = run_store.RunWriter.create(self._directory, self.name, self._info)
        self._seconds = self._seconds_before = self._writer.info.seconds
        self._flushed = self._told = time.monotonic()

    @property
    def gradients(self) -> GradientRecorder | None:
        """The recorder of level ``gradients``; None at other levels."""
        return next((probe for probe in self._recording.probes if isinstance(probe, GradientRecorder)), None)

    @property
    def predictions(self) -> PredictionRecorder | None:
        """The recorder of level ``predictions``; None at other levels."""
        return self._recording.predictions

    def holding(self) -> AbstractContextManager[None]:
        """While entered, a forward that ends waits for its backward: both come into one shard, or neither counts."""
        return self._observer.holding()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """While entered, the model is watched, but the run goes on afterwards."""
        self.open()
        with self._observer.attached():
            yield

    def __enter__(self) -> WatchSession:
        self.open()
        self._attachment = self._observer.attached()
        try:
            self._attachment.__enter__()
        except BaseException:
            self._forget()
            raise
        self._write_progress("collecting")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._attachment.__exit__(None, None, None)
        if error is not None:
            self._interrupt(error)
            return
        if self.checks.forwards == 0 and not self.resuming:
            self._forget()
            raise CaptureError(
                f"run {self.name!r}: no forward of the watched model ended inside the context: call the model that was"
                " passed to watch(), not a copy of it"
            )
        self.flush(final=True)
        self._write_progress("compacting")
        self.path = self.writer.finish(seconds=self._seconds)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Forwards inside make one piece of work, such as an answer: it is in the run as a whole or not at all.

        No shard is written among them. An interrupt among them leaves what no shard holds yet to the resumed run.
        """
        self._open_ended = True
        yield
        self._open_ended = False
        self._flush_when_due()

    def end_batch(self) -> None:
        """A batch of a corpus has been fed: sums are the same then, whenever shards are written."""
        self._recording.end_batch()

    def flush(self, *, final: bool = False) -> None:
        """Write what was recorded since the last shard, and the verdicts of the checks so far.

        Args:
            final: nothing more comes.
        """
        began = time.monotonic()
        self._observer.whole = False
        self.writer.write_shard(self._drained(final))
        self._observer.whole = True
        self._tokens_written = self.tokens
        self._publish_checks()
        self.writer.info.seconds = self._seconds
        self.writer.write_info()
        self._flushed = time.monotonic()
        spent = self._flushed - began
        self._pause = max(self._flush_seconds, spent / WRITING_SHARE, self._seconds * LOSS_SHARE)
        self._write_progress("collecting")

    def _drained(self, final: bool) -> dict[str, pl.DataFrame]:
        """The tables of a shard: what was recorded since the last one."""
        frames = self._recording.drain()
        sequences, labels = self._tracker.drain()
        self.checks.empty_sequences += sum(row["tokens"] == 0 for row in sequences)
        if sequences:
            frames["sequence"] = [pl.DataFrame(sequences)]
        if labels:
            frames["sequence_label"] = [pl.DataFrame(labels)]
        self.checks.findings = self._tracker.findings
        self._add_checks(frames, final)
        return {table: pl.concat(parts, how="diagonal_relaxed") for table, parts in frames.items()}

    def _add_checks(self, frames: dict[str, list[pl.DataFrame]], final: bool) -> None:
        """Verdicts that belong into the shard itself: none, where they are about the whole of what has been seen."""

    def _publish_checks(self) -> None:
        """Verdicts about all that this process has seen; what a killed one found out before stays beside them."""
        if self.checks.forwards or not self.writer.has_checks:
            self.writer.write_checks(self._check_table())

    def _check_table(self) -> pl.DataFrame:
        levels = self._info.levels.split(",")
        proofs = [row for probe in self._recording.probes for row in probe.checks()]
        proofs += [*engine_rows(self.model, self.found.layers, levels), *self.memory.rows()]
        return self.checks.table(self._stated + proofs)

    def state(self, state: Any = "collecting", detail: str = "") -> run_store.Progress:
        """How far the collection is."""
        spent, done = self._seconds - self._seconds_before, self.tokens_before + self.tokens
        speed = self.tokens / spent if spent else 0.0
        known = bool(self.planned_tokens and speed and state == "collecting")
        left = max(0, self.planned_tokens - done) / speed if known else None
        return run_store.Progress(
            tokens=done,
            token_budget=self.planned_tokens,
            tokens_per_second=speed,
            seconds_left=left,
            state=state,
            detail=detail,
        )

    def expect_memory(self, *, batch: int, tokens: int, domains: int = 1, phases: int = 1) -> int:
        """Say how many bytes recording takes at most beside the bare forward; a check holds the collection to it.

        Args:
            batch: tokens of one batch, padding included.
            tokens: tokens of the whole collection.
            domains: labels of the text.
            phases: 2 where decoding is recorded as well.
        """
        expected = extra_memory(self.found, self._options, batch=batch, tokens=tokens, domains=domains, phases=phases)
        self.memory.stated = expected.total
        self.add_setting("extra_memory_bytes", expected.total)
        return expected.total

    def add_setting(self, name: str, value: Any) -> None:
        """Keep one more setting in the run."""
        self._info.settings[name] = value
        if self._writer is not None:
            self._writer.info.settings[name] = value
            self._writer.write_info()

    def _forward_ended(self, tokens: int, seconds: float) -> None:
        self.tokens += tokens
        self._seconds += seconds
        self._observer.active = not self.budget_reached
        self._flush_when_due()

    def _flush_when_due(self) -> None:
        now = time.monotonic()
        if self._writer is None:
            return
        due = now - self._flushed >= self._pause or self._recording.bytes_held > FLUSH_BYTES
        if due and not self._open_ended:
            self.flush()
        elif now - self._told >= PROGRESS_SECONDS:
            self._write_progress("collecting")

    def _interrupt(self, error: BaseException) -> None:
        """Keep the shards, so that the run can be resumed; never hide the error that is under way."""
        try:
            if self._observer.whole and not self._open_ended:
                self.flush(final=True)
            else:
                self.tokens = self._tokens_written
            # Else the interrupt came between two recorders: what no shard holds yet is left to the resumed run.
            self.writer.info.seconds = self._seconds
            self.writer.write_info()
            self._write_progress("interrupted", f"{type(error).__name__}: {error}".splitlines()[0][:200].rstrip(": "))
        except MoescopeError as second:
            error.add_note(f"moescope could not write the last shard either: {second}")
        finally:
            self.writer.close()

    def _write_progress(self, state: Any, detail: str = "") -> None:
        self.writer.write_progress(self.state(state, detail))
        self._told = time.monotonic()

    def _forget(self) -> None:
        """Leave no folder of a run that recorded nothing: it would only keep the name."""
        self.writer.close()
        if not self.resuming:
            shutil.rmtree(self.writer.folder, ignore_errors=True)
