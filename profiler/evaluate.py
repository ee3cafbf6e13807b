"""How well a model predicts held-out text: the loss of each sequence, and the perplexity with its interval.

::

    found = evaluate.perplexity(model, corpus.batches())
    found.value, found.low, found.high, found.per_domain["code"].value

The loss is the cross-entropy in float32 of real next tokens only, in sequences that do not overlap. Sums and counts are
kept per sequence, so that two models can be compared on the same sequences.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl
import torch
from torch import Tensor, nn

from moescope.errors import CorpusError, ModelError, RunError
from profiler.metrics import perplexity as formulas
from profiler.running import evaluating, input_device

if TYPE_CHECKING:
    from profiler.corpus import TokenBatch

ENTRIES = 1 << 26
"""Logits (batch x tokens x vocabulary) that are held at once: 256 MiB in float32."""

Progress = Callable[[int], None]
"""Told after each batch how many tokens have been read so far."""


@dataclass(frozen=True)
class Perplexity:
    """Perplexity on a text, with its 95 % interval over sequences.

    Attributes:
        value: exp of the mean loss over all predicted tokens.
        low: lower end of the interval; NaN with fewer than two sequences.
        high: its upper end.
        tokens: predicted tokens.
        per_domain: the same for each domain; empty within a domain.
        sequences: one row per sequence: sequence, domain, predictions, loss_sum (nats).
    """

    value: float
    low: float
    high: float
    tokens: int
    per_domain: dict[str, Perplexity]
    sequences: pl.DataFrame


def perplexity(model: nn.Module, batches: Iterable[TokenBatch], *, progress: Progress | None = None) -> Perplexity:
    """The perplexity of a model on batches of tokens, such as :meth:`profiler.corpus.Corpus.batches` gives.

    Args:
        model: a model with a language-model head.
        batches: held-out text; padding is left out by its mask.
        progress: told how far it is.

    Raises:
        ModelError: the model has no language-model head.
        CorpusError: there is nothing to predict.
        RunError: the model puts out NaN or infinity.
    """
    return summarize(sequence_losses(model, batches, progress=progress))


def sequence_losses(
    model: nn.Module, batches: Iterable[TokenBatch], *, progress: Progress | None = None
) -> pl.DataFrame:
    """One row per sequence: sequence, domain, predictions, loss_sum = sum of -ln p(next token), nats.

    Raises: as :func:`perplexity`.
    """
    device = input_device(model)
    rows: list[pl.DataFrame] = []
    done = 0
    with evaluating(model):
        for batch in batches:
            require_positions(model, batch.input_ids.shape[1])
            ids = torch.from_numpy(batch.input_ids).to(device)
            mask = torch.from_numpy(batch.attention_mask).to(device)
            losses, predicted = token_losses(model, ids, mask)
            rows.append(
                pl.DataFrame(
                    {
                        "sequence": batch.sequences,
                        "domain": batch.domains,
                        "predictions": predicted.sum(1).cpu().numpy(),
                        "loss_sum": losses.sum(1, dtype=torch.float64).cpu().numpy(),
                    }
                )
            )
            done += int(batch.attention_mask.sum())
            if progress is not None:
                progress(done)
    return _checked(rows)


def summarize(sequences: pl.DataFrame) -> Perplexity:
    """The perplexity that losses per sequence amount to, over all text and per domain."""
    domains = sequences["domain"].unique(maintain_order=True).to_list()
    parts = {domain: _summary(sequences.filter(pl.col("domain") == domain), {}) for domain in domains}
    return _summary(sequences, parts)


def ratio(after: Perplexity, before: Perplexity) -> formulas.Estimate:
    """Perplexity of one model over that of another on the same sequences, with the interval of the pairs.

    Raises:
        CorpusError: they were measured on different sequences.
    """
    pairs = before.sequences.join(
        after.sequences, on=["sequence", "domain", "predictions"], how="inner", suffix="_after"
    )
    if not len(pairs) == len(before.sequences) == len(after.sequences):
        raise CorpusError("two models are compared on the same sequences only: measure both on the same corpus")
    return formulas.perplexity_ratio(
        loss_sum=pairs["loss_sum_after"].to_numpy(),
        base_loss_sum=pairs["loss_sum"].to_numpy(),
        predictions=pairs["predictions"].to_numpy(),
    )


@torch.no_grad()
def token_losses(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each next token and whether it counts, both (batch, length - 1).

    Losses are -ln p in float32, 0 where the token or the one before it is padding.
    """
    real = attention_mask.bool()
    predicted = real[:, 1:] & real[:, :-1]
    losses = torch.zeros(predicted.shape, dtype=torch.float32, device=input_ids.device)
    last = input_ids.shape[1] - 1
    for start, logits in logit_chunks(model, input_ids, attention_mask):
        stop = min(start + logits.shape[1], last)
        part = logits[:, : stop - start].float().flatten(0, 1)
        targets = input_ids[:, start + 1 : stop + 1].flatten().to(part.device)
        found = nn.functional.cross_entropy(part, targets, reduction="none")
        losses[:, start:stop] = found.view(len(input_ids), -1).to(losses.device)
    return torch.where(predicted, losses, 0.0), predicted


