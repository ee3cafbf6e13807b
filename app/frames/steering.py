"""One layer with a bias on its router's logits: its experts and domains now and then, and the tokens that flip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

import store
from app.frames.axes import layer_label
from app.frames.expert_tokens import AFTER, BEFORE, shown
from app.frames.tokens import decode
from app.frames.what_if import Bias, limit_of
from planner.route import Balanced, balanced
from planner.route.shift import Ids, Logits, Rerouted, rerouted, variation
from planner.simulate.what_if.blocks import Subject

SHOWN = 60
"""Flipped tokens whose text is shown, spread evenly over all of them."""

ROUND = 4
"""Digits behind the point of a bias that a button sets."""

_FLIPS = {
    "label": pl.String, "sequence": pl.Int64, "position": pl.Int64, "domain": pl.String, "before": pl.String,
    "text": pl.String, "after": pl.String, "left": pl.String, "taken": pl.String, "proven": pl.Boolean,
}  # fmt: skip


@dataclass(frozen=True)
class Scored:
    """The tokens of one layer whose router scores are stored.

    Attributes:
        layer: it.
        ids: (tokens, m) experts in descending logit, -1 = none.
        logits: (tokens, m) theirs.
        sequence: (tokens,) number of each token's sequence.
        position: (tokens,) in it.
        domains: of each sequence, by its number.
    """

    layer: store.LayerInfo
    ids: Ids
    logits: Logits
    sequence: NDArray[np.int64]
    position: NDArray[np.int64]
    domains: dict[int, str]

    @property
    def label(self) -> str:
        """The layer's name."""
        return layer_label(self.layer.layer, self.layer.step)


def scored(run: store.Run, *, label: str, domain: str | None = None, whole: bool = False) -> Scored:
    """Read the scores of a layer; without ``whole`` of evenly spread sequences.

    Raises:
        Refused: there are none.
    """
    layer = next(one for one in run.layers if layer_label(one.layer, one.step) == label)
    subject = Subject.of(
        run, scored=True, domain=domain, layers=[layer.layer], limit_tokens=limit_of(run, whole)
    )  # fmt: skip
    read = run.layer_scores(layer=layer.layer, step=layer.step, sequences=subject.sequences["sequence"].to_list())
    lengths = np.diff(read.offsets)
    sequence = np.repeat(read.sequences, lengths)
    position = np.arange(len(sequence)) - np.repeat(read.offsets[:-1], lengths)
    known = read.ids[:, 0] >= 0 if read.ids.shape[1] else np.zeros(len(read.ids), bool)
    domains = dict(run.scored_sequences.select("sequence", "domain").iter_rows())
    return Scored(
        layer, read.ids[known], read.logits[known].astype(np.float64), sequence[known], position[known], domains
    )  # fmt: skip


def experts(found: Scored, bias: Sequence[float]) -> pl.DataFrame:
    """One row per expert: layer, step, label, expert, before and after (tokens), before_share, after_share of the
    tokens, change, bias."""
    then = _rerouted(found, bias)
    size, tokens = found.layer.num_experts, max(len(found.ids), 1)
    before, after = (
        np.bincount(ids[ids >= 0], minlength=size).astype(np.int64) for ids in (then.before, then.after)
    )  # fmt: skip
    frame = pl.DataFrame({"expert": np.arange(size), "before": before, "after": after, "bias": np.asarray(bias, float)})
    where = (pl.lit(found.layer.layer).alias("layer"), pl.lit(found.layer.step).alias("step"))
    return frame.select(
        *where, pl.lit(found.label).alias("label"), pl.all(), (pl.col("before") / tokens).alias("before_share"),
        (pl.col("after") / tokens).alias("after_share"),
        ((pl.col("after") - pl.col("before")) / tokens).alias("change"),
    )  # fmt: skip


