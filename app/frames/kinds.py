"""Kinds of experts: zero, copying and constant ones beside those with a network, by layer, domain and token."""

from __future__ import annotations

import string
import unicodedata
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

import store
from app.frames.axes import layer_labels, select, with_label
from app.frames.expert_tokens import shown
from app.frames.stretches import stretches
from profiler.metrics import expert_kinds as formulas
from profiler.metrics.expert_kinds import KINDS

WORDS = {"routed": "network", "zero": "zero", "copy": "copy", "constant": "constant"}
"""Kinds as pages name them."""

CLASSES = ("special", "whitespace", "digits", "punctuation", "word", "fragment", "other")
"""What a token is: a special one of the tokenizer; blanks; digits; punctuation and symbols; letters that begin a word
(behind a space), letters that go on; a part of a character, or a mixture."""

STRETCHES = 4
"""Stretches of the trace that are read for tokens: all layers of each are."""

LEAST = 20
"""Occurrences from which a token id stands in the list of tokens."""


def has_kinds(run: store.Run) -> bool:
    """Whether an expert that can be selected computes nothing."""
    return bool(run.table("expert").filter(pl.col("kind").is_in(KINDS[1:])).height)


def shares(run: store.Run, *, domain: str | None = None, phase: str | None = None) -> pl.DataFrame:
    """One row per MoE layer and kind that it has.

    Columns: layer, step, label, kind; experts of the kind; selections; share of the layer's selections; even = the
    kind's share of the experts; computed = experts with a network per token; tokens.
    """
    keys = ["layer", "step"]
    kinds = _kinds(run)
    load = select(run.table("expert_load"), domain=domain, phase=phase).filter(pl.col("kind") == "routed")
    load = load.group_by(*keys, "expert").agg(pl.col("tokens").sum())
    every = kinds.join(load, on=[*keys, "expert"], how="left").with_columns(pl.col("tokens").fill_null(0))
    counted = every.group_by(*keys, "kind").agg(
        pl.len().cast(pl.Int64).alias("experts"), pl.col("tokens").sum().alias("selections")
    )
    routed = select(run.table("router_load"), domain=domain, phase=phase).group_by(keys).agg(pl.col("tokens").sum())
    both = counted.join(routed, on=keys, how="left").filter(pl.col("tokens") > 0)
    total = pl.col("selections").sum().over(keys)
    computed = pl.col("selections").filter(pl.col("kind") == "routed").sum().over(keys) / pl.col("tokens")
    order = pl.col("kind").replace_strict(KINDS, range(len(KINDS)), return_dtype=pl.Int64)
    found = with_label(both).with_columns(
        pl.when(total > 0).then(pl.col("selections") / total).alias("share"),
        (pl.col("experts") / pl.col("experts").sum().over(keys)).alias("even"),
        computed.alias("computed"),
    )
    columns = ["layer", "step", "label", "kind", "experts", "selections", "share", "even", "computed", "tokens"]
    return found.sort("layer", "step", order).select(columns)


@dataclass(frozen=True)
class KindTokens:
    """What was counted of kinds by token id: a part of a long trace.

    classes: one row per MoE layer ("all": together), class of tokens and kind: label, token_class, kind, selections,
    share, computed = experts with a network per token and layer, tokens. tokens: one row per token id that is frequent
    enough: token_id, text, token_class, occurrences, computed, and one column per kind with its share.
    """

    classes: pl.DataFrame
    tokens: pl.DataFrame


def by_token(run: store.Run) -> KindTokens:
    """Kinds by class of tokens and by token id; empty where the run keeps no text or no trace."""
    labels = layer_labels(run)
    if not run.has_trace or not run.has_tokens or not labels:
        return KindTokens(pl.DataFrame(schema=_CLASSES), pl.DataFrame(schema=_TOKENS))
    vocabulary = _vocabulary(run)
    known, group_of = vocabulary["token_id"].to_numpy(), vocabulary["class"].to_numpy()
    of_layer = dict(iter(_kinds(run).group_by("layer", "step", maintain_order=True)))
    classes = np.zeros((len(labels), len(CLASSES), len(KINDS)), np.int64)
    ids_kinds = np.zeros((len(known), len(KINDS)), np.int64)
    occurrences, class_tokens = np.zeros(len(known), np.int64), np.zeros(len(CLASSES), np.int64)
    for one in stretches(run, labels, most=STRETCHES):
        first, last = int(one.sequences[0]), int(one.sequences[-1])
        text = run.token_ids(first=first, last=last).ids
        place = np.searchsorted(known, text)
        there = (place < len(known)) & (known[np.minimum(place, len(known) - 1)] == text)
        group = np.where(there, group_of[np.minimum(place, len(known) - 1)], -1)
        place = np.where(there, place, -1)
        occurrences += np.bincount(place[there], minlength=len(known))
        class_tokens += np.bincount(group[there], minlength=len(CLASSES))
        for axis, ids in enumerate(one.layers):
            info = run.layers[axis]
            kinds = formulas.kind_index(kinds=of_layer[info.layer, info.step]["kind"].to_list())
            classes[axis] += formulas.kind_counts(ids=ids, kinds=kinds, group=group, num_groups=len(CLASSES))
            ids_kinds += formulas.kind_counts(ids=ids, kinds=kinds, group=place, num_groups=len(known))
    return KindTokens(
        _class_frame(labels, classes, class_tokens), _token_frame(vocabulary, ids_kinds, occurrences, len(labels))
    )


