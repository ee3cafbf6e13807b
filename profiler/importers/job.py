"""The import: a reader's blocks, checked and added up, become a run like any other; or nothing is left behind."""

from __future__ import annotations

import shutil
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl

import store
from moescope.errors import ImportFileError, MoescopeError
from moescope.sizes import size
from profiler.headline import compute_and_store
from profiler.importers.blocks import Arranged, arrange, arrange_counts, joined, require_alike
from profiler.importers.model_config import model_shape
from profiler.importers.recording import CountBlock, ImportOptions, Recording, TraceBlock, block_tokens
from profiler.importers.registry import format_named
from profiler.importers.sequences import SequenceBook
from profiler.importers.statistics import CountStatistics, TraceStatistics
from store.writer import require_free

_DAMAGE = (
    OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, RuntimeError, ArithmeticError,
    zipfile.BadZipFile, zlib.error, pl.exceptions.PolarsError,
)  # fmt: skip
"""What libraries raise on files that are not what they should be."""

SELECTION_BYTES = 3
"""Bytes on disk per selection with its weight, while a trace is imported: half of it in shards, half in the run."""

ProgressCallback = Callable[[store.Progress], None]


def import_run(
    format_name: str,
    path: str | Path,
    *,
    directory: str | Path,
    name: str,
    options: ImportOptions | None = None,
    progress: ProgressCallback | None = None,
    metrics: bool = True,
) -> Path:
    """Turn another engine's file into a run; returns the run file.

    Args:
        format_name: one of :data:`profiler.importers.registry.FORMATS`.
        path: file, or folder where the format says so.
        directory, name: store and name of the run.
        progress: told after every block how far the import is.
        metrics: compute the headline metrics at the end.

    Raises:
        ImportFileError: the file is damaged, of another layout, or does not fit the model; nothing is left behind.
        StoreError: the name is taken or cannot be one.
        RunError: the run cannot be written.
    """
    given, options = Path(path), options or ImportOptions()
    chosen = format_named(format_name)
    if not given.exists():
        raise ImportFileError(f"{given}: there is no such file; {chosen.name} takes {chosen.path}")
    if not (given.is_file() or given.is_dir()):
        raise ImportFileError(f"{given} is neither a file nor a folder; {chosen.name} takes {chosen.path}")
    require_free(Path(directory), name)
    job = _Import(chosen.name, Path(directory), name, options, progress)
    with _readable(given, chosen.name):
        job.open(chosen.read(given, options), given)
    try:
        with _readable(given, chosen.name):
            for block in job.recording.blocks:
                job.add(block)
            job.flush()
        target = job.finish()
    except BaseException:
        job.discard()
        raise
    if metrics:
        compute_and_store(target, tell=job.tell)
    return target


@contextmanager
def _readable(path: Path, format_name: str) -> Iterator[None]:
    """Errors of a damaged file, from whatever library reads it, as one line."""
    try:
        yield
    except (MoescopeError, ModuleNotFoundError):
        raise
    except MemoryError as error:
        raise ImportFileError(f"{path}: reading it as {format_name} takes more memory than there is") from error
    except _DAMAGE as error:
        text = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise ImportFileError(f"{path} cannot be read as {format_name}: {text}") from error


def _require_disk(recording: Recording, directory: Path) -> None:
    """Refuse what the disk has no room for, where the file says how long it is: shards, and then the run beside them.

    Raises:
        ImportFileError: the disk is too full.
    """
    selections = recording.total_tokens * sum(layer.top_k for layer in recording.layers)
    existing = next(one for one in (directory.absolute(), *directory.absolute().parents) if one.exists())
    free = shutil.disk_usage(existing).free
    if selections * SELECTION_BYTES > free:
        raise ImportFileError(
            f"{directory} has {size(free)} free; {recording.total_tokens:,} tokens of {len(recording.layers)} layers"
            f" take about {size(selections * SELECTION_BYTES)} on the way in: make room, or give another --store"
        )


