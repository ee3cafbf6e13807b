"""``profiler.watch``: record what a model does, in any loop or server, and write it as a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from profiler.capture.levels import RecordingOptions, parse_levels
from profiler.capture.session import WatchSession
from store.remote import located


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
    keep_trace: bool = True,
    vectors_per_domain: bool = False,
    router_scores: int = 0,
    similarity_every: int = 16,
    errors_every: int = 16,
    scores_every: int = 1,
    trace_every: int = 1,
    flush_seconds: float = 15.0,
    resume: bool = False,
    model_name: str = "",
    revision: str = "",
    settings: Mapping[str, Any] | None = None,
    stack: str | None = None,
) -> WatchSession:
    """Record what a model's MoE layers do while the context is entered, in any loop or server.

    ::

        with profiler.watch(model, store="runs", name="mine", level="activations") as session:
            for batch in batches:
                model(**batch)

    ``model(**batch)`` and ``model.generate(...)`` both work, with or without padding and cache. Real tokens are told by
    the 2-D attention mask; without mask, all are real. The model's outputs stay what they are, bit for bit. Tokens that
    stand for an image, video or audio are kept apart under the label ``DOMAIN:image`` and so on. Several sequences
    packed into one row count as one sequence. Under gradient checkpointing the first pass alone is counted.
    Beam search exchanges rows unseen: statistics hold, but its sequences are mixtures of beams.

    Level ``gradients`` records the backwards that the loop itself runs, whatever its loss: a mean over N tokens gives
    gradients N times smaller than the sum that ``collect`` takes. Two backwards of one forward count twice, and table
    ``loss`` stays empty. Put forward and backward into ``with session.holding():``, else a shard may end between them.

    Args:
        model: a model of transformers 5 with fused experts, or anything that contains one.
        name: name of the run; the file becomes ``store/name.duckdb``.
        store: directory of runs, made if it is not there.
        level: comma list of levels, see :data:`profiler.capture.levels.LEVELS`.
        tokenizer: with it the run keeps the text; without it neither text nor token ids.
        domain: label of the tokens, where :meth:`WatchSession.label` does not say otherwise.
        token_budget: stop recording (not the model) after the forward that reaches so many real tokens.
        keep_text: False keeps no token ids even if there is a tokenizer.
        keep_trace: False keeps the sums alone, which do not grow with the text: no selection token by token.
        vectors_per_domain: keep vectors per neuron, channel and pair of experts apart by domain; else they are pooled.
        router_scores: keep so many of the largest router scores of every token; -1 keeps k + 8.
        similarity_every: level similarity runs all experts on one of so many tokens.
        errors_every: level errors runs each expert with narrower weights on one of so many of its tokens.
        scores_every: router scores are kept of one of so many sequences, drawn by a hash of their numbers.
        trace_every: selections are kept of one of so many sequences, drawn by the same hash.
        flush_seconds: write a shard at the end of the first forward after so many seconds; more where writing is slow.
        resume: go on with an interrupted run of that name.
        model_name: what the run calls the model; its folder or hub id if empty.
        revision: hub revision of the model, if known.
        settings: anything worth keeping about this collection; becomes JSON in table ``run``.
        stack: which layers, where several stacks of the model have experts: encoder, decoder, vision, talker, ..., or
            the path of the list of layers; by default the language decoder.

    Raises:
        ModelError: the model has no MoE layer, one that cannot be watched, or several stacks that it may be.
        InputError: an unknown level or stack, or (from the store) a name that is taken.
    """
    return WatchSession(
        model,
        name=name,
        directory=located(store),
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
        domain=domain,
        token_budget=token_budget,
        flush_seconds=flush_seconds,
        resume=resume,
        model_name=model_name,
        revision=revision,
        settings=settings or {},
        stack=stack,
    )