@torch.no_grad()
def logit_chunks(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first position, logits (batch, chunk, vocabulary)) of one forward, in parts of bounded memory.

    The decoder runs once. The model's own head then runs on parts of the hidden states, with whatever the family does
    to logits (scales, soft caps), because the whole model is called with the decoder's output put in place.

    Raises:
        ModelError: the model has no language-model head.
    """
    vocabulary = vocabulary_of(model)
    batch, length = input_ids.shape
    size = max(1, ENTRIES // (batch * vocabulary))
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    base = getattr(model, "base_model", model)
    if size >= length or base is model or "logits_to_keep" not in inspect.signature(model.forward).parameters:
        yield 0, model(**inputs).logits
        return
    kept: list[Any] = []
    handle = base.register_forward_hook(lambda module, args, output: kept.append(output))
    try:
        model(**inputs, logits_to_keep=1)
    finally:
        handle.remove()
    for start in range(0, length, size):
        part = slice(start, start + size)
        with _answering(base, _part_of(kept[0], part)):
            logits = model(input_ids=input_ids[:, part], use_cache=False).logits
        yield start, logits  # outside: whoever reads the parts may run the model in between


@contextmanager
def _answering(module: nn.Module, answer: Any) -> Iterator[None]:
    """While entered, the module gives this answer instead of running."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = lambda *args, **kwargs: answer
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


def _part_of(output: Any, part: slice) -> Any:
    """A decoder's output with some of its positions."""
    return type(output)(last_hidden_state=output.last_hidden_state[:, part])


def require_positions(model: Any, length: int) -> None:
    """Refuse sequences that are longer than the model has positions for.

    Raises:
        ModelError: such a one.
    """
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int) and length > limit > 0:
        raise ModelError(
            f"a sequence has {length} tokens, more than the {limit} positions of the model: use --sequence-length"
            f" {limit}"
        )


def vocabulary_of(model: Any) -> int:
    """How many tokens a model predicts.

    Raises:
        ModelError: it has no language-model head, or an encoder.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        raise ModelError(f"{type(model).__name__} has no language-model head, so that it predicts no text")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(f"{type(model).__name__} has an encoder: its perplexity on a text alone is not defined")
    return int(head.weight.shape[0])


def _summary(sequences: pl.DataFrame, parts: dict[str, Perplexity]) -> Perplexity:
    counts = sequences["predictions"].to_numpy()
    if not counts.sum():
        nothing = float("nan")
        return Perplexity(nothing, nothing, nothing, 0, parts, sequences)
    found = formulas.perplexity(loss_sum=sequences["loss_sum"].to_numpy(), predictions=counts)
    return Perplexity(found.value, found.low, found.high, int(counts.sum()), parts, sequences)


def _checked(rows: list[pl.DataFrame]) -> pl.DataFrame:
    table = pl.concat(rows).sort("sequence") if rows else pl.DataFrame()
    if not rows or not table["predictions"].sum():
        raise CorpusError("nothing to predict: the text has no sequence of two tokens or more")
    broken = table.filter(~pl.col("loss_sum").is_finite())
    if len(broken):
        raise RunError(
            f"the model's loss is not finite on {len(broken)} of {len(table)} sequences, such as"
            f" {broken['sequence'][0]}: load it with --dtype float32, or check its weights"
        )
    return table