def token_class(piece: bytes, special: bool) -> str:
    """One of :data:`CLASSES` for the bytes of a token."""
    if special:
        return "special"
    try:
        text = piece.decode()
    except UnicodeDecodeError:
        return "other"
    inner = text.strip()
    if not inner:
        return "whitespace" if text else "other"
    if all(letter.isdigit() for letter in inner):
        return "digits"
    if all(letter in string.punctuation or unicodedata.category(letter)[0] in "PS" for letter in inner):
        return "punctuation"
    if all(unicodedata.category(letter)[0] in "LM" for letter in inner):
        return "word" if text[0].isspace() else "fragment"
    return "other"


def _kinds(run: store.Run) -> pl.DataFrame:
    """layer, step, expert, kind of every expert that can be selected; without a word on it, it has a network."""
    grid = pl.DataFrame(
        [(one.layer, one.step, expert) for one in run.layers for expert in range(one.num_experts)],
        schema={"layer": pl.Int32, "step": pl.Int32, "expert": pl.Int32},
        orient="row",
    )
    known = run.table("expert").select("layer", "step", "expert", "kind")
    both = grid.join(known, on=["layer", "step", "expert"], how="left", maintain_order="left")
    kind = pl.col("kind")
    return both.with_columns(pl.when(kind.is_in(KINDS)).then(kind).otherwise(pl.lit("routed")).alias("kind"))


def _vocabulary(run: store.Run) -> pl.DataFrame:
    """token_id (ascending), bytes, class = place in :data:`CLASSES`."""
    chunks = run.table("sequence_token").select("token_ids", "special")
    flat = chunks.drop_nulls("special").explode("token_ids", "special")
    special = set(flat.filter(pl.col("special"))["token_ids"].unique().to_list())
    table = run.table("vocabulary").sort("token_id")
    names = [token_class(piece or b"", token in special) for token, piece in table.iter_rows()]
    return table.with_columns(
        pl.col("token_id").cast(pl.Int64), pl.Series("class", [CLASSES.index(name) for name in names], dtype=pl.Int64)
    )


def _class_frame(labels: list[str], counts: NDArray[np.int64], tokens: NDArray[np.int64]) -> pl.DataFrame:
    rows = []
    for label, part, layers in (
        *zip(labels, counts, [1] * len(labels), strict=True),
        ("all", counts.sum(axis=0), len(labels)),
    ):
        share = formulas.kind_share(counts=part)
        computed = formulas.computed_experts(counts=part, tokens=tokens * layers)
        used = part.sum(axis=1)
        rows += [
            (label, CLASSES[one], KINDS[kind], int(part[one, kind]), float(share[one, kind]), float(computed[one]),
             int(tokens[one]))
            for one in np.flatnonzero(used)
            for kind in np.flatnonzero(counts.sum(axis=(0, 1)))
        ]  # fmt: skip
    return pl.DataFrame(rows, schema=_CLASSES, orient="row")


def _token_frame(
    vocabulary: pl.DataFrame, counts: NDArray[np.int64], occurrences: NDArray[np.int64], layers: int
) -> pl.DataFrame:
    kept = np.flatnonzero(occurrences >= LEAST)
    share = formulas.kind_share(counts=counts[kept])
    computed = formulas.computed_experts(counts=counts[kept], tokens=occurrences[kept] * layers)
    part = vocabulary[kept.tolist()]
    frame = pl.DataFrame(
        {
            "token_id": part["token_id"],
            "text": [shown(piece) for piece in part["bytes"]],
            "token_class": [CLASSES[place] for place in part["class"]],
            "occurrences": occurrences[kept],
            "computed": computed,
            **{kind: share[:, at] for at, kind in enumerate(KINDS)},
        },
        schema=_TOKENS,
    )
    return frame.sort("computed", "occurrences", descending=[False, True])


_CLASSES = {
    "label": pl.String, "token_class": pl.String, "kind": pl.String, "selections": pl.Int64, "share": pl.Float64,
    "computed": pl.Float64, "tokens": pl.Int64,
}  # fmt: skip
_TOKENS = {
    "token_id": pl.Int64, "text": pl.String, "token_class": pl.String, "occurrences": pl.Int64,
    "computed": pl.Float64, **dict.fromkeys(KINDS, pl.Float64),
}  # fmt: skip
