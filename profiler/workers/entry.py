"""``collect_on_ray``: the workers of a Ray write the run that one process would have written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import store as run_store
from moescope.errors import CorpusError, InputError, MoescopeError, RunError
from profiler.workers.job import ProgressCallback, WorkersJob
from profiler.workers.parts import cut, default_part_tokens
from profiler.workers.place import take_up
from profiler.workers.worker import CorpusFacts, Order

if TYPE_CHECKING:
    from moescope.cluster import Cluster
    from profiler.capture.levels import RecordingOptions
    from profiler.corpus import Corpus
    from profiler.generation import Sampling


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
    directory = run_store.located(store).absolute()  # other processes open it by this name
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


def _compute_metrics(path: Path, tokens: int, progress: ProgressCallback | None) -> None:
    from profiler.headline import compute_and_store

    def tell(words: str) -> None:
        if progress is not None:
            progress(run_store.Progress(tokens=tokens, token_budget=tokens, state="compacting", detail=words))

    try:
        compute_and_store(path, tell=tell)
    except MoescopeError as error:
        raise RunError(f"{path} is finished, but its metrics are not: {error}; see moescope runs compute") from error
