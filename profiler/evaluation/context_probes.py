"""Probes made of the text: copying a span that stands in the context, and looking a value up by its key.

Both use only tokens, so that they work with any tokenizer and language. Their answers cannot be known from training:
whoever has them right has read them in the context.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from profiler import evaluate
from profiler.running import evaluating, input_device

if TYPE_CHECKING:
    from profiler.corpus import TokenBatch

ITEMS = 16
"""Sequences of each probe and domain."""

SPAN = 16
GIVEN = 4
"""Tokens of the repeated span that are shown before the model is asked to go on."""

GAP = 32
PAIRS, KEY, VALUE = 6, 3, 3
BATCH = 8


@dataclass(frozen=True)
class Item:
    """One sequence with a question in it.

    Attributes:
        ids: (tokens,).
        asked: (tokens,) bool, the tokens to be predicted.
        domain: whose text it is made of.
    """

    ids: NDArray[np.int64]
    asked: NDArray[np.bool_]
    domain: str


def copying(streams: dict[str, NDArray[np.int64]], start: list[int], *, seed: int = 0) -> list[Item]:
    """A span of tokens drawn at random from the domain, running text, and the span again: its end is asked for.

    The span's tokens are drawn one by one, so that no phrase helps; the first :data:`GIVEN` of the repetition are
    shown. Source: induction (Olsson et al., arXiv 2209.11895).

    Args:
        streams: domain -> (tokens,) its text.
        start: ids that sequences begin with, such as BOS.
        seed: of the draws.
    """
    generator = np.random.default_rng(seed)
    items = []
    for domain, text in streams.items():
        if len(text) < GAP + SPAN:
            continue
        for _ in range(ITEMS):
            span = generator.choice(text, SPAN)
            place = int(generator.integers(0, len(text) - GAP + 1))
            ids = np.concatenate([start, span, text[place : place + GAP], span]).astype(np.int64)
            items.append(Item(ids, _last(len(ids), SPAN - GIVEN), domain))
    return items


def retrieval(
    streams: dict[str, NDArray[np.int64]],
    start: list[int],
    *,
    between: list[int],
    after: list[int],
    seed: int = 0,
) -> list[Item]:
    """Lines of keys and values, both pieces of the text, then one of the keys again: its value is asked for.

    Args:
        streams: domain -> (tokens,) its text.
        start: ids that sequences begin with.
        between: ids between key and value, such as those of ``": "``.
        after: ids that end a line.
        seed: of the draws.
    """
    generator = np.random.default_rng(seed)
    items = []
    for domain, text in streams.items():
        for _ in range(ITEMS):
            keys, values = (_pieces(text, length, generator) for length in (KEY, VALUE))
            if keys is None or values is None:
                break
            lines = [[*key, *between, *value, *after] for key, value in zip(keys, values, strict=True)]
            chosen = int(generator.integers(0, PAIRS))
            ids = np.array([*start, *sum(lines, []), *keys[chosen], *between, *values[chosen]], np.int64)
            items.append(Item(ids, _last(len(ids), VALUE), domain))
    return items


def streams_of(batches: Iterable[TokenBatch]) -> dict[str, NDArray[np.int64]]:
    """Domain -> (tokens,) its text in order, special tokens and padding left out."""
    found: dict[str, list[tuple[int, NDArray[np.int64]]]] = {}
    for batch in batches:
        for row, domain in enumerate(batch.domains):
            keep = (batch.attention_mask[row] == 1) & ~batch.special[row]
            found.setdefault(domain, []).append((int(batch.sequences[row]), batch.input_ids[row, keep]))
    return {
        domain: np.concatenate([ids for _, ids in sorted(parts, key=lambda part: part[0])])
        for domain, parts in found.items()
    }


def hits_per_item(model: nn.Module, base: nn.Module, items: list[Item]) -> list[dict[str, Any]]:
    """One row per item: sequence, domain, items = tokens that were asked for, hits, base_hits."""
    right, base_right = _right(model, items), _right(base, items)
    return [
        {
            "sequence": number,
            "domain": item.domain,
            "items": int(item.asked.sum()),
            "hits": right[number],
            "base_hits": base_right[number],
        }
        for number, item in enumerate(items)
    ]


@torch.no_grad()
def _right(model: nn.Module, items: list[Item]) -> list[int]:
    """(items,) of the asked tokens, how many the model holds for the likeliest."""
    device = input_device(model)
    counts: list[int] = []
    with evaluating(model):
        for begin in range(0, len(items), BATCH):
            part = items[begin : begin + BATCH]
            longest = max(len(item.ids) for item in part)
            ids, mask, asked = (np.zeros((len(part), longest), np.int64) for _ in range(3))
            for row, item in enumerate(part):
                size = len(item.ids)
                ids[row, :size], mask[row, :size], asked[row, :size] = item.ids, 1, item.asked
            tokens = torch.from_numpy(ids).to(device)
            found = torch.zeros_like(tokens)
            for start, logits in evaluate.logit_chunks(model, tokens, torch.from_numpy(mask).to(device)):
                found[:, start : start + logits.shape[1]] = logits.argmax(-1).to(device)
            hit = (found[:, :-1] == tokens[:, 1:]).cpu().numpy() & (asked[:, 1:] == 1)
            counts += hit.sum(1).tolist()
    return counts


def _pieces(text: NDArray[np.int64], length: int, generator: np.random.Generator) -> list[list[int]] | None:
    """As many different pieces of the text as there are pairs; None where it has too few."""
    if len(text) < length:
        return None
    found: dict[tuple[int, ...], None] = {}
    for place in generator.integers(0, len(text) - length + 1, 50 * PAIRS):
        found.setdefault(tuple(int(token) for token in text[place : place + length]))
        if len(found) == PAIRS:
            return [list(piece) for piece in found]
    return None


def _last(length: int, count: int) -> NDArray[np.bool_]:
    return np.arange(length) >= length - count
