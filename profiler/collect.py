"""``profiler.collect``: run a corpus through a model and write what its MoE layers did as a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import store as run_store
from moescope.errors import CorpusError, ModelError, MoescopeError, RunError
from profiler.capture.levels import RecordingOptions, parse_levels
from profiler.capture.overhead import measure_overhead as measure
from profiler.capture.watch import WatchSession
from profiler.headline import compute_and_store

if TYPE_CHECKING:
    from profiler.corpus import Corpus, TokenBatch

ProgressCallback = Callable[[run_store.Progress], None]


def collect(
    model: nn.Module,
    *,
    corpus: Corpus,
    name: str,
    tokenizer: Any,
    store: str | Path = "runs",
    level: str = "routing",
    resume: bool = False,
    keep_text: bool = True,
    measure_overhead: bool = False,
    vectors_per_domain: bool = False,
    router_scores: int = 0,
    progress: ProgressCallback | None = None,
    model_name: str = "",
    revision: str = "",
    settings: Mapping[str, Any] | None = None,
    flush_seconds: float = 15.0,
    headline: bool = True,
) -> Path:
    """Run a corpus through a model and write the run.

    The first batch runs twice, without and with the profiler, and the two outputs are compared; it is recorded once.
    Only the decoder runs, without the language-model head: routing does not need its logits.

    Args:
        model: the model, as :func:`profiler.load_model` gives it.
        corpus: what :func:`profiler.corpus.open_corpus` gives.
        name: name of the run.
        tokenizer: the model's tokenizer.
        store: directory of runs.
        level: comma list of levels, see :data:`profiler.capture.levels.LEVELS`.
        resume: go on with the interrupted run of that name; the corpus must be the same.
        keep_text: False stores no text and no token ids.
        measure_overhead: measure first by how much recording slows this model down; the result stands in the run's
            settings under ``overhead``.
        vectors_per_domain: keep vectors per neuron, channel and pair of experts apart by domain; else they are pooled.
        router_scores: keep so many of the largest router scores of every token.
        progress: called after every batch.
        model_name: what the run calls the model.
        revision: hub revision of the model.
        settings: further options worth keeping in the run.
        flush_seconds: seconds between shards.
        headline: compute the headline metrics at the end.

    Returns:
        The file of the finished run.

    Raises:
        ModelError: no MoE layers, layers that cannot be watched, or too few positions for the corpus.
        CorpusError: nothing to feed.
        StoreError: the name is taken, or there is nothing to resume.
        RunError: interrupted or failed half-way; what was recorded is kept, and the message says how to go on.
    """
    described = corpus.describe() if hasattr(corpus, "describe") else {}
    session = WatchSession(
        model,
        name=name,
        directory=Path(store),
        options=RecordingOptions(parse_levels(level), vectors_per_domain, router_scores),
        tokenizer=tokenizer if keep_text else None,
        domain="text",
        token_budget=None,
        flush_seconds=flush_seconds,
        resume=resume,
        model_name=model_name,
        revision=revision,
        settings={**described, **(settings or {})},
        origin="collect",
    )
    _require_fitting(session, corpus)
    job = _Job(session, corpus, progress)
    with _evaluating(model):
        if measure_overhead:
            job.measure_overhead(level)
        path = job.run()
    if headline:
        if progress is not None:
            progress(session.state("compacting", "computing metrics"))
        _compute_metrics(path)
    return path


def _compute_metrics(path: Path) -> None:
    """Metrics beside the run; the run itself is finished by now, whatever becomes of them."""
    try:
        compute_and_store(path)
    except MoescopeError as error:
        raise RunError(f"{path} is finished, but its metrics are not: {error}; see moescope runs compute") from error


@dataclass
class _Job:
    """One collection: the session, what it is fed, and whom to tell."""

    session: WatchSession
    corpus: Corpus
    progress: ProgressCallback | None

    def __post_init__(self) -> None:
        self.runner = _runner(self.session)
        self.device = _input_device(self.session.model)
        self.session.planned_tokens = self.corpus.num_tokens

    def run(self) -> Path:
        """Feed the corpus and finish the run."""
        session = self.session
        session.open()
        done = session.writer.sequences_done if session.resuming else set()
        batch = None
        try:
            batches = self.corpus.batches(skip=done)
            batch = next(batches, None)
            bare = self._forward(batch) if batch is not None else None
            with session:
                while batch is not None:
                    self._feed(batch, bare)
                    bare, batch = None, next(batches, None)
        except KeyboardInterrupt:
            raise self._stopped("was interrupted") from None
        except torch.OutOfMemoryError as error:
            shape = "x".join(map(str, batch.input_ids.shape)) if batch is not None else "?"
            raise self._stopped(f"ran out of memory on a batch of {shape} (use a smaller --batch-size)") from error
        except MoescopeError:
            raise
        except Exception as error:
            text = str(error).strip().splitlines()
            raise self._stopped(f"failed ({type(error).__name__}: {text[0] if text else 'no message'})") from error
        assert session.path is not None
        return session.path

    def measure_overhead(self, level: str) -> None:
        """Time the first batch with and without the profiler; the result becomes a setting of the run."""
        batch = next(self.corpus.batches(skip=set()), None)
        if batch is not None:
            result = measure(self.session.model, lambda: self._forward(batch), level=level)
            self.session.add_setting("overhead", result.as_dict())
            self._tell(detail=str(result))

    def _feed(self, batch: TokenBatch, bare: Tensor | None) -> None:
        self.session.label(
            domains=batch.domains, sequences=[int(number) for number in batch.sequences], sources=batch.sources
        )
        output = self._forward(batch)
        if bare is not None:
            self.session.checks.unchanged = _differences(bare, output)
        self._tell()

    def _forward(self, batch: TokenBatch) -> Tensor:
        self._require_vocabulary(batch)
        ids = torch.from_numpy(batch.input_ids).to(self.device)
        mask = torch.from_numpy(batch.attention_mask).to(self.device)
        with torch.no_grad():
            output = self.runner(input_ids=ids, attention_mask=mask, use_cache=False)
        hidden: Tensor = output[0]
        return hidden

    def _require_vocabulary(self, batch: TokenBatch) -> None:
        known = int(getattr(_embeddings(self.session.model), "num_embeddings", 0))
        largest = int(batch.input_ids.max(initial=0))
        if known and largest >= known:
            raise ModelError(
                f"the tokenizer gives token id {largest}, but the model knows {known} tokens: it is another model's"
            )

    def _tell(self, detail: str = "") -> None:
        current = self.session.state(detail=detail)
        if self.progress is not None:
            self.progress(current)

    def _stopped(self, what: str) -> RunError:
        session = self.session
        done = session.state().tokens
        return RunError(
            f"collection of {session.name!r} {what} after {done} of {self.corpus.num_tokens} tokens; what was"
            f" recorded is kept in {session.writer.folder}: go on with the same command and --resume"
        )


def _require_fitting(session: WatchSession, corpus: Corpus) -> None:
    if corpus.num_tokens == 0:
        raise CorpusError("the corpus has no tokens: check --data, --domain-column and --text-column")
    length = getattr(getattr(corpus, "options", None), "sequence_length", 0)
    limit = getattr(session.found.config, "max_position_embeddings", None)
    if isinstance(limit, int) and length > limit > 0:
        raise ModelError(
            f"sequence length {length} is more than the {limit} positions of the model: use --sequence-length {limit}"
        )


def _runner(session: WatchSession) -> nn.Module:
    """The part of the model that takes token ids and has no language-model head, if there is one."""
    base = getattr(session.model, "base_model", session.model)
    inside = any(module is session.found.owner for module in base.modules())
    return base if inside and isinstance(base, nn.Module) else session.model


def _embeddings(model: Any) -> Any:
    return model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None


def _input_device(model: nn.Module) -> torch.device:
    embeddings = _embeddings(model)
    weight = getattr(embeddings, "weight", None)
    if isinstance(weight, Tensor) and not weight.is_meta:
        return weight.device
    devices = [parameter.device for parameter in model.parameters() if not parameter.is_meta]
    hook_device = getattr(getattr(embeddings, "_hf_hook", None), "execution_device", None)
    return torch.device(hook_device) if hook_device is not None else devices[0] if devices else torch.device("cpu")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _differences(first: Tensor, second: Tensor) -> int:
    """Values that differ; NaN equals NaN, because a broken model is broken with and without the profiler."""
    differ = first != second
    if first.is_floating_point():
        differ &= ~(first.isnan() & second.isnan())
    return int(differ.sum())
