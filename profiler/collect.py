"""``profiler.collect``: run a corpus through a model and write what its MoE layers did as a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import store as run_store
from moescope.errors import CorpusError, InputError, ModelError, MoescopeError, RunError
from profiler.capture.backward import forward_backward, forward_loss, loss_tolerance, require_head
from profiler.capture.levels import RecordingOptions, parse_levels
from profiler.capture.overhead import measure_overhead as measure
from profiler.capture.session import WatchSession
from profiler.capture.stacks import DECODER
from profiler.generation import Generation, Sampling
from profiler.headline import compute_and_store
from profiler.running import embeddings_of, evaluating, input_device

if TYPE_CHECKING:
    from profiler.corpus import Corpus, TokenBatch
    from profiler.recorders.gradients import GradientRecorder

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
    keep_trace: bool = True,
    measure_overhead: bool = False,
    vectors_per_domain: bool = False,
    router_scores: int = 0,
    similarity_every: int = 16,
    errors_every: int = 16,
    scores_every: int = 1,
    trace_every: int = 1,
    generate: int = 0,
    sampling: Sampling | None = None,
    progress: ProgressCallback | None = None,
    model_name: str = "",
    revision: str = "",
    settings: Mapping[str, Any] | None = None,
    flush_seconds: float = 15.0,
    headline: bool = True,
    stack: str | None = None,
) -> Path:
    """Run a corpus through a model and write the run.

    The first batch runs twice, without and with the profiler, and the two outputs are compared; it is recorded once.
    Only the decoder runs, without the language-model head: routing does not need its logits. At level ``gradients`` the
    whole model runs, and a backward behind each batch, from the next-token loss summed over the real tokens.

    Args:
        model: the model, as :func:`profiler.load_model` gives it.
        corpus: what :func:`profiler.corpus.open_corpus` gives.
        name: name of the run.
        tokenizer: the model's tokenizer.
        store: directory of runs.
        level: comma list of levels, see :data:`profiler.capture.levels.LEVELS`.
        resume: go on with the interrupted run of that name; the corpus must be the same. Of a run that lacks nothing
            but its metrics, they are computed.
        keep_text: False stores no text and no token ids.
        keep_trace: False keeps the sums alone, which do not grow with the text: no selection token by token.
        measure_overhead: measure first by how much recording slows this model down; the result stands in the run's
            settings under ``overhead``.
        vectors_per_domain: keep vectors per neuron, channel and pair of experts apart by domain; else they are pooled.
        router_scores: keep so many of the largest router scores of every token; -1 keeps k + 8.
        similarity_every: level similarity runs all experts on one of so many tokens.
        errors_every: level errors runs each expert with narrower weights on one of so many of its tokens.
        scores_every: router scores are kept of one of so many sequences, drawn by a hash of their numbers.
        trace_every: selections are kept of one of so many sequences, drawn by the same hash.
        generate: answer each text with up to so many tokens of the model's own, and record prompt and decode; 0 for
            none. The corpus's token budget then counts both, and collecting ends after the batch that reaches it.
        sampling: how those tokens are chosen; the likeliest ones by default.
        progress: called after every batch.
        model_name: what the run calls the model.
        revision: hub revision of the model.
        settings: further options worth keeping in the run.
        flush_seconds: seconds between shards.
        headline: compute the headline metrics at the end.
        stack: which layers, where several stacks of the model have experts, see :func:`profiler.watch`. The decoder of
            an encoder-decoder model is fed the same text as its encoder.

    Returns:
        The file of the finished run.

    Raises:
        ModelError: no MoE layers, layers that cannot be watched, or too few positions for the corpus.
        CorpusError: nothing to feed.
        StoreError: the name is taken, or there is nothing to resume.
        RunError: interrupted or failed half-way; what was recorded is kept, and the message says how to go on.
    """
    store = run_store.located(store)
    described = corpus.describe() if hasattr(corpus, "describe") else {}
    session = WatchSession(
        model,
        name=name,
        directory=store,
        options=RecordingOptions(
            parse_levels(level),
            vectors_per_domain,
            router_scores,
            similarity_every,
            errors_every,
            scores_every,
            keep_trace,
            trace_every,
        ),
        tokenizer=tokenizer if keep_text else None,
        domain="text",
        token_budget=None,
        flush_seconds=flush_seconds,
        resume=resume,
        model_name=model_name,
        revision=revision,
        settings={**described, **(settings or {})},
        origin="collect",
        stack=stack,
    )
    require_fitting(session, corpus, generate)
    finished = run_store.lacking_metrics(store, name) if resume and headline else None
    if finished is not None:
        compute_metrics(finished, session, progress)
        return finished
    job = Job(session, corpus, progress)
    if generate:
        job.answer(generate, sampling or Sampling())
    if session.gradients is not None:
        job.go_back(session.gradients, generate)
    with evaluating(model):
        if measure_overhead:
            job.measure_overhead(level)
        path = job.run()
    if headline:
        compute_metrics(path, session, progress)
    return path


def compute_metrics(path: Path, session: WatchSession, progress: ProgressCallback | None) -> None:
    """Metrics beside the run; the run itself is finished by now, whatever becomes of them."""

    def tell(words: str) -> None:
        if progress is not None:
            progress(session.state("compacting", words))

    try:
        compute_and_store(path, tell=tell)
    except MoescopeError as error:
        raise RunError(f"{path} is finished, but its metrics are not: {error}; see moescope runs compute") from error


@dataclass
class Job:
    """One collection: the session, what it is fed, and whom to tell.

    Attributes:
        shape: (sequences, length) of the batch that ran last.
    """

    session: WatchSession
    corpus: Corpus
    progress: ProgressCallback | None

    def __post_init__(self) -> None:
        self.runner = _runner(self.session)
        self.device = input_device(self.session.model)
        self.session.planned_tokens = self.corpus.num_tokens
        self._budget: int | None = None
        self._phases = 1
        self._run_batch = self._run_bare = self._forward
        self._compare: Callable[[Tensor, Tensor], None] = self._compare_outputs
        self.shape: tuple[int, ...] = ()

    def answer(self, new_tokens: int, sampling: Sampling) -> None:
        """Let the model answer the texts, instead of only reading them."""
        generation = Generation(self.session.model, new_tokens=new_tokens, sampling=sampling, device=self.device)
        self.session.add_setting("generation", generation.settings())
        self._phases = 2
        self._budget = getattr(getattr(self.corpus, "options", None), "token_budget", None)
        longest = self.corpus.num_tokens + self.corpus.num_sequences * (new_tokens - 1)
        self.session.planned_tokens = min(longest, self._budget or longest)

        def bare(batch: TokenBatch) -> Tensor:
            self._require_vocabulary(batch)
            return generation.answer(batch)

        def together(batch: TokenBatch) -> Tensor:
            with self.session.together():
                return bare(batch)

        self._run_bare, self._run_batch = bare, together

    def go_back(self, recorder: GradientRecorder, new_tokens: int) -> None:
        """Run the whole model with its head and a backward behind each batch: both count, or neither does."""
        model = self.session.model
        require_head(model)
        if new_tokens:
            raise InputError("level gradients follows a text backward, not what is generated: leave out one of the two")

        def forward(batch: TokenBatch) -> Tensor:
            return forward_loss(model, *self._inputs(batch)).values

        def both(batch: TokenBatch) -> Tensor:
            with self.session.holding():
                loss = forward_backward(model, *self._inputs(batch))
                recorder.add_loss(loss.by_domain(batch.domains))
            return loss.values

        self._run_bare, self._run_batch, self._compare = forward, both, recorder.compare_losses
        recorder.loss_tolerance = loss_tolerance(model)
        self.session.checks.not_compared = "not asked for at level gradients, whose loss is compared instead"

    def run(self) -> Path:
        """Feed the corpus and finish the run."""
        session = self.session
        session.open()
        try:
            self._work()
        except KeyboardInterrupt:
            raise self._stopped("was interrupted") from None
        except torch.OutOfMemoryError as error:
            shape = "x".join(map(str, self.shape))
            raise self._stopped(f"ran out of memory on a batch of {shape} (use a smaller --batch-size)") from error
        except MoescopeError:
            raise
        except Exception as error:
            text = str(error).strip().splitlines()
            raise self._stopped(f"failed ({type(error).__name__}: {text[0] if text else 'no message'})") from error
        assert session.path is not None
        return session.path

    def _work(self) -> None:
        done = self.session.writer.sequences_done if self.session.resuming else set()
        batches = self.corpus.batches(skip=done)
        batch = next(batches, None)
        bare = None if batch is None else self.try_out(batch)
        with self.session:
            while batch is not None and not self._enough():
                self.feed(batch, bare)
                bare, batch = None, next(batches, None)

    def try_out(self, batch: TokenBatch) -> Tensor:
        """Run the first batch without the profiler; what comes out is for :meth:`feed` to compare with."""
        with self.session.memory.bare_forward():
            bare = self._run_bare(batch)
        self._expect_predictions(batch)
        self._state_memory(batch)
        return bare

    def _expect_predictions(self, batch: TokenBatch) -> None:
        """Ask the whole model about the first text, so that the recorded predictions can be held against its logits."""
        recorder = self.session.predictions
        if recorder is None or self._phases > 1:
            return
        ids, mask = self._inputs(batch)
        text = ids[:1, mask[0] != 0]
        with torch.no_grad():
            more = _for_decoder(self.session, text, torch.ones_like(text))
            logits = self.session.model(input_ids=text, use_cache=False, **more).logits
        recorder.expect(int(batch.sequences[0]), logits[0].argmax(dim=-1))

    def _state_memory(self, batch: TokenBatch) -> None:
        """Say what recording takes at most beside the model, before it begins."""
        domains = len(getattr(self.corpus, "domains", ())) or 1
        stated = self.session.expect_memory(
            batch=batch.input_ids.size, tokens=self.session.planned_tokens, domains=domains, phases=self._phases
        )
        self._tell(detail=f"recording takes at most {stated / (1 << 20):,.0f} MiB beside the model")

    def measure_overhead(self, level: str) -> None:
        """Time the first batch with and without the profiler; the result becomes a setting of the run."""
        batch = next(self.corpus.batches(skip=set()), None)
        if batch is not None:
            model, goes_back = self.session.model, self.session.gradients is not None
            watched = (lambda: forward_backward(model, *self._inputs(batch))) if goes_back else None
            stack = self.session.found.name
            result = measure(model, lambda: self._forward(batch), level=level, watched=watched, stack=stack)
            self.session.add_setting("overhead", result.as_dict())
            self._tell(detail=str(result))

    def feed(self, batch: TokenBatch, bare: Tensor | None = None) -> None:
        """Run and record a batch; ``bare`` is what it gave without the profiler, where that is known."""
        self._label(batch)
        output = self._run_batch(batch)
        if bare is not None:
            self._compare(bare, output)
        self.session.end_batch()
        self._tell()

    def _compare_outputs(self, bare: Tensor, watched: Tensor) -> None:
        self.session.checks.unchanged = differences(bare, watched)

    def _label(self, batch: TokenBatch) -> None:
        self.session.label(
            domains=batch.domains, sequences=[int(number) for number in batch.sequences], sources=batch.sources
        )

    def _enough(self) -> bool:
        return self._budget is not None and self.session.state().tokens >= self._budget

    def _forward(self, batch: TokenBatch) -> Tensor:
        ids, mask = self._inputs(batch)
        with torch.no_grad():
            more = _for_decoder(self.session, ids, mask)
            output = self.runner(input_ids=ids, attention_mask=mask, use_cache=False, **more)
        hidden: Tensor = output[0]
        return hidden

    def _inputs(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """(batch, length) token ids and attention mask, where the model wants them."""
        self._require_vocabulary(batch)
        return torch.from_numpy(batch.input_ids).to(self.device), torch.from_numpy(batch.attention_mask).to(self.device)

    def _require_vocabulary(self, batch: TokenBatch) -> None:
        self.shape = batch.input_ids.shape
        known = int(getattr(embeddings_of(self.session.model), "num_embeddings", 0))
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
            f"collection of {session.name!r} {what} after {done:,} of {self.corpus.num_tokens:,} tokens; what was"
            f" recorded is kept in {session.writer.folder}: go on with the same command and --resume"
        )


def require_fitting(session: WatchSession, corpus: Corpus, new_tokens: int) -> None:
    if corpus.num_tokens == 0:
        raise CorpusError("the corpus has no tokens: check --data, --domain-column and --text-column")
    length = getattr(getattr(corpus, "options", None), "sequence_length", 0)
    limit = getattr(session.found.config, "max_position_embeddings", None)
    if isinstance(limit, int) and length + new_tokens > limit > 0:
        answers = f" with {new_tokens} generated tokens" if new_tokens else ""
        raise ModelError(
            f"sequence length {length}{answers} is more than the {limit} positions of the model: use --sequence-length"
            f" {max(2, limit - new_tokens)}"
        )


def _runner(session: WatchSession) -> nn.Module:
    """The part of the model that takes token ids and has no language-model head, if there is one."""
    if _encodes_apart(session) and session.found.name != DECODER:
        return session.found.owner
    base = getattr(session.model, "base_model", session.model)
    inside = any(module is session.found.owner for module in base.modules())
    return base if inside and isinstance(base, nn.Module) else session.model


def _encodes_apart(session: WatchSession) -> bool:
    return bool(getattr(getattr(session.model, "config", None), "is_encoder_decoder", False))


def _for_decoder(session: WatchSession, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """What the decoder of an encoder-decoder model is fed, where it is the one that is watched: the same text."""
    if not _encodes_apart(session) or session.found.name != DECODER:
        return {}
    return {"decoder_input_ids": ids, "decoder_attention_mask": mask}


def differences(first: Tensor, second: Tensor) -> int:
    """Values that differ; NaN equals NaN, because a broken model is broken with and without the profiler."""
    if first.shape != second.shape:
        return max(first.numel(), second.numel())
    differ = first != second
    if first.is_floating_point():
        differ &= ~(first.isnan() & second.isnan())
    return int(differ.sum())
