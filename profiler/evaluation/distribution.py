"""KL divergence, agreement and perplexity of a model against its base on the same tokens.

::

    base = BaseDistribution.of(model, list(corpus.batches()))
    for plan in plans:
        with edited(model, plan):
            print(base.against(model).kl)

Both distributions are log-softmax in float32 over the whole vocabulary. KL is KL(base || model), the direction in which
a token that the base expects and the model has lost costs most. Logits are read in parts of bounded memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import polars as pl
import torch
from torch import Tensor, nn

from moescope.errors import CorpusError, InputError, ModelError, RunError
from profiler import evaluate
from profiler.metrics import divergence as formulas
from profiler.metrics import perplexity as perplexities
from profiler.metrics.perplexity import Estimate
from profiler.running import evaluating, input_device

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from profiler.corpus import TokenBatch

Chunks = Iterator[tuple[int, Tensor]]
"""(first position, (batch, positions, vocabulary)) in order, of logits or of log-probabilities."""

ChunkSource = Callable[[Tensor, Tensor], Chunks]
"""(input_ids, attention_mask) of a batch -> its parts."""

See = Callable[["TokenBatch", "NDArray[np.bool_]", "NDArray[np.bool_]"], None]
"""``see(batch, right, base_right)``: which next tokens were the likeliest, (batch, length - 1); False on padding."""

MOST_BYTES = 8 << 30
"""Log-probabilities that may be held of a base."""


@dataclass(frozen=True)
class Divergence:
    """How far a model's predictions are from its base's, with 95 % intervals over sequences.

    Attributes:
        kl: mean KL(base || model) per predicted token, nats.
        low: lower end of its interval; NaN with fewer than two sequences.
        high: its upper end.
        agreement: share of tokens with the same likeliest token, 0..1.
        ratio: perplexity of the model over that of its base, with the interval of the pairs.
        tokens: predicted tokens.
        per_domain: the same for each domain; empty within a domain.
        sequences: one row per sequence: sequence, domain, predictions, kl_sum, agreed, loss_sum, base_loss_sum (nats).
    """

    kl: float
    low: float
    high: float
    agreement: Estimate
    ratio: Estimate
    tokens: int
    per_domain: dict[str, Divergence] = field(repr=False)
    sequences: pl.DataFrame = field(repr=False)


@dataclass(frozen=True)
class BaseDistribution:
    """What a model predicts on fixed tokens, kept so that many edited variants can be measured against it quickly.

    Attributes:
        batches: the tokens.
        log_probabilities: per batch its parts (first position, (batch, positions, vocabulary)), on the processor.
    """

    batches: list[TokenBatch] = field(repr=False)
    log_probabilities: list[list[tuple[int, Tensor]]] = field(repr=False)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        batches: Iterable[TokenBatch],
        *,
        dtype: Literal["float32", "float16"] = "float32",
        most_bytes: int = MOST_BYTES,
    ) -> BaseDistribution:
        """Run the model once over the tokens and keep its log-probabilities.

        Args:
            model: the base, as it is now.
            batches: a sample of held-out text; some thousand tokens rank plans well.
            dtype: ``float32``, with which a model's divergence from itself is 0; ``float16`` takes half the memory and
                moves KL by about 1e-6 nats, a log-probability of -10 being known to 0.004.
            most_bytes: refuse to hold more; 4 bytes x tokens x vocabulary are needed in float32.

        Raises:
            ModelError: the model has no language-model head.
            CorpusError: there is nothing to predict.
            InputError: it would not fit.
        """
        held = list(batches)
        size = {"float32": 4, "float16": 2}[dtype]
        needed = size * evaluate.vocabulary_of(model) * sum(batch.input_ids.size for batch in held)
        if needed > most_bytes:
            raise InputError(
                f"the base's log-probabilities take {needed / 2**30:.1f} GiB, more than {most_bytes / 2**30:.1f}:"
                " give fewer tokens"
            )
        kept = []
        with evaluating(model):
            for batch in held:
                ids, mask = tensors_of(model, batch)
                kind = getattr(torch, dtype)
                chunks = evaluate.logit_chunks(model, ids, mask)
                kept.append([(start, log_softmax(part).to("cpu", kind)) for start, part in chunks])
        return cls(held, kept)

    def against(self, model: nn.Module, *, progress: evaluate.Progress | None = None) -> Divergence:
        """How far a model is from this base.

        Raises:
            ModelError: it has no language-model head, or another vocabulary.
            CorpusError: there is nothing to predict.
            RunError: a model puts out NaN or infinity.
        """
        kept = iter(self.log_probabilities)
        rows = sequence_sums(model, self.batches, lambda ids, mask: iter(next(kept)), progress=progress)
        return summarize(rows)


def divergence(
    model: nn.Module,
    base: nn.Module | BaseDistribution,
    batches: Iterable[TokenBatch] = (),
    *,
    progress: evaluate.Progress | None = None,
) -> Divergence:
    """How far a model is from its base: from the base itself, both on the same batch, or from what was kept of it.

    Args:
        model: a model with a language-model head.
        base: what it is compared with. Of a :class:`BaseDistribution` its own tokens are used.
        batches: held-out text.
        progress: told after each batch how many tokens have been read.

    Raises: as :meth:`BaseDistribution.against`.
    """
    if isinstance(base, BaseDistribution):
        return base.against(model, progress=progress)
    device = input_device(base)

    def chunks(ids: Tensor, mask: Tensor) -> Chunks:
        found = evaluate.logit_chunks(base, ids.to(device), mask.to(device))
        return ((start, log_softmax(part)) for start, part in found)

    with evaluating(base):
        return summarize(sequence_sums(model, batches, chunks, progress=progress))


def summarize(sequences: pl.DataFrame) -> Divergence:
    """What sums per sequence amount to, over all text and per domain."""
    domains = sequences["domain"].unique(maintain_order=True).to_list()
    parts = {domain: _summary(sequences.filter(pl.col("domain") == domain), {}) for domain in domains}
    return _summary(sequences, {name: part for name, part in parts.items() if part.tokens})


def aligned(first: Chunks, second: Chunks) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Two sequences of parts, cut so that both cover the same positions."""
    other: Tensor | None = None
    for start, one in first:
        while one.shape[1]:
            if other is None or not other.shape[1]:
                _, other = next(second)
            size = min(one.shape[1], other.shape[1])
            yield start, one[:, :size], other[:, :size]
            start, one, other = start + size, one[:, size:], other[:, size:]