class _Import:
    """One import under way. No folder is made before the first block has passed."""

    def __init__(
        self, format_name: str, directory: Path, name: str, options: ImportOptions, progress: ProgressCallback | None
    ) -> None:
        self.format, self.directory, self.name, self.options = format_name, directory, name, options
        self.progress = progress
        self.writer: store.RunWriter | None = None
        self.trace: TraceStatistics | None = None
        self.counts: CountStatistics | None = None
        self.notes: dict[str, tuple[str, str]] = {}
        self.pending: list[Arranged] = []
        self.first: Arranged | None = None
        self.started = time.perf_counter()

    def open(self, recording: Recording, path: Path) -> None:
        """Take over what a reader opened."""
        if not recording.layers:
            raise ImportFileError(f"{path}: there is no MoE layer in it")
        _require_disk(recording, self.directory)
        self.recording, self.path = recording, path
        self.book = SequenceBook(recording.labels, self.options.domain)

    def add(self, block: TraceBlock | CountBlock) -> None:
        """Check one block, add it up, and write its trace."""
        if isinstance(block, CountBlock):
            arranged = arrange_counts(block, self.recording.layers, self.path)
            if self.counts is None:
                self.counts = CountStatistics(self.recording.layers, self.options.phase)
            self.counts.add(counts=arranged, spans=block.spans, domain=block.domain)
        else:
            self._keep(arrange(block, self.recording.layers, self.path))
        self.tell()

    def _keep(self, block: Arranged) -> None:
        """Let blocks wait for more: a request is a block of its own, and a shard for each would be many."""
        self.notes |= block.notes
        if self.first is None:
            self.first = block
        require_alike(block, self.first, self.path)
        self.pending.append(block)
        if sum(len(one.sequence) for one in self.pending) >= block_tokens(len(block.ids) * block.ids.shape[2]) // 2:
            self.flush()

    def flush(self) -> None:
        """Add what waits."""
        waiting, self.pending = self.pending, []
        if waiting:
            self._add_trace(joined(waiting))

    def finish(self) -> Path:
        """Write the sums and provenance, compact, and return the run file."""
        if self.trace is None and self.counts is None:
            raise ImportFileError(f"{self.path}: there is no token and no count in it")
        writer = self._open_writer()
        statistics = [part.frames() for part in (self.trace, self.counts) if part is not None]
        for frames in statistics:
            writer.write_shard(frames)
        writer.write_shard({**self.book.frames(self.recording.vocabulary), **self._facts()})
        writer.info.text_kept = self.book.has_text
        if self.counts is not None and self.trace is None:
            writer.info.tokens = self.counts.tokens
        self.tell("compacting")
        return writer.finish(seconds=time.perf_counter() - self.started)

    def discard(self) -> None:
        """Leave nothing behind."""
        if self.writer is not None:
            shutil.rmtree(self.writer.folder, ignore_errors=True)

    def _add_trace(self, arranged: Arranged) -> None:
        """Add tokens whose ids and weights are in order."""
        if self.trace is None:
            width = arranged.ids.shape[2]
            self.trace = TraceStatistics(self.recording.layers, width, arranged.has_weights)
        groups, group = self.book.add(arranged, self.path)
        self.trace.add(
            ids=arranged.ids, weights=arranged.weights, sequence=arranged.sequence, position=arranged.position,
            groups=groups, group=group,
        )  # fmt: skip
        frames = [
            store.pack_trace(
                layer=layer.layer, step=layer.step, sequence=arranged.sequence, position=arranged.position,
                ids=arranged.ids[axis], weights=arranged.weights[axis], num_experts=layer.num_experts,
            )
            for axis, layer in enumerate(self.recording.layers)
        ]  # fmt: skip
        text = self.book.text_frame(arranged)
        shard = {"route_chunk": pl.concat(frames)} | ({"sequence_token": text} if text is not None else {})
        self._open_writer().write_shard(shard)

    def _open_writer(self) -> store.RunWriter:
        if self.writer is None:
            self.writer = store.RunWriter.create(self.directory, self.name, self._info())
        return self.writer

    def _info(self) -> store.RunInfo:
        config, recording = self.options.config, self.recording
        deepest = max(layer.layer for layer in recording.layers) + 1
        shape = model_shape(config) if config else None
        return store.RunInfo(
            model=self.options.model or recording.model or str(config.get("_name_or_path") or "") or self.path.stem,
            model_type=str(config.get("model_type") or ""),
            model_config=config,
            num_layers=max(shape.num_layers, deepest) if shape else deepest,
            hidden_size=shape.hidden_size if shape else 0,
            origin=f"import {self.format}",
            levels="routing",
            settings={"file": self.path.name, **recording.settings},
        )

    def _facts(self) -> dict[str, Any]:
        """Layers, experts, checks and omissions."""
        layers = self.recording.layers
        info = pl.DataFrame([{**vars(layer)} for layer in layers])
        experts = pl.DataFrame(
            [
                {"layer": layer.layer, "step": layer.step, "expert": expert, "kind": "routed",
                 "owner_layer": layer.layer, "owner_expert": expert}
                for layer in layers for expert in range(layer.num_experts)
            ]
        )  # fmt: skip
        omissions = {**_ALWAYS, **self.recording.omissions}
        return {
            "layer": info,
            "expert": experts,
            "check": pl.DataFrame(self._checks()),
            "omission": {"subject": list(omissions), "reason": list(omissions.values())},
        }

    def _checks(self) -> list[dict[str, Any]]:
        rows = [(name, status, detail) for name, status, detail in self.recording.notes]
        rows += [(name, status, detail) for name, (status, detail) in self.notes.items()]
        rows.append(("experts in range", "pass", "every id names an expert of its layer, and no token has one twice"))
        detail = f"{self.path.name} was recorded by another engine; that it is what the model did was not seen here"
        rows.append((store.IMPORTED, "skipped", detail))
        return [{"name": name, "status": status, "detail": detail} for name, status, detail in rows]

    def tell(self, detail: str = "") -> None:
        """How far the import is, and what it does after the last block."""
        if self.progress is None:
            return
        done, total = self.book.tokens, self.recording.total_tokens
        rate = done / max(time.perf_counter() - self.started, 1e-9)
        left = (total - done) / rate if total and rate else None
        self.progress(
            store.Progress(
                tokens=done, token_budget=total, tokens_per_second=rate, seconds_left=left,
                state="compacting" if detail else "collecting", detail=detail,
            )
        )  # fmt: skip


_ALWAYS = {
    "logits": "the source records what was selected, not the router's scores over all experts",
    "outputs": "the source records no activations: outliers, importance from outputs and similarity need the model",
}
"""What no imported file says."""