def domains(found: Scored, bias: Sequence[float]) -> pl.DataFrame:
    """One row per domain, and "all": domain, tokens, changed_tokens and proven (shares), before_cv, load_cv."""
    then, size = _rerouted(found, bias), found.layer.num_experts
    named = np.array([found.domains[number] for number in found.sequence.tolist()], dtype=object)
    rows = []
    for name in ["all", *sorted(set(named.tolist()))]:
        mine = np.ones(len(named), bool) if name == "all" else named == name
        spreads = [
            variation(np.bincount(ids[mine][ids[mine] >= 0], minlength=size)) for ids in (then.before, then.after)
        ]
        share = (float(values[mine].mean()) if mine.any() else None for values in (then.changed, then.proven))
        rows.append((name, int(mine.sum()), *share, *spreads))
    names = ["domain", "tokens", "changed_tokens", "proven", "before_cv", "load_cv"]
    return pl.DataFrame(rows, schema=names, orient="row")


def flips(run: store.Run, found: Scored, bias: Sequence[float]) -> pl.DataFrame:
    """Some tokens that get other experts, in their text: label, sequence, position, domain, before, text, after, the
    experts that are left and taken, and whether the stored logits prove it. Text is empty where the run keeps none."""
    then = _rerouted(found, bias)
    at = np.flatnonzero(then.changed)
    chosen = at[np.unique(np.linspace(0, len(at) - 1, min(SHOWN, len(at))).astype(np.int64))] if len(at) else at
    rows = []
    for token in chosen.tolist():
        sequence, position = int(found.sequence[token]), int(found.position[token])
        before, after = (
            {expert for expert in ids[token].tolist() if expert >= 0} for ids in (then.before, then.after)
        )  # fmt: skip
        left, taken = (", ".join(map(str, sorted(part))) for part in (before - after, after - before))
        rows.append(
            (
                found.label, sequence, position, found.domains[sequence], *_context(run, sequence, position), left,
                taken, bool(then.proven[token]),
            )
        )  # fmt: skip
    return pl.DataFrame(rows, schema=_FLIPS, orient="row")


def even(run: store.Run, *, label: str) -> Balanced:
    """Biases that even out a layer's load, fitted on one half of the text and judged on the other.

    Raises:
        PlanError: as :func:`planner.route.balanced`.
    """
    layer = next(one for one in run.layers if layer_label(one.layer, one.step) == label)
    return balanced(run, layer)


def away(found: Scored) -> float:
    """A bias that takes an expert behind all others that a token stores: the widest span of stored logits, and more."""
    stored = np.where(found.ids >= 0, found.logits, np.nan)
    spans = np.nanmax(stored, -1) - np.nanmin(stored, -1) if len(stored) else np.zeros(1)
    return -round(float(spans.max()) + 10.0**-ROUND, ROUND)


def step_of(found: Scored) -> float:
    """Half of the typical distance between the last expert taken and the next: a push that moves some tokens."""
    k = found.layer.top_k
    if found.ids.shape[1] <= k or not len(found.ids):
        return 0.1
    margins = found.logits[:, k - 1] - found.logits[:, k]
    known = margins[np.isfinite(margins)]
    return max(float(f"{np.median(known) / 2:.1g}"), 10.0**-ROUND) if len(known) else 0.1


def as_key(biases: dict[str, tuple[float, ...]], run: store.Run) -> Bias:
    """The layers that are steered, as :func:`app.frames.what_if.found` takes them."""
    keys = {layer_label(one.layer, one.step): (one.layer, one.step) for one in run.layers}
    return tuple((keys[label], row) for label, row in sorted(biases.items()) if label in keys and any(row))


def _rerouted(found: Scored, bias: Sequence[float]) -> Rerouted:
    return rerouted(found.ids, found.logits, np.asarray(bias, np.float64), top_k=found.layer.top_k)


def _context(run: store.Run, sequence: int, position: int) -> tuple[str, str, str]:
    """The text before a token, its own, and the text after it."""
    first = max(0, position - BEFORE)
    text = run.sequence_text(sequence, first=first, last=position + AFTER)
    if text is None or len(text.pieces) <= position - first:
        return "", "", ""
    at = position - first
    before, after = (
        "".join(decode(part)).replace("\n", "⏎").replace("\t", "⇥")
        for part in (text.pieces[:at], text.pieces[at + 1 :])
    )
    return before, shown(text.pieces[at]), after
