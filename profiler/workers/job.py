"""A collection that workers share: the driver owns the run, hands out parts, adds up, and finishes."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import store as run_store
from moescope.errors import CorpusError, InputError, MoescopeError, RunError
from profiler.workers.crew import Crew, Lost, Member
from profiler.workers.parts import Part, cut, default_part_tokens
from profiler.workers.place import Place, take_up
from profiler.workers.verdicts import merged
from profiler.workers.worker import CorpusFacts, Order, Ready, Report, Work

if TYPE_CHECKING:
    from moescope.cluster import Cluster
    from profiler.capture.levels import RecordingOptions
    from profiler.corpus import Corpus
    from profiler.generation import Sampling

ProgressCallback = Callable[[run_store.Progress], None]

MOST_LOSSES = 3
"""Workers that may be lost on one part before it is taken for the cause."""

TELL_SECONDS = 1.0


def collect_on_ray(
    joined: Cluster,
    load_model: Callable[[], Any],
    *,
    corpus: Corpus,
    name: str,
    tokenizer: Any,
    options: RecordingOptions,
    store: str | Path = "runs",
    part_tokens: int | None = None,
    resume: bool = False,
    keep_text: bool = True,
    generate: int = 0,
    sampling: Sampling | None = None,
    progress: ProgressCallback | None = None,
    model_name: str = "",
    revision: str = "",
    settings: Mapping[str, Any] | None = None,
    headline: bool = True,
    stack: str | None = None,
) -> Path:
    """Run a corpus through a model on the workers of a Ray, and write the run that one process would have written.

    Args:
        joined: see :func:`moescope.cluster.connected`.
        load_model: gives each worker its model; pickled.
        options: what is recorded.
        part_tokens: tokens of one part at least; the run keeps the cut, and is resumed with it.
        others: as of :func:`profiler.collect.collect`.

    Returns:
        The file of the finished run.

    Raises:
        InputError: what workers cannot do as one process does, or a run that was cut otherwise.
        MoescopeError: as of :func:`profiler.collect.collect`.
        RunError: interrupted, or workers failed; what was recorded is kept, and the message says how to go on.
    """
    require_equal(corpus, options, generate)
    directory = Path(store).resolve()
    finished = run_store.lacking_metrics(directory, name) if resume and headline else None
    if finished is None:
        writer = take_up(directory, name) if resume else None
        try:
            before = {} if writer is None else writer.info.settings.get("workers", {})
            tokens = agreed_part_tokens(name, part_tokens, before, corpus.num_tokens)
            parts = cut(corpus, tokens)
            about = {
                "name": name,
                "model_name": model_name,
                "revision": revision,
                "settings": {**corpus.describe(), **(settings or {})},
                "stack": stack,
            }
            facts = CorpusFacts(corpus.num_tokens, corpus.num_sequences, corpus.domains, corpus.options)
            largest = max(part.tokens for part in parts)
            order = Order(
                load_model, tokenizer if keep_text else None, options, facts, largest, about, generate, sampling
            )
            job = WorkersJob(joined, order, corpus, parts, directory, writer, tokens, progress)
        except BaseException:
            if writer is not None:
                writer.close()
            raise
        finished = job.run()
    if headline:
        _compute_metrics(finished, corpus.num_tokens, progress)
    return finished


def require_equal(corpus: Corpus, options: RecordingOptions, generate: int) -> None:
    """Refuse what depends on more than one part, so that workers could not do what one process does.

    Raises:
        InputError: a token budget that answers count towards, or more samples of level errors than count.
        CorpusError: nothing to feed.
    """
    if corpus.num_tokens == 0:
        raise CorpusError("the corpus has no tokens: check --data, --domain-column and --text-column")
    if generate and corpus.options.token_budget is not None:
        raise InputError(
            "--ray with --generate and --tokens: answers count towards the budget, so where it ends depends on all"
            " answers before; leave out --tokens, or give fewer texts"
        )
    if "errors" in options.levels:
        from profiler.recorders.expert_errors import MAX_TOKENS

        sampled = (corpus.num_tokens + corpus.num_sequences * max(0, generate - 1)) / options.errors_every
        if sampled > 0.9 * MAX_TOKENS:  # the sample is drawn by a hash: about so many
            every = -(-int(sampled * options.errors_every) // int(0.9 * MAX_TOKENS))
            raise InputError(
                f"level errors counts the first {MAX_TOKENS} sampled tokens of a run, which workers cannot know: about"
                f" {sampled:,.0f} would be sampled; give --errors-every {every} or more"
            )


def agreed_part_tokens(name: str, asked: int | None, before: Mapping[str, Any], corpus_tokens: int) -> int:
    """Tokens of a part: those that the run was begun with, else those asked for, else by the size of the corpus.

    Raises:
        InputError: the run was begun with others.
    """
    begun = before.get("part_tokens")
    if begun is not None and asked is not None and begun != asked:
        raise InputError(f"run {name!r} was begun with --part-tokens {begun}: resume it with that, or leave it out")
    return begun or asked or default_part_tokens(corpus_tokens)


class WorkersJob:
    """One collection. Made and run by :func:`collect_on_ray`."""

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
            f"collection of {self._name!r} {what}; after {done} of {self._corpus.num_tokens} tokens; what was recorded"
            f" is kept in {self._writer.folder}: go on with the same command and --resume"
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


def _compute_metrics(path: Path, tokens: int, progress: ProgressCallback | None) -> None:
    from profiler.headline import compute_and_store

    def tell(words: str) -> None:
        if progress is not None:
            progress(run_store.Progress(tokens=tokens, token_budget=tokens, state="compacting", detail=words))

    try:
        compute_and_store(path, tell=tell)
    except MoescopeError as error:
        raise RunError(f"{path} is finished, but its metrics are not: {error}; see moescope runs compute") from error
