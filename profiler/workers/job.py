"""A collection that workers share: the driver owns the run, hands out parts, adds up, and finishes."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import store as run_store
from moescope.errors import InputError, MoescopeError, RunError
from profiler.workers.crew import Crew, Lost, Member
from profiler.workers.parts import Part
from profiler.workers.place import Place
from profiler.workers.verdicts import merged
from profiler.workers.worker import Order, Ready, Report, Work

if TYPE_CHECKING:
    from moescope.cluster import Cluster
    from profiler.corpus import Corpus

ProgressCallback = Callable[[run_store.Progress], None]

MOST_LOSSES = 3
"""Workers that may be lost on one part before it is taken for the cause."""

TELL_SECONDS = 1.0

SILENT_SECONDS = 120.0
"""A worker that says nothing for so long is mentioned. It is not ended: one that hangs looks like a slow batch."""


class WorkersJob:
    """One collection. Made and run by :func:`profiler.workers.collect_on_ray`."""

    def __init__(
        self,
        joined: Cluster,
        order: Order,
        corpus: Corpus,
        parts: list[Part],
        directory: Path,
        writer: run_store.RunWriter | None,
        part_tokens: int,
        progress: ProgressCallback | None,
    ) -> None:
        self._cluster, self._order, self._corpus, self._parts = joined, order, corpus, parts
        self._directory, self._part_tokens, self._progress = directory, part_tokens, progress
        self._name: str = order.about["name"]
        self._writer = writer
        self._resuming = writer is not None
        self._left: deque[Part] = deque(parts)
        self._losses: Counter[int] = Counter()
        self._first_shard = 0
        self._tokens = self._tokens_before = 0
        self._began = self._told = time.monotonic()
        self._seconds_before = 0.0
        self._place: Place | None = None
        self._crew: Crew | None = None
        self._said = ""
        if writer is not None:
            self._take_up(writer)

    # The run

    def _take_up(self, writer: run_store.RunWriter) -> None:
        """Go on with a run: leave out what its shards hold, whoever wrote them."""
        settings = writer.info.settings
        if settings.get("batch_size", self._corpus.options.batch_size) != self._corpus.options.batch_size:
            raise InputError(
                f"run {self._name!r} was begun with batches of {settings['batch_size']}: resume it with that"
                " --batch-size"
            )
        self._first_shard = settings.get("workers", {}).get("first_shard", writer.next_shard)
        done = writer.sequences_done
        left = [part.without(done) for part in self._parts]
        self._left = deque(part for part in left if part.batches)
        if done:
            self._tokens_before = int(run_store.open_run(writer.folder).table("sequence")["tokens"].sum())
        self._seconds_before = writer.info.seconds

    def _open(self, info: run_store.RunInfo) -> None:
        """Begin the run, or check that the one that goes on is the same; the first worker has said what it watches."""
        from profiler.capture.session_rules import require_same

        if self._writer is None:
            self._writer = run_store.RunWriter.create(self._directory, self._name, info)
        else:
            require_same(self._name, self._writer.info, info)
        writer, joined = self._writer, self._cluster
        writer.info.settings["workers"] = {
            "engine": "ray",
            "version": joined.version,
            "workers": joined.workers,
            "cpus_per_worker": joined.cpus,
            "gpus_per_worker": joined.gpus,
            "part_tokens": self._part_tokens,
            "parts": len(self._parts),
            "first_shard": self._first_shard,
            "next_shard": self._first_shard + len(self._parts),
        }
        writer.write_info()
        self._place = Place(writer.folder, resuming=self._resuming)
        self._began = time.monotonic()

    # The work

    def run(self) -> Path:
        """Hand out all parts and finish the run."""
        crew = self._crew = Crew(self._cluster, self._order)
        try:
            self._work(crew)
            crew.dismiss_all()
            return self._finish(crew)
        except KeyboardInterrupt:
            raise self._stopped("was interrupted") from None
        except MoescopeError as error:
            if self._place is None and not isinstance(error, RunError):
                raise  # nothing has begun
            raise self._stopped(f"stopped: {error}") from error
        finally:
            self._forget_under_way()
            crew.dismiss_all()
            self._close()

    def _work(self, crew: Crew) -> None:
        while len(crew.members) < min(self._cluster.workers, len(self._left)):
            crew.hire()
        self._tell(crew)
        while self._left or any(member.part is not None for member in crew.members):
            for member, said in crew.news(TELL_SECONDS):
                self._hear(crew, member, said)
            if time.monotonic() - self._told >= TELL_SECONDS:
                self._tell(crew)

    def _hear(self, crew: Crew, member: Member, said: Ready | Report | Lost) -> None:
        if isinstance(said, Lost):
            self._lose(crew, member, said)
            return
        if isinstance(said, Ready):
            info = run_store.RunInfo.from_row(said.info)
            if self._place is None:
                self._open(info)
            self._require_same_model(info, said.place)
            self._hand_out(crew, member)
            return
        self._tokens += said.tokens - member.tokens
        member.tokens = said.tokens
        if said.done:
            self._take_verdicts(crew)
            self._hand_out(crew, member)

    def _hand_out(self, crew: Crew, member: Member) -> None:
        """Give a worker the next part; one that has no more to do goes."""
        member.part = None
        if not self._left:
            crew.dismiss(member)
            return
        part = self._left.popleft()
        batches = [self._corpus.batch(list(batch)) for batch in part.batches]
        assert self._place is not None, "opened when the first worker was ready"
        shard = self._first_shard + part.number
        crew.give(member, part, Work(part.number, shard, batches, self._place.location, self._place.staging))

    def _lose(self, crew: Crew, member: Member, lost: Lost) -> None:
        """Another worker takes the place and the part of one that is gone, unless its shard is there."""
        part = member.part
        if part is not None:
            self._tokens -= member.tokens
            if self._place is not None and self._first_shard + part.number in self._place.target.numbers():
                self._tokens += part.tokens
            else:
                self._count_loss(part, lost)
                self._left.appendleft(part)
        if len(crew.members) < min(self._cluster.workers, len(self._left)):
            crew.hire()

    def _count_loss(self, part: Part, lost: Lost) -> None:
        self._losses[part.number] += 1
        if self._losses[part.number] < MOST_LOSSES:
            return
        numbers = part.sequences
        shown = ", ".join(map(str, numbers[:8])) + (f", ... {numbers[-1]}" if len(numbers) > 8 else "")
        short = "its machine was short of memory" if lost.for_memory else lost.reason[:200]
        raise RunError(
            f"part {part.number} (sequences {shown}) has cost {MOST_LOSSES} workers ({short}): if it is memory, use a"
            " smaller --batch-size or fewer workers per node"
        )

    def _require_same_model(self, info: run_store.RunInfo, place: str) -> None:
        assert self._writer is not None, "opened when the first worker was ready"
        if info.model_fingerprint != self._writer.info.model_fingerprint:
            raise InputError(
                f"the worker on {place} has loaded another model than the run has ({self._writer.info.model}): all"
                " nodes need the same files"
            )

    def _take_verdicts(self, crew: Crew) -> None:
        assert self._writer is not None, "opened when the first worker was ready"
        self._writer.write_checks(merged(crew.verdicts))

    # The end

    def _finish(self, crew: Crew) -> Path:
        if self._writer is None:
            raise RunError("no worker came to work")
        seconds = self._seconds()
        self._report(self._state(crew, "compacting"))
        if self._place is not None:
            self._place.gather()
        return self._writer.finish(seconds=seconds)

    def _close(self) -> None:
        """Let another process go on with the run."""
        writer = self._writer
        if writer is None or not writer.folder.is_dir():
            return
        with suppress(MoescopeError, OSError):
            writer.info.seconds = self._seconds()
            writer.write_info()
            writer.write_progress(replace(self._state(None, "interrupted"), seconds_left=None))
            if self._place is not None:
                self._place.close()
        writer.close()

    def _forget_under_way(self) -> None:
        """What no shard holds has not been collected."""
        for member in self._crew.members if self._crew is not None else ():
            self._tokens -= member.tokens
            member.tokens = 0

    def _stopped(self, what: str) -> RunError:
        self._forget_under_way()
        done = self._tokens_before + self._tokens
        if self._writer is None:
            return RunError(f"collection of {self._name!r} {what}; nothing was recorded yet")
        return RunError(
            f"collection of {self._name!r} {what}; after {done:,} of {self._corpus.num_tokens:,} tokens; what was"
            f" recorded is kept in {self._writer.folder}: go on with the same command and --resume"
        )

    # The display

    def _seconds(self) -> float:
        spent = time.monotonic() - self._began if self._place is not None else 0.0
        return self._seconds_before + spent

    def _state(self, crew: Crew | None, state: Any = "collecting") -> run_store.Progress:
        spent, done = time.monotonic() - self._began, self._tokens_before + self._tokens
        speed = self._tokens / spent if self._place is not None and spent else 0.0
        total = 0 if self._order.generate else self._corpus.num_tokens
        running = sum(member.part is not None for member in crew.members) if crew is not None else 0
        parts = len(self._parts) - len(self._left) - running
        workers = f"{crew.at_work} of {self._cluster.workers} workers, " if crew is not None else ""
        if crew is not None and crew.silent_seconds >= SILENT_SECONDS:
            workers += f"one silent for {crew.silent_seconds / 60:.0f} min, "
        known = bool(total and speed and state == "collecting")
        return run_store.Progress(
            tokens=done,
            token_budget=total,
            tokens_per_second=speed,
            seconds_left=max(0, total - done) / speed if known else None,
            state=state,
            detail=f"{workers}{parts} of {len(self._parts)} parts",
        )

    def _tell(self, crew: Crew) -> None:
        state = self._state(crew)
        self._told = time.monotonic()
        if self._writer is not None and self._place is not None:
            self._writer.write_progress(state)
            self._place.tell()
        if state.tokens or state.detail != self._said:  # before the first token, what does not change is said once
            self._report(state)
        self._said = state.detail

    def _report(self, state: run_store.Progress) -> None:
        if self._progress is not None:
            self._progress(state)
