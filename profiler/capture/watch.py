"""``profiler.watch``: record what a model does, in any loop or server, and write it as a run."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import polars as pl
from torch import Tensor, nn

import store as run_store
from moescope.errors import CaptureError, InputError, ModelError, MoescopeError
from profiler.capture.discovery import MoELayer, inspect_model
from profiler.capture.inputs import end_tokens
from profiler.capture.levels import RecordingOptions, parse_levels
from profiler.capture.observer import Observer
from profiler.capture.provenance import describe_run
from profiler.capture.recording import Recording
from profiler.capture.sequences import Label, SequenceTracker

FLUSH_BYTES = 128 << 20
"""Trace held in memory before it is written, whatever the time."""

PROGRESS_SECONDS = 1.0
"""Readers of a live run learn so often how far it is."""


def watch(
    model: nn.Module,
    *,
    name: str,
    store: str | Path = "runs",
    level: str = "routing",
    tokenizer: Any = None,
    domain: str = "text",
    token_budget: int | None = None,
    keep_text: bool = True,
    vectors_per_domain: bool = False,
    router_scores: int = 0,
    flush_seconds: float = 15.0,
    resume: bool = False,
    model_name: str = "",
    revision: str = "",
    settings: Mapping[str, Any] | None = None,
) -> WatchSession:
    """Record what a model's MoE layers do while the context is entered, in any loop or server.

    ::

        with profiler.watch(model, store="runs", name="mine", level="activations") as session:
            for batch in batches:
                model(**batch)

    ``model(**batch)`` and ``model.generate(...)`` both work, with or without padding and cache. Real tokens are told by
    the 2-D attention mask; without mask, all are real. The model's outputs stay what they are, bit for bit. Several
    sequences packed into one row count as one sequence. Under gradient checkpointing the first pass alone is counted.
    Beam search exchanges rows unseen: statistics hold, but its sequences are mixtures of beams.

    Args:
        model: a model of transformers 5 with fused experts, or anything that contains one.
        name: name of the run; the file becomes ``store/name.duckdb``.
        store: directory of runs, made if it is not there.
        level: comma list of levels, see :data:`profiler.capture.levels.LEVELS`.
        tokenizer: with it the run keeps the text; without it neither text nor token ids.
        domain: label of the tokens, where :meth:`WatchSession.label` does not say otherwise.
        token_budget: stop recording (not the model) after the forward that reaches so many real tokens.
        keep_text: False keeps no token ids even if there is a tokenizer.
        vectors_per_domain: keep vectors per neuron, channel and pair of experts apart by domain; else they are pooled.
        router_scores: keep so many of the largest router scores of every token.
        flush_seconds: write a shard at the end of the first forward after so many seconds.
        resume: go on with an interrupted run of that name.
        model_name: what the run calls the model; its folder or hub id if empty.
        revision: hub revision of the model, if known.
        settings: anything worth keeping about this collection; becomes JSON in table ``run``.

    Raises:
        ModelError: the model has no MoE layer, or one that cannot be watched.
        InputError: an unknown level, or (from the store) a name that is taken.
    """
    return WatchSession(
        model,
        name=name,
        directory=Path(store),
        options=RecordingOptions(parse_levels(level), vectors_per_domain, router_scores),
        tokenizer=tokenizer if keep_text else None,
        domain=domain,
        token_budget=token_budget,
        flush_seconds=flush_seconds,
        resume=resume,
        model_name=model_name,
        revision=revision,
        settings=settings or {},
    )


class WatchSession:
    """A running watch; made by :func:`watch`.

    Attributes:
        path: the finished run's file, once the context has been left.
        tokens: real tokens recorded so far in this session.
        tokens_before: real tokens that the interrupted run had, when it was resumed.
        planned_tokens: real tokens that are to come in all, 0 where nobody knows.
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
    ) -> None:
        self.model: nn.Module = getattr(model, "_orig_mod", model)
        self.found = inspect_model(self.model)
        levels = options.levels
        if set(levels) & {"activations", "similarity", "gradients"}:
            _require_rows(self.found.layers)
        self.name, self.resuming = name, resume
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
            settings=settings or {},
            text_kept=tokenizer is not None,
        )
        ends, pads = end_tokens(self.model)
        self._tracker = SequenceTracker(domain=domain, end_ids=ends, pad_ids=pads)
        self._recording = Recording(self.found.layers, options=options, tokenizer=tokenizer)
        self.checks = self._recording.checks
        self._observer = Observer(
            self.model, self.found, recording=self._recording, tracker=self._tracker, ended=self._forward_ended
        )
        self._seconds = self._seconds_before = 0.0
        self._writer: run_store.RunWriter | None = None

    @property
    def writer(self) -> run_store.RunWriter:
        """The run that is being written."""
        if self._writer is None:
            raise CaptureError(f"run {self.name!r} is not being watched: enter the context first")
        return self._writer

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
    ) -> None:
        """Say what the rows of the next batch are; it holds for the sequences that begin there.

        Args:
            domains: label of each row; a single one holds for all rows until another is given.
            sequences: number of each row's sequence in the run; by default they are counted on.
            sources: document of each row.
            mask: (batch, length) 2-D attention mask, where the model is called with another.
        """
        if isinstance(domains, str):
            self._tracker.domain = domains
            domains = None
        self._tracker.label(
            Label(
                domains=None if domains is None else [str(domain) for domain in domains],
                sequences=None if sequences is None else [int(sequence) for sequence in sequences],
                sources=None if sources is None else [str(source) for source in sources],
                mask=mask,
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
            _require_same(self.name, self._writer.info, self._info)
            done = self._writer.sequences_done
            self._tracker.next_sequence = max(done, default=-1) + 1
            if done:
                self.tokens_before = int(run_store.open_run(self._writer.folder).table("sequence")["tokens"].sum())
        else:
            self._writer = run_store.RunWriter.create(self._directory, self.name, self._info)
        self._seconds = self._seconds_before = self._writer.info.seconds
        self._flushed = self._told = time.monotonic()

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

    def flush(self, *, final: bool = False) -> None:
        """Write what was recorded since the last shard; ``final`` adds the verdict of the checks."""
        self._observer.whole = False
        frames = self._recording.drain()
        sequences = self._tracker.drain()
        self.checks.empty_sequences += sum(row["tokens"] == 0 for row in sequences)
        if sequences:
            frames["sequence"] = [pl.DataFrame(sequences)]
        if final:
            self.checks.findings = self._tracker.findings
            frames["check"] = [self.checks.table()]
        self.writer.write_shard({table: pl.concat(parts, how="diagonal_relaxed") for table, parts in frames.items()})
        self._observer.whole = True
        self._flushed = time.monotonic()
        self._write_progress("collecting")

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
        now = time.monotonic()
        if now - self._flushed >= self._flush_seconds or self._recording.bytes_held > FLUSH_BYTES:
            self.flush()
        elif now - self._told >= PROGRESS_SECONDS:
            self._write_progress("collecting")

    def _interrupt(self, error: BaseException) -> None:
        """Keep the shards, so that the run can be resumed; never hide the error that is under way."""
        try:
            if self._observer.whole:
                self.flush(final=True)
            # Else the interrupt came between two recorders: what no shard holds yet is left to the resumed run.
            self.writer.info.seconds = self._seconds
            self.writer.write_info()
            self._write_progress("interrupted", f"{type(error).__name__}: {error}".splitlines()[0][:200].rstrip(": "))
        except MoescopeError as second:
            error.add_note(f"moescope could not write the last shard either: {second}")

    def _write_progress(self, state: Any, detail: str = "") -> None:
        self.writer.write_progress(self.state(state, detail))
        self._told = time.monotonic()

    def _forget(self) -> None:
        """Leave no folder of a run that recorded nothing: it would only keep the name."""
        if not self.resuming:
            shutil.rmtree(self.writer.folder, ignore_errors=True)


def _require_rows(layers: Sequence[MoELayer]) -> None:
    for layer in layers:
        if layer.layout is None:
            raise ModelError(
                f"{layer.name} ({type(layer.experts).__name__}) keeps its weights packed, so that its experts' outputs"
                " cannot be watched: use level routing, or load the model dequantized"
            )


def _require_same(name: str, before: run_store.RunInfo, now: run_store.RunInfo) -> None:
    """Refuse to mix what two collections saw in one run."""
    if before.model_fingerprint and before.model_fingerprint != now.model_fingerprint:
        raise InputError(f"run {name!r} was begun with another model ({before.model}): resume it with that one")
    if before.levels != now.levels:
        raise InputError(f"run {name!r} was begun with level {before.levels!r}: resume it with that level")
    corpora = [info.settings.get("corpus_sha256") for info in (before, now)]
    if all(corpora) and corpora[0] != corpora[1]:
        raise InputError(f"run {name!r} was begun with another corpus: resume it with the same data and options")
