"""A worker: a process that holds the model, records one part after the other, and hands over their shards."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moescope.errors import MoescopeError, RunError

if TYPE_CHECKING:
    from profiler.capture.levels import RecordingOptions
    from profiler.collect import Job
    from profiler.corpus import TokenBatch
    from profiler.corpus.corpus import CorpusOptions
    from profiler.generation import Sampling
    from profiler.workers.session import PartSession


@dataclass(frozen=True)
class CorpusFacts:
    """What a worker knows of the whole corpus; the text of a part comes with the part."""

    num_tokens: int
    num_sequences: int
    domains: list[str]
    options: CorpusOptions

    def describe(self) -> dict[str, Any]:
        """Nothing: whoever cut the corpus has described it."""
        return {}


@dataclass(frozen=True)
class Order:
    """What all workers of a collection are to do.

    Attributes:
        load_model: gives the model; pickled, so a function of a module, or a ``functools.partial`` of one.
        tokenizer: keeps text if given.
        options: what is recorded.
        corpus: the whole of it, in figures.
        part_tokens: of the largest part.
        about: name, model_name, revision, settings and stack of the session.
        generate: longest answer, 0 for none.
    """

    load_model: Callable[[], Any]
    tokenizer: Any
    options: RecordingOptions
    corpus: CorpusFacts
    part_tokens: int
    about: dict[str, Any]
    generate: int = 0
    sampling: Sampling | None = None


@dataclass(frozen=True)
class Work:
    """One part, and where its shard goes: ``location`` and ``staging`` are for :func:`store.shard_target`."""

    number: int
    shard: int
    batches: list[TokenBatch]
    location: str
    staging: str


@dataclass(frozen=True)
class Ready:
    """A worker has loaded the model: what the run says of it."""

    info: dict[str, Any]
    place: str
    pid: int


@dataclass(frozen=True)
class Report:
    """How far a worker is with its part.

    Attributes:
        tokens: of this part so far.
        done: the part's shard is there.
        seconds: of forwards, since the worker began.
        checks: rows of table ``check`` about all that the worker has seen; once the part is done.
    """

    tokens: int
    done: bool = False
    seconds: float = 0.0
    checks: list[dict[str, Any]] = field(default_factory=list)


class Worker:
    """The actor."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.place = socket.gethostname()
        self._job: Job | None = None
        self._tried = False

    def load(self) -> Ready:
        """Load the model and look at it.

        Raises:
            MoescopeError: as :func:`profiler.collect.collect` before it begins.
        """
        from profiler.collect import Job, require_fitting
        from profiler.generation import Sampling
        from profiler.workers.session import PartSession

        order = self.order
        try:
            model = order.load_model()
            model.eval()
            session = PartSession(model, options=order.options, tokenizer=order.tokenizer, **order.about)
            require_fitting(session, order.corpus, order.generate)  # type: ignore[arg-type]
            job = Job(session, order.corpus, None)  # type: ignore[arg-type]
            if order.generate:
                job.answer(order.generate, order.sampling or Sampling())
            if session.gradients is not None:
                job.go_back(session.gradients, order.generate)
        except MoescopeError as error:
            raise type(error)(f"the worker on {self.place}: {error}") from error
        except Exception as error:
            raise self._failed(error, "loading the model") from error
        self._job = job
        return Ready(session.info.to_row(), self.place, os.getpid())

    def record(self, work: Work) -> Iterator[Report]:
        """Run a part and hand over its shard; the last report says that the shard is there.

        Raises:
            RunError: the part could not be recorded; nothing of its shard is there.
        """
        import store

        job = self._job
        assert job is not None, "loaded first"
        session: PartSession = job.session  # type: ignore[assignment]
        if work.staging and not Path(work.staging).is_dir():
            raise RunError(
                f"the worker on {self.place} does not see {Path(work.location)}: give --store a folder that all nodes"
                " share under one path, or an object store"
            )
        try:
            before = session.tokens
            first = None if self._tried else job.try_out(_own(work.batches[0]))
            self._tried = True
            with session.part(work.number, store.shard_target(work.location, work.staging), work.shard):
                for batch in work.batches:
                    job.feed(_own(batch), first)
                    first = None
                    yield Report(session.tokens - before)
            seconds = session.seconds
            yield Report(session.tokens - before, True, seconds, session.verdicts().to_dicts())
        except RunError as error:
            raise type(error)(f"the worker on {self.place}, part {work.number}: {error}") from error
        except MoescopeError:
            raise
        except Exception as error:
            shape = "x".join(map(str, job.shape))
            raise self._failed(error, f"part {work.number}, a batch of {shape}") from error

    def _failed(self, error: Exception, what: str) -> MoescopeError:
        """One line about what went wrong here."""
        import torch

        text = (str(error).strip().splitlines() or ["no message"])[0]
        lacking = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in text
        if lacking:
            return RunError(
                f"the worker on {self.place} ran out of memory in {what}: use a smaller --batch-size, or fewer workers"
                " per node (larger --cpus-per-worker or --gpus-per-worker)"
            )
        return RunError(f"the worker on {self.place} failed in {what} ({type(error).__name__}: {text[:300]})")


def _own(batch: TokenBatch) -> TokenBatch:
    """A batch in memory of this process: what Ray hands over cannot be written to, and torch warns of it."""
    from dataclasses import replace

    return replace(batch, input_ids=np.array(batch.input_ids), attention_mask=np.array(batch.attention_mask))