def sequence_sums(
    model: nn.Module,
    batches: Iterable[TokenBatch],
    base: ChunkSource,
    *,
    logits: ChunkSource | None = None,
    see: See | None = None,
    progress: evaluate.Progress | None = None,
) -> pl.DataFrame:
    """One row per sequence, as :class:`Divergence` has them.

    Args:
        model: what is measured.
        batches: the text.
        base: gives the base's log-probabilities of a batch.
        logits: gives the model's logits of a batch, where somebody watches it meanwhile.
        see: told after each batch which next tokens were right.
        progress: told after each batch how many tokens have been read.

    Raises: as :meth:`BaseDistribution.against`.
    """
    rows: list[pl.DataFrame] = []
    done = 0
    with evaluating(model):
        for batch in batches:
            evaluate.require_positions(model, batch.input_ids.shape[1])
            ids, mask = tensors_of(model, batch)
            chunks = evaluate.logit_chunks(model, ids, mask) if logits is None else logits(ids, mask)
            sums, right, base_right = _token_sums(chunks, base(ids, mask), ids, mask)
            columns = {name: values.cpu().numpy() for name, values in sums.items()}
            rows.append(pl.DataFrame({"sequence": batch.sequences, "domain": batch.domains, **columns}))
            done += int(batch.attention_mask.sum())
            if see is not None:
                see(batch, right.cpu().numpy(), base_right.cpu().numpy())
            if progress is not None:
                progress(done)
    return _checked(rows)


