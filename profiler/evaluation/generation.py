"""Greedy answers of two models to the same beginnings: repetition, variety, entropy, and where they part.

Perplexity on given text hides what happens when a model goes on from its own words. Both models continue the first
tokens of held-out sequences; measures are sums per prompt, so that figures have intervals and differences are paired.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moescope.errors import ModelError
from profiler import evaluate
from profiler.evaluation.distribution import log_softmax
from profiler.metrics import generated_text
from profiler.metrics.divergence import mean_of_items
from profiler.metrics.perplexity import Estimate
from profiler.running import evaluating, input_device

if TYPE_CHECKING:
    from profiler.corpus import TokenBatch

PROMPT_TOKENS = 32
NEW_TOKENS = 64
PROMPTS = 8
"""Prompts per domain."""

BATCH = 8

_MEASURES = ("repeated_4grams", "longest_loop", "distinct_1", "distinct_2", "entropy", "base_loss", "length")
"""Of a text by itself: for both models and their paired difference."""


@dataclass(frozen=True)
class Prompts:
    """The beginnings that are continued, all of the same length.

    Attributes:
        ids: (prompts, length).
        domains: (prompts,) whose text each is.
        left_out: domains without a sequence that is long enough.
    """

    ids: NDArray[np.int64]
    domains: list[str]
    left_out: list[str]


@dataclass(frozen=True)
class Measure:
    """One measure of both models' texts."""

    model: Estimate
    base: Estimate
    difference: Estimate


@dataclass(frozen=True)
class Generations:
    """What came of it, over all prompts and per domain.

    Attributes:
        measures: repeated_4grams, longest_loop (tokens), distinct_1, distinct_2, entropy (nats), base_loss (nats per
            token of the base on the text; exp of it is a perplexity), length (tokens).
        common: tokens that both texts begin with alike, mean over prompts.
        identical: share of prompts that both continue alike to the end.
        prompts: how many.
        per_domain: the same for each domain; empty within a domain.
        texts: one row per prompt and model: prompt, domain, who (model | base), tokens, and its measures.
    """

    measures: dict[str, Measure]
    common: Estimate
    identical: Estimate
    prompts: int
    per_domain: dict[str, Generations] = field(repr=False)
    texts: pl.DataFrame = field(repr=False)


def choose_prompts(batches: Iterable[TokenBatch], *, length: int = PROMPT_TOKENS, per_domain: int = PROMPTS) -> Prompts:
    """The first tokens of the first sequences of each domain that have more than that."""
    found: dict[str, list[tuple[int, NDArray[np.int64]]]] = {}
    for batch in batches:
        for row, domain in enumerate(batch.domains):
            ids = batch.input_ids[row, batch.attention_mask[row] == 1]
            entries = found.setdefault(domain, [])
            if len(ids) > length:
                entries.append((int(batch.sequences[row]), ids[:length]))
    chosen = [(domain, ids) for domain, entries in found.items() for _, ids in _first(entries, per_domain)]
    ids = np.stack([one for _, one in chosen]) if chosen else np.zeros((0, length), np.int64)
    return Prompts(ids, [domain for domain, _ in chosen], [domain for domain, entries in found.items() if not entries])


def compare_generations(
    model: nn.Module,
    base: nn.Module,
    prompts: Prompts,
    *,
    new_tokens: int = NEW_TOKENS,
    progress: Callable[[float], None] | None = None,
) -> Generations:
    """Let both models continue the prompts greedily, and measure their texts.

    Args:
        model: what is measured.
        base: what it is compared with; it also reads the model's texts.
        prompts: see :func:`choose_prompts`.
        new_tokens: longest continuation.
        progress: told which share is done.

    Raises:
        ModelError: a model without ``generate``.
    """
    texts: dict[str, list[list[int]]] = {}
    rows: dict[str, list[dict[str, Any]]] = {}
    for place, (who, one) in enumerate((("base", base), ("model", model))):
        texts[who], rows[who] = [], []
        for start in range(0, len(prompts.ids), BATCH):
            ids = prompts.ids[start : start + BATCH]
            texts[who] += generate(one, ids, new_tokens)
            rows[who] += _readings(one, base, ids, texts[who][start:])
            if progress is not None:
                progress((place + min(1.0, (start + BATCH) / len(prompts.ids))) / 2)
    frames = [_frame(prompts, texts[who], rows[who], who) for who in ("model", "base")]
    common = [generated_text.first_difference(*pair) for pair in zip(texts["model"], texts["base"], strict=True)]
    same = [one == other for one, other in zip(texts["model"], texts["base"], strict=True)]
    table = pl.concat(frames)
    pairs = frames[0].join(frames[1], on=["prompt", "domain"], suffix="_base")
    pairs = pairs.with_columns(common=pl.Series(common), identical=pl.Series(same).cast(pl.Int64))
    parts = {domain: _summary(part, {}, table) for (domain,), part in _by_domain(pairs)}
    return _summary(pairs, parts, table)


