"""A run that is recorded layer by layer: each layer's shards are written when all of the text has gone through it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor

import store as run_store
from moescope.errors import InputError, MoescopeError
from profiler.capture.check_rows import measured
from profiler.capture.memory import peak_bytes, reset_peaks
from profiler.capture.provenance import fingerprint
from profiler.capture.session import WatchSession

GIB = 1 << 30
STATE, SAMPLES = "layers.json", "samples.pt"


class StreamSession(WatchSession):
    """A watch over one decoder layer at a time.

    Attributes:
        layers_done: decoder layers that are recorded, also by an interrupted run that this one goes on with.
        samples: values of the weights that have been loaded, for the model's fingerprint.
        bytes_read: from the checkpoint so far, for the report on progress.
        expected_bytes: the peak of the process that was stated before it began.
    """

    def __init__(self, model: Any, *, expected_bytes: int, **options: Any) -> None:
        super().__init__(model, **options, flush_seconds=math.inf, origin="collect")
        self.layers_done = 0
        self.samples: dict[str, Tensor] = {}
        self.bytes_read, self.expected_bytes = 0, expected_bytes
        self._running: int | None = None
        self._began = time.monotonic()
        self._done_before = 0

    @property
    def folder(self) -> Path:
        """What is kept of an unfinished run beside its shards."""
        return self.writer.folder / "stream"

    def open(self) -> None:
        """Begin the run, or go back to the last layer that an interrupted one finished."""
        if self._writer is not None:
            return
        super().open()
        self._require_same_batches()
        self.tokens_before = 0
        self.folder.mkdir(exist_ok=True)
        state = _read_state(self.folder / STATE)
        self.layers_done = self._done_before = state["layers"]
        self.writer.keep_shards(state["shards"])
        if self.layers_done and (self.folder / SAMPLES).exists():
            self.samples = torch.load(self.folder / SAMPLES, weights_only=True)

    def _require_same_batches(self) -> None:
        """Hidden states are kept batch by batch."""
        before, now = (info.settings.get("batch_size") for info in (self.writer.info, self._info))
        if before != now:
            raise InputError(f"run {self.name!r} was begun with batches of {before}: resume it with that --batch-size")

    def __enter__(self) -> StreamSession:
        self.open()
        self._attachment: Any = nullcontext()  # each layer is watched by itself
        self._began = time.monotonic()
        reset_peaks()
        self._write_progress("collecting")
        return self

    @contextmanager
    def layer(self, index: int) -> Iterator[None]:
        """While entered, decoder layer ``index`` is watched; what it showed is written at the end, or is lost."""
        self._running = self._observer.running = index
        self._recording.keeps_text, self._tracker.again = index == 0, index > 0
        self.checks.begin_layer(index)
        with self._observer.attached():
            yield
        self.flush(final=True)
        self.layers_done = index + 1
        with run_store.replacing(self.folder / SAMPLES) as temporary:
            torch.save(self.samples, temporary)
        self.writer.info.seconds = self._seconds
        self.writer.write_info()
        state = {"layers": self.layers_done, "shards": self.writer.shard_names}
        run_store.write_whole(self.folder / STATE, json.dumps(state, sort_keys=True))
        self._running = None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is None:
            self.writer.info.model_fingerprint = fingerprint(self.model, self.samples)
        super().__exit__(kind, error, traceback)

    def state(self, state: Any = "collecting", detail: str = "") -> run_store.Progress:
        """How far the collection is: a token counts as done to the part of the layers that it has gone through."""
        layers, spent = len(self.found.stack), time.monotonic() - self._began
        share = self.tokens / layers
        done = self._done_before * self.planned_tokens / layers + share
        speed = share / spent if spent and share else 0.0
        known = bool(self.planned_tokens and speed and state == "collecting")
        where = f"layer {min(self.layers_done + 1, layers)} of {layers}, {self.bytes_read / 1e9:.1f} GB read"
        return run_store.Progress(
            tokens=round(done),
            token_budget=self.planned_tokens,
            tokens_per_second=speed,
            seconds_left=max(0.0, self.planned_tokens - done) / speed if known else None,
            state=state,
            detail=detail or where,
        )

    def _add_checks(self, frames: dict[str, list[pl.DataFrame]], final: bool) -> None:
        """With the layer that they are about: a layer that is run again has others."""
        if final:
            frames["check"] = [self._check_table()]

    def _publish_checks(self) -> None:
        """Nothing beside the shards."""

    def _check_table(self) -> pl.DataFrame:
        table, layer = super()._check_table(), pl.col("layer")
        if self._running is not None:
            return table.filter(layer == self._running)
        peak = peak_bytes()
        detail = f"the process took {peak / GIB:.3g} GiB at most; {self.expected_bytes / GIB:.3g} GiB were expected"
        row = measured("peak memory", peak, self.expected_bytes, detail, otherwise="warning")
        return pl.concat([table.filter(layer.is_null()), pl.DataFrame([row.as_dict()], schema=table.schema)])

    def _interrupt(self, error: BaseException) -> None:
        """Finished layers are kept; the one under way will be run again."""
        self.tokens = (self.layers_done - self._done_before) * self.planned_tokens
        try:
            self._write_progress("interrupted", f"{type(error).__name__}: {error}".splitlines()[0][:200].rstrip(": "))
        except MoescopeError as second:
            error.add_note(f"moescope could not say that the run was interrupted either: {second}")
        finally:
            self.writer.close()


def _read_state(file: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"layers": 0, "shards": []}
    return state