@torch.no_grad()
def _token_sums(logits: Chunks, base: Chunks, ids: Tensor, mask: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Sums over the predicted tokens of each sequence (batch,), and which were right (batch, length - 1)."""
    real = mask.bool()
    counted, targets = real[:, 1:] & real[:, :-1], ids[:, 1:]
    names = ("kl_sum", "agreed", "loss_sum", "base_loss_sum")
    sums = {name: torch.zeros(len(ids), dtype=torch.float64, device=ids.device) for name in names}
    right, base_right = torch.zeros_like(counted), torch.zeros_like(counted)
    for start, part, before in aligned(logits, base):
        if part.shape[-1] != before.shape[-1]:
            raise ModelError(
                f"the models predict {part.shape[-1]} and {before.shape[-1]} tokens: KL takes one vocabulary"
            )
        stop = min(start + part.shape[1], targets.shape[1])
        if stop <= start:
            break
        p, q = before[:, : stop - start].to(part.device).float(), log_softmax(part[:, : stop - start])
        chosen, there = targets[:, start:stop].to(q.device), counted[:, start:stop].to(q.device)
        first, base_first = q.argmax(-1), p.argmax(-1)
        # A token that the base excludes (p = 0) adds nothing, whatever the model says of it.
        found = {
            "kl_sum": torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(-1),
            "agreed": first == base_first,
            "loss_sum": -q.gather(-1, chosen[..., None])[..., 0],
            "base_loss_sum": -p.gather(-1, chosen[..., None])[..., 0],
        }
        for name, values in found.items():
            sums[name] += torch.where(there, values.double(), 0.0).sum(1).to(ids.device)
        right[:, start:stop] = (there & (first == chosen)).to(ids.device)
        base_right[:, start:stop] = (there & (base_first == chosen)).to(ids.device)
    return {"predictions": counted.sum(1), **sums}, right, base_right


def log_softmax(logits: Tensor) -> Tensor:
    """ln p over the last axis, in float32."""
    return torch.log_softmax(logits.float(), -1)


def tensors_of(model: nn.Module, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Ids and mask of a batch where the model wants them, both (batch, length)."""
    device = input_device(model)
    return torch.from_numpy(batch.input_ids).to(device), torch.from_numpy(batch.attention_mask).to(device)


def _summary(sequences: pl.DataFrame, parts: dict[str, Divergence]) -> Divergence:
    counts = sequences["predictions"].to_numpy()
    if not counts.sum():
        nothing = Estimate(float("nan"), float("nan"), float("nan"))
        return Divergence(nothing.value, nothing.low, nothing.high, nothing, nothing, 0, parts, sequences)
    kl = formulas.kl_divergence(divergence_sum=sequences["kl_sum"].to_numpy(), predictions=counts)
    agreement = formulas.top1_agreement(agreed=sequences["agreed"].to_numpy(), predictions=counts)
    ratio = perplexities.perplexity_ratio(
        loss_sum=sequences["loss_sum"].to_numpy(),
        base_loss_sum=sequences["base_loss_sum"].to_numpy(),
        predictions=counts,
    )
    return Divergence(kl.value, kl.low, kl.high, agreement, ratio, int(counts.sum()), parts, sequences)


def _checked(rows: Sequence[pl.DataFrame]) -> pl.DataFrame:
    table = pl.concat(rows).sort("sequence") if rows else pl.DataFrame()
    if not rows or not table["predictions"].sum():
        raise CorpusError("nothing to predict: the text has no sequence of two tokens or more")
    sums = ("kl_sum", "loss_sum", "base_loss_sum")
    broken = table.filter(~pl.all_horizontal(pl.col(name).is_finite() for name in sums))
    if len(broken):
        who = "the base" if not broken["base_loss_sum"].is_finite().all() else "the model"
        raise RunError(
            f"{who} puts out NaN or infinity on {len(broken)} of {len(table)} sequences, such as"
            f" {broken['sequence'][0]}: load it with --dtype float32, or check its weights"
        )
    return table
