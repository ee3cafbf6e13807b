"""What a model can still do, probe by probe, beside its base: in the spirit of LLM-KICK, from the user's own text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from torch import nn

from profiler.evaluation import context_probes, text_probes
from profiler.metrics.divergence import accuracy_difference, mean_of_items
from profiler.metrics.perplexity import Estimate

if TYPE_CHECKING:
    from profiler.corpus import TokenBatch

ENOUGH = 50
"""Items below which a probe says that it has too few."""

Read = list[tuple["TokenBatch", NDArray[np.bool_], NDArray[np.bool_]]]
"""Batches, and which next tokens the model and its base had right (batch, length - 1)."""

TITLES = {
    "copying": "go on with a random span that stands in the context",
    "retrieval": "give the value that stands beside a key in the context",
    "arithmetic": "give the result of a calculation in the text",
    "closed book": "begin a rare word that did not stand in the text before",
    "open book": "begin a rare word that stood in the text before",
}
"""Every probe, in the order in which they are listed, and what it asks."""


@dataclass(frozen=True)
class Probe:
    """One probe of both models.

    Attributes:
        name: see :data:`TITLES`.
        items: tokens that were asked for.
        accuracy: share of them that the model holds for the likeliest; NaN without items.
        base_accuracy: the same of the base.
        difference: accuracy less that of the base, with the interval of the pairs.
        enough: whether there are :data:`ENOUGH` items.
        per_domain: the same for each domain; empty within a domain.
    """

    name: str
    items: int
    accuracy: Estimate
    base_accuracy: Estimate
    difference: Estimate
    enough: bool
    per_domain: dict[str, Probe] = field(repr=False)


def probe(
    model: nn.Module,
    base: nn.Module,
    batches: Callable[[], Iterable[TokenBatch]],
    read: Read,
    *,
    tokenizer: Any = None,
    seed: int = 0,
) -> list[Probe]:
    """All probes of both models.

    Args:
        model: what is measured.
        base: what it is compared with.
        batches: gives the held-out text anew.
        read: which next tokens of that text both had right.
        tokenizer: without it, the probes that need to read the text are empty.
        seed: of the made contexts.
    """
    streams = context_probes.streams_of(batches())
    start = _start(batches())
    between, after = ([], []) if tokenizer is None else (_ids(tokenizer, ": "), _ids(tokenizer, "\n"))
    made = {
        "copying": context_probes.copying(streams, start, seed=seed),
        "retrieval": context_probes.retrieval(streams, start, between=between, after=after, seed=seed),
    }
    found = [summarize(name, context_probes.hits_per_item(model, base, items)) for name, items in made.items()]
    if tokenizer is None:
        return [*found, *(summarize(name, []) for name in ("arithmetic", "closed book", "open book"))]
    pieces, frequent = text_probes.Pieces(tokenizer), text_probes.frequent_tokens(batches())
    asked = {
        "arithmetic": text_probes.results(pieces),
        "closed book": text_probes.rare_words(pieces, frequent, seen=False),
        "open book": text_probes.rare_words(pieces, frequent, seen=True),
    }
    return [*found, *(summarize(name, text_probes.hits_per_sequence(read, one)) for name, one in asked.items())]


def summarize(name: str, rows: Sequence[dict[str, Any]]) -> Probe:
    """A probe from its rows: sequence, domain, items, hits, base_hits."""
    kept = [row for row in rows if row["items"]]
    if not kept:
        nothing = Estimate(float("nan"), float("nan"), float("nan"))
        return Probe(name, 0, nothing, nothing, nothing, False, {})
    table = pl.DataFrame(kept)
    parts = table.partition_by("domain", as_dict=True, maintain_order=True)
    return _summary(name, table, {str(domain): _summary(name, part, {}) for (domain,), part in parts.items()})


def _summary(name: str, table: pl.DataFrame, parts: dict[str, Probe]) -> Probe:
    items, hits, base_hits = (table[column].to_numpy() for column in ("items", "hits", "base_hits"))
    total = int(items.sum())
    return Probe(
        name=name,
        items=total,
        accuracy=mean_of_items(sums=hits, items=items),
        base_accuracy=mean_of_items(sums=base_hits, items=items),
        difference=accuracy_difference(hits=hits, base_hits=base_hits, items=items),
        enough=total >= ENOUGH,
        per_domain=parts,
    )


def _start(batches: Iterable[TokenBatch]) -> list[int]:
    """The special token that every sequence begins with, if there is one."""
    firsts = set()
    for batch in batches:
        for row in range(len(batch.domains)):
            place = int(np.argmax(batch.attention_mask[row]))
            firsts.add(int(batch.input_ids[row, place]) if batch.special[row, place] else -1)
    return [*firsts] if len(firsts) == 1 and -1 not in firsts else []


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