def generate(model: Any, prompts: NDArray[np.int64], new_tokens: int) -> list[list[int]]:
    """The greedy continuation of each prompt (prompts, length), up to and with its end token.

    What the checkpoint suggests for sampling, penalties and the like is overruled.

    Raises:
        ModelError: a model without ``generate``.
    """
    if not getattr(model, "can_generate", lambda: False)():
        raise ModelError(f"{type(model).__name__} has no language-model head to generate with: use --skip generation")
    ids = torch.from_numpy(prompts).to(input_device(model))
    ends = model.generation_config.eos_token_id
    stops = {ends} if isinstance(ends, int) else set(ends or ())
    with evaluating(model), torch.no_grad():
        found: Tensor = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            pad_token_id=min(stops, default=0),
            return_dict_in_generate=False,
            **GREEDY,
        )
    return [_until(row, stops) for row in found[:, ids.shape[1] :].tolist()]


GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "use_cache": True,
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}


def _until(tokens: list[int], stops: set[int]) -> list[int]:
    end = next((place + 1 for place, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[:end]


def _readings(model: Any, base: Any, prompts: NDArray[np.int64], texts: list[list[int]]) -> list[dict[str, Any]]:
    """Entropy of the model along its own texts (sum, nats), and the base's loss on them (sum, nats)."""
    longest = max(map(len, texts), default=0)
    ids = np.zeros((len(texts), prompts.shape[1] + longest), np.int64)
    mask = np.zeros_like(ids)
    for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        whole = [*prompt.tolist(), *text]
        ids[row, : len(whole)], mask[row, : len(whole)] = whole, 1
    new = np.zeros_like(mask)
    new[:, prompts.shape[1] :] = mask[:, prompts.shape[1] :]
    entropies = _over_new(model, ids, mask, new, lambda logs, chosen: -(logs.exp() * _finite(logs)).sum(-1))
    losses = _over_new(base, ids, mask, new, lambda logs, chosen: -logs.gather(-1, chosen[..., None])[..., 0])
    return [{"entropy_sum": one, "base_loss_sum": two} for one, two in zip(entropies, losses, strict=True)]


@torch.no_grad()
def _over_new(
    model: Any,
    ids: NDArray[np.int64],
    mask: NDArray[np.int64],
    new: NDArray[np.int64],
    measure: Callable[[Tensor, Tensor], Tensor],
) -> list[float]:
    """(rows,) sums over the new tokens of a measure of (log-probabilities, the token that came)."""
    device = input_device(model)
    tokens, counted = torch.from_numpy(ids).to(device), torch.from_numpy(new[:, 1:] == 1)
    total = torch.zeros(len(ids), dtype=torch.float64)
    with evaluating(model):
        for start, part in evaluate.logit_chunks(model, tokens, torch.from_numpy(mask).to(device)):
            stop = min(start + part.shape[1], ids.shape[1] - 1)
            if stop > start:
                logs = log_softmax(part[:, : stop - start])
                values = measure(logs, tokens[:, start + 1 : stop + 1].to(logs.device)).double().cpu()
                total += torch.where(counted[:, start:stop], values, 0.0).sum(1)
    return [float(value) for value in total]


def _finite(logs: Tensor) -> Tensor:
    """Log-probabilities with 0 in place of -infinity, whose probability is 0."""
    return torch.where(logs == -torch.inf, 0.0, logs)


def _frame(prompts: Prompts, texts: list[list[int]], readings: list[dict[str, Any]], who: str) -> pl.DataFrame:
    rows = [
        {
            "prompt": prompt,
            "domain": prompts.domains[prompt],
            "who": who,
            "tokens": text,
            "length": len(text),
            "repeated_4grams": generated_text.repeated_ngrams(text, 4),
            "longest_loop": generated_text.longest_loop(text),
            "distinct_1": generated_text.distinct_ngrams(text, 1),
            "distinct_2": generated_text.distinct_ngrams(text, 2),
            "entropy": reading["entropy_sum"] / len(text),
            "base_loss": reading["base_loss_sum"] / len(text),
        }
        for prompt, (text, reading) in enumerate(zip(texts, readings, strict=True))
    ]
    return pl.DataFrame(rows, schema_overrides={"tokens": pl.List(pl.Int64)})


def _summary(pairs: pl.DataFrame, parts: dict[str, Generations], texts: pl.DataFrame) -> Generations:
    chosen = texts.filter(pl.col("prompt").is_in(pairs["prompt"].to_list()))
    measures = {name: _measure(pairs, name) for name in _MEASURES}
    return Generations(
        measures=measures,
        common=_mean(pairs["common"]),
        identical=_mean(pairs["identical"]),
        prompts=len(pairs),
        per_domain=parts,
        texts=chosen,
    )


def _measure(pairs: pl.DataFrame, name: str) -> Measure:
    return Measure(_mean(pairs[name]), _mean(pairs[f"{name}_base"]), _mean(pairs[name] - pairs[f"{name}_base"]))


def _mean(values: pl.Series) -> Estimate:
    """Mean over prompts; texts that are too short for the measure are left out."""
    known = values.cast(pl.Float64).fill_nan(None).drop_nulls().to_numpy()
    if not len(known):
        return Estimate(float("nan"), float("nan"), float("nan"))
    return mean_of_items(sums=known, items=np.ones(len(known)))


def _by_domain(pairs: pl.DataFrame) -> Any:
    return pairs.partition_by("domain", as_dict=True, maintain_order=True).items()


def _first(entries: Sequence[tuple[int, Any]], count: int) -> list[tuple[int, Any]]:
    return sorted(entries, key=lambda entry: entry[0])[:count]
