"""One reading of the text by a model as it is now: losses and likeliest tokens, and how far they are from others."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import polars as pl
import torch
from torch import Tensor, nn

from moescope.errors import RunError
from profiler import evaluate
from profiler.corpus import TokenBatch
from profiler.evaluation.distribution import log_softmax, tensors_of
from profiler.running import evaluating

MOST_BYTES = 2 << 30
"""Log-probabilities of the base that are kept for the KL divergence; beyond that there is none."""

Progress = Callable[[int], None]
"""Told after each batch how many tokens it had."""

See = Callable[[int, Tensor], None]
"""``see(number of the batch, which positions predict (batch, length - 1))``, after each forward."""


@dataclass(frozen=True)
class Reading:
    """What one reading gave. Position t of (batch, length - 1) is where token t + 1 is predicted.

    Attributes:
        losses: per batch -ln p of the token that came, float32; 0 where nothing is predicted.
        likeliest: per batch the likeliest token, int32.
        counted: per batch which positions predict a real token.
        log_probabilities: per batch the parts of the base's distribution; empty where they were not kept.
        sequences: one row per sequence, in their order: sequence, domain, predictions, loss_sum, agreed, right; and
            kl_sum or null.
        seconds: of the forwards and what is computed of them.
    """

    losses: list[Tensor] = field(repr=False)
    likeliest: list[Tensor] = field(repr=False)
    counted: list[Tensor] = field(repr=False)
    log_probabilities: list[list[Tensor]] = field(repr=False)
    sequences: pl.DataFrame = field(repr=False)
    seconds: float


def fits(model: nn.Module, batches: Sequence[TokenBatch], most_bytes: int = MOST_BYTES) -> bool:
    """Whether the log-probabilities of the whole text may be kept, 4 bytes x tokens x vocabulary."""
    return 4 * evaluate.vocabulary_of(model) * sum(batch.input_ids.size for batch in batches) <= most_bytes


def read(
    model: nn.Module,
    batches: Sequence[TokenBatch],
    *,
    base: Reading | None = None,
    keep: bool = False,
    see: See | None = None,
    progress: Progress | None = None,
) -> Reading:
    """Read the batches once.

    Args:
        model: as it is to be measured.
        batches: the text.
        base: an earlier reading of the same batches that this one is compared with; None compares it with itself.
        keep: keep the log-probabilities, so that later readings have a KL divergence from this one.
        see: told after each forward, while what watches the model still holds it.
        progress: told after each batch.

    Raises:
        RunError: the model puts out NaN or infinity.
    """
    losses, likeliest, masks, kept, rows = [], [], [], [], []
    seconds = 0.0
    with evaluating(model), torch.no_grad():
        for number, batch in enumerate(batches):
            began = time.perf_counter()
            found, parts = _figures(model, batch, None if base is None else base.log_probabilities, number, keep)
            seconds += time.perf_counter() - began
            if see is not None:
                see(number, found["counted"])
            others = found["likeliest"] if base is None else base.likeliest[number]
            rows.append(_sums(batch, found, others))
            losses.append(found["losses"])
            likeliest.append(found["likeliest"])
            masks.append(found["counted"])
            kept.append(parts)
            if progress is not None:
                progress(int(batch.attention_mask.sum()))
    return Reading(losses, likeliest, masks, kept if keep else [], _checked(rows), seconds)


def _figures(
    model: nn.Module, batch: TokenBatch, base: list[list[Tensor]] | None, number: int, keep: bool
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Of one batch, on the processor: losses, likeliest, counted, targets, and kl where the base's are kept."""
    ids, mask = tensors_of(model, batch)
    last = ids.shape[1] - 1
    known = {name: [] for name in ("losses", "likeliest", "kl")}  # type: dict[str, list[Tensor]]
    parts: list[Tensor] = []
    for place, (start, logits) in enumerate(evaluate.logit_chunks(model, ids, mask)):
        stop = min(start + logits.shape[1], last)
        if stop <= start:
            continue
        logs = log_softmax(logits[:, : stop - start])
        target = ids[:, start + 1 : stop + 1].to(logs.device)
        known["losses"].append(-logs.gather(-1, target[..., None])[..., 0].cpu())
        known["likeliest"].append(logs.argmax(-1).to("cpu", torch.int32))
        if base:
            before = base[number][place].to(logs.device)
            apart = torch.where(before == -torch.inf, 0.0, before.exp() * (before - logs)).sum(-1)
            known["kl"].append(apart.cpu())
        if keep:
            parts.append(logs.cpu())
    found = {name: torch.cat(values, 1) for name, values in known.items() if values}
    real = torch.from_numpy(batch.attention_mask).bool()
    found["counted"] = real[:, 1:] & real[:, :-1]
    found["targets"] = torch.from_numpy(batch.input_ids)[:, 1:]
    empty = torch.zeros(found["counted"].shape)
    found.setdefault("losses", empty)
    found.setdefault("likeliest", empty.int())
    for name in ("losses", "kl"):
        if name in found:
            found[name] = torch.where(found["counted"], found[name], 0.0)
    return found, parts


def _sums(batch: TokenBatch, found: dict[str, Tensor], others: Tensor) -> pl.DataFrame:
    counted = found["counted"]
    columns = {
        "predictions": counted.sum(1),
        "loss_sum": found["losses"].sum(1, dtype=torch.float64),
        "agreed": (counted & (found["likeliest"] == others)).sum(1),
        "right": (counted & (found["likeliest"] == found["targets"])).sum(1),
    }
    apart = found["kl"].sum(1, dtype=torch.float64).numpy() if "kl" in found else [None] * len(counted)
    return pl.DataFrame(
        {
            "sequence": batch.sequences,
            "domain": batch.domains,
            **{name: values.numpy() for name, values in columns.items()},
            "kl_sum": pl.Series(apart, dtype=pl.Float64),
        }
    )


def _checked(rows: list[pl.DataFrame]) -> pl.DataFrame:
    table = pl.concat(rows).sort("sequence")
    broken = table.filter(~pl.col("loss_sum").is_finite())
    if len(broken):
        raise RunError(
            f"the model's loss is not finite on {len(broken)} of {len(table)} sequences, such as"
            f" {broken['sequence'][0]}: load it with --dtype float32, or try a milder rule"
        )
    return table
