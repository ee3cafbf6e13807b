"""Which sequences to read: by their text, or by how often they use an expert. Every frame has the columns sequence,
domain, tokens, hits, and position: the token to begin with.
"""

from __future__ import annotations

import numpy as np
import polars as pl

import store
from app.frames.expert_trace import layer_info
from profiler.metrics._trace import sequence_runs
from store.text_search import TextSearch, expression, token_spans

EXPERT = {
    "sequence": pl.Int64, "domain": pl.String, "tokens": pl.Int64, "hits": pl.Int64, "share": pl.Float64,
    "weight": pl.Float64, "position": pl.Int64,
}  # fmt: skip
BLOCK = 65_536
"""Tokens of a layer that are in memory at once, in whole sequences."""

MOST = 4_000_000
"""Tokens that are looked through at most."""


def by_expert(run: store.Run, *, label: str, expert: int, domain: str | None = None) -> pl.DataFrame:
    """One row per sequence that uses the expert, those that do so most often first: sequence, domain, tokens, hits =
    tokens that use it, share of its tokens, weight = its largest gate weight there, position of that token.

    Of a run of more than :data:`MOST` tokens, the sequences up to there.

    Raises:
        InputError: there is no such layer or expert.
    """
    layer = layer_info(run, label, expert)
    table = run.traced_sequences.filter(pl.col("tokens").cast(pl.Int64).cum_sum() <= MOST)
    if domain is not None:
        table = table.filter(pl.col("domain") == domain)
    domains = dict(table.select("sequence", "domain").iter_rows())
    numbers = table["sequence"].to_numpy().astype(np.int64)
    ends = np.concatenate([[0], np.cumsum(table["tokens"].to_numpy().astype(np.int64))])
    rows = []
    for part in (numbers[low:high] for low, high in sequence_runs(ends, BLOCK)):
        read = run.layer_selections(
            layer=layer.layer, step=layer.step, first=int(part[0]), last=int(part[-1]), weights=True
        )
        mine = read.ids == expert
        assert read.weights is not None
        weight = (read.weights * mine).sum(axis=1)
        for index, number in enumerate(read.sequences.tolist()):
            inside = slice(int(read.offsets[index]), int(read.offsets[index + 1]))
            hits = int(mine[inside].any(axis=1).sum())
            if hits and number in domains:
                count, best = inside.stop - inside.start, int(np.argmax(weight[inside] + mine[inside].any(axis=1)))
                rows.append((number, domains[number], count, hits, hits / count, float(weight[inside][best]), best))
    return pl.DataFrame(rows, schema=EXPERT, orient="row").sort(["hits", "sequence"], descending=[True, False])


def by_text(run: store.Run, *, wanted: str, regex: bool, domain: str | None = None) -> TextSearch:
    """What :meth:`store.Run.search_text` finds, the sequences with most hits first."""
    found = run.search_text(wanted, regex=regex, domain=domain)
    frame = found.frame.sort(["hits", "sequence"], descending=[True, False])
    return TextSearch(frame, found.searched, found.sequences)


def text_marks(run: store.Run, sequence: int, *, first: int, last: int, wanted: str, regex: bool) -> list[int]:
    """Positions from ``first`` to ``last`` of the tokens that a hit touches, also of hits that begin or end outside."""
    begin = max(first - BESIDE, 0)
    text = run.sequence_text(sequence, first=begin, last=last + BESIDE)
    if text is None:
        return []
    spans = token_spans(text.pieces, expression(wanted, regex=regex))
    found = {begin + at for low, high in spans for at in range(low, high + 1)}
    return sorted(position for position in found if first <= position <= last)


BESIDE = 64
"""Tokens beyond a part in which a hit may begin or end."""
