"""``evaluate``: everything that is measured of a model against its base, in one call.

Both models are loaded at once; where they do not fit together, load them with a device map that leaves weights on disk.
One pass over the text gives KL, perplexities, agreement, routing and the probes that the text itself holds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moescope.errors import CorpusError, InputError, ModelError, RunError
from profiler.evaluate import Perplexity, logit_chunks, require_positions, vocabulary_of
from profiler.evaluate import summarize as summarize_losses
from profiler.evaluation.distribution import (
    Chunks,
    ChunkSource,
    Divergence,
    log_softmax,
    sequence_sums,
    summarize,
)
from profiler.evaluation.generation import (
    NEW_TOKENS,
    Generations,
    choose_prompts,
    compare_generations,
)
from profiler.evaluation.harness import require_harness, run_harness
from profiler.evaluation.probes import Probe, Read, probe
from profiler.evaluation.routing import Kept, Routing, RoutingCounts, SelectionReader
from profiler.evaluation.size import Size, size_of
from profiler.evaluation.speed import Speed, measure_speed
from profiler.running import evaluating, input_device

if TYPE_CHECKING:
    from profiler.corpus import TokenBatch

PARTS = ("routing", "generation", "probes", "speed")
"""What can be skipped."""

FEWEST_SEQUENCES = 2

Progress = Callable[[str, float], None]
"""``progress(part, share)``: what is being measured, and how much of it is done."""


@dataclass(frozen=True)
class Evaluation:
    """A model measured against its base.

    Attributes:
        divergence: KL, agreement and ratio of perplexities, over all text and per domain.
        perplexity: of the model.
        base_perplexity: of the base.
        routing: None where it was skipped or cannot be compared; a note says why.
        generation: None where it was skipped or no prompt is long enough.
        probes: empty where they were skipped.
        size: of the model.
        base_size: of the base.
        speed: ``prompt`` and ``decode``; empty where it was skipped.
        harness: what lm-evaluation-harness found; None where it was not asked for.
        notes: what weakens the figures, in sentences.
    """

    divergence: Divergence
    perplexity: Perplexity
    base_perplexity: Perplexity
    routing: Routing | None
    generation: Generations | None
    probes: list[Probe]
    size: Size
    base_size: Size
    speed: dict[str, Speed]
    harness: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)


def evaluate(
    model: nn.Module,
    base: nn.Module,
    batches: Callable[[], Iterable[TokenBatch]],
    *,
    tokenizer: Any = None,
    kept: Kept | None = None,
    kept_layers: Sequence[int] | None = None,
    skip: Collection[str] = (),
    new_tokens: int = NEW_TOKENS,
    tasks: Sequence[str] = (),
    task_limit: int | None = None,
    seed: int = 0,
    paths: tuple[str | Path, str | Path] = ("", ""),
    progress: Progress | None = None,
) -> Evaluation:
    """Measure a model against its base on held-out text. Both are afterwards as they were.

    Args:
        model: what is measured, such as a compressed model.
        base: what it is compared with, such as the model that it was made from.
        batches: gives the held-out text anew for each pass.
        tokenizer: of both; some probes need it.
        kept: for each MoE layer of the base, of which of its experts each of the model's is made; all, where missing.
        kept_layers: decoder layers of the base that the model still has, in order; None = all.
        skip: some of :data:`PARTS`.
        new_tokens: longest greedy continuation.
        tasks: of lm-evaluation-harness, run on both.
        task_limit: items per task.
        seed: of the probes.
        paths: where model and base were loaded from, to weigh their files.
        progress: told how far it is.

    Raises:
        InputError: an unknown part, or tasks without the harness.
        ModelError: a model without language-model head, with an encoder, or with another vocabulary.
        CorpusError: fewer than two sequences.
        RunError: out of memory, or NaN.
    """
    _refuse(model, base, skip, tasks)
    tell = progress or (lambda part, share: None)
    notes: list[str] = []
    try:
        counts = _routing(model, base, kept, kept_layers, skip, notes)
        divergence, read = _one_pass(model, base, batches, counts, tell)
        generation = None if "generation" in skip else _generation(model, base, batches, new_tokens, notes, tell)
        probes = [] if "probes" in skip else _probes(model, base, batches, read, tokenizer, seed, tell)
        speed = {} if "speed" in skip else _speed(model, base, batches, notes, tell)
    except torch.OutOfMemoryError as error:
        raise RunError("out of memory: use a smaller --batch-size, or --skip generation,probes,speed") from error
    harness = None
    if tasks:
        tell("lm-eval", 0.0)
        harness = run_harness({"base": base, "model": model}, tasks, tokenizer=tokenizer, limit=task_limit)
    notes += [f"Probe {one.name}: too few items ({one.items}) to say anything." for one in probes if not one.enough]
    return Evaluation(
        divergence=divergence,
        perplexity=_perplexity(divergence, "loss_sum"),
        base_perplexity=_perplexity(divergence, "base_loss_sum"),
        routing=None if counts is None else counts.result(),
        generation=generation,
        probes=probes,
        size=size_of(model, paths[0]),
        base_size=size_of(base, paths[1]),
        speed=speed,
        harness=harness,
        notes=notes,
    )


def _refuse(model: nn.Module, base: nn.Module, skip: Collection[str], tasks: Sequence[str]) -> None:
    for name in skip:
        if name not in PARTS:
            raise InputError(f"there is no part {name!r} to skip; there are {', '.join(PARTS)}")
    sizes = vocabulary_of(model), vocabulary_of(base)
    if sizes[0] != sizes[1]:
        raise ModelError(f"the models predict {sizes[0]} and {sizes[1]} tokens: they are compared on one vocabulary")
    if tasks:
        require_harness()


def _routing(
    model: nn.Module,
    base: nn.Module,
    kept: Kept | None,
    kept_layers: Sequence[int] | None,
    skip: Collection[str],
    notes: list[str],
) -> RoutingCounts | None:
    if "routing" in skip:
        return None
    try:
        return RoutingCounts(SelectionReader(model), SelectionReader(base), kept=kept, kept_layers=kept_layers)
    except ModelError as error:
        notes.append(f"Routing was not compared: {error}.")
        return None


def _one_pass(
    model: nn.Module,
    base: nn.Module,
    batches: Callable[[], Iterable[TokenBatch]],
    counts: RoutingCounts | None,
    tell: Progress,
) -> tuple[Divergence, Read]:
    """Everything that one reading of the text gives."""
    sequences, total = 0, 0
    for batch in batches():
        sequences += len(batch.domains)
        total += int(batch.attention_mask.sum())
        for one in (model, base):
            require_positions(one, batch.input_ids.shape[1])
    if sequences < FEWEST_SEQUENCES:
        raise CorpusError(
            f"the text is too short: {sequences} sequence{'s' * (sequences != 1)}, and intervals take 2 or more; give"
            " more text or a smaller --sequence-length"
        )
    read: Read = []

    def see(batch: TokenBatch, right: NDArray[np.bool_], base_right: NDArray[np.bool_]) -> None:
        read.append((batch, right, base_right))
        if counts is not None:
            counts.add(batch)

    logits = _watched(model, None if counts is None else counts.model)
    before = _watched(base, None if counts is None else counts.base)
    with evaluating(base):
        rows = sequence_sums(
            model,
            batches(),
            lambda ids, mask: ((start, log_softmax(part)) for start, part in before(ids, mask)),
            logits=logits,
            see=see,
            progress=lambda tokens: tell("divergence", tokens / max(total, 1)),
        )
    return summarize(rows), read


def _watched(model: nn.Module, reader: SelectionReader | None) -> ChunkSource:
    device = input_device(model)

    def chunks(ids: Tensor, mask: Tensor) -> Chunks:
        found = logit_chunks(model, ids.to(device), mask.to(device))
        return found if reader is None else reader.first_of(found)

    return chunks


def _generation(
    model: nn.Module,
    base: nn.Module,
    batches: Callable[[], Iterable[TokenBatch]],
    new_tokens: int,
    notes: list[str],
    tell: Progress,
) -> Generations | None:
    prompts = choose_prompts(batches())
    if prompts.left_out:
        length = prompts.ids.shape[1]
        notes.append(f"No prompt of {length} tokens in {', '.join(prompts.left_out)}: nothing was generated there.")
    if not prompts.domains:
        return None
    return compare_generations(
        model, base, prompts, new_tokens=new_tokens, progress=lambda share: tell("generation", share)
    )


def _probes(
    model: nn.Module,
    base: nn.Module,
    batches: Callable[[], Iterable[TokenBatch]],
    read: Read,
    tokenizer: Any,
    seed: int,
    tell: Progress,
) -> list[Probe]:
    tell("probes", 0.0)
    found = probe(model, base, batches, read, tokenizer=tokenizer, seed=seed)
    tell("probes", 1.0)
    return found


def _speed(
    model: nn.Module,
    base: nn.Module,
    batches: Callable[[], Iterable[TokenBatch]],
    notes: list[str],
    tell: Progress,
) -> dict[str, Speed]:
    prompts = choose_prompts(batches())
    if not prompts.domains:
        notes.append("Speed was not measured: no prompt is long enough.")
        return {}
    return measure_speed(model, base, prompts.ids[:8], progress=lambda share: tell("speed", share))


def _perplexity(divergence: Divergence, column: str) -> Perplexity:
    return summarize_losses(
        divergence.sequences.select("sequence", "domain", "predictions", pl.col(column).alias("loss_sum"))
    )
