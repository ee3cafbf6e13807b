"""Similarity of experts: matrices by kind, pairs, redundancy over layers, and how far the kinds agree."""

from __future__ import annotations

import json

import numpy as np
import polars as pl

import store
from app.frames.axes import layer_label, parse_layer, with_label
from profiler.headline.similarity_kinds import BY_NAME, KINDS, SimilarityTables, chance, layer_matrices, layer_tables
from profiler.metrics import similarity
from profiler.metrics.similarity_agreement import clustered_order

SCALES = {"similarity": "as it is", "angular": "as an angle", "shifted": "(s + 1) / 2"}
"""Ways to write a similarity: a cosine, 1 - arccos(s) / pi, or (s + 1) / 2."""


def kinds(run: store.Run) -> pl.DataFrame:
    """One row per kind of similarity: kind, title, level that records it, here = whether the run says something of it,
    part = one matrix of the weights only, missing = the reason that an import gives for lacking it."""
    found: set[str] = set()
    wanted = list(KINDS)
    for key, tables in layer_tables(run):
        found |= {kind.name for kind in wanted if _says_something(kind.read(tables, key))}
        # A layer may lack a kind that others have; a level that was not recorded is not looked for in all of them.
        recorded = [*run.info.levels.split(","), "routing"]
        wanted = [kind for kind in wanted if kind.name not in found and kind.level in recorded]
        if not wanted:
            break
    rows = [
        (kind.name, kind.title, kind.level, kind.name in found, kind.part, run.omissions.get(kind.subject))
        for kind in KINDS
    ]
    return pl.DataFrame(rows, schema=_KINDS, orient="row")


def matrix(run: store.Run, *, label: str, kind: str, order_by: str = "") -> pl.DataFrame:
    """One row per two experts of a layer, both ways round, in clustered order: expert, other, place, other_place,
    similarity, angular, shifted.

    order_by: the kind that makes the order, so that two kinds can stand beside each other; itself if empty. Empty where
    the run says nothing of the kind.
    """
    found = _matrices(run, label)
    if kind not in found:
        return pl.DataFrame(schema=_MATRIX)
    values = found[kind]
    order = clustered_order(similarity=found.get(order_by or kind, values))
    size = len(order)
    place = np.empty(size, np.int64)
    place[order] = np.arange(size)
    shown = values[np.ix_(order, order)].ravel()
    off = ~np.eye(size, dtype=bool).ravel()
    first, second = np.repeat(order, size), np.tile(order, size)
    frame = pl.DataFrame(
        {
            "expert": first,
            "other": second,
            "place": place[first],
            "other_place": place[second],
            "similarity": shown,
            "angular": similarity.angular(shown),
            "shifted": similarity.shifted(shown),
        },
        schema=_MATRIX,
    )
    return frame.filter(pl.Series(off)).fill_nan(None)


def nearest_pairs(run: store.Run, *, label: str, kind: str, count: int = 100) -> pl.DataFrame:
    """The pairs of a layer that one kind finds most alike, with what all kinds say.

    Columns: expert, other, joint_tokens = tokens that used both, and one per kind that the run has.
    """
    found = _matrices(run, label)
    if kind not in found:
        return pl.DataFrame(schema={"expert": pl.Int64, "other": pl.Int64, "joint_tokens": pl.Int64})
    first, second = np.triu_indices(len(found[kind]), 1)
    values = found[kind][first, second]
    order = np.argsort(np.where(np.isfinite(values), -values, np.inf), kind="stable")[:count]
    order = order[np.isfinite(values[order])]
    first, second = first[order], second[order]
    layer, step = parse_layer(label)
    joint = SimilarityTables(run, layer=layer).sums("expert_pair", "selections", (layer, step))
    together = None if joint is None else np.nan_to_num(joint[first, second]).astype(np.int64)
    columns = {name: pl.Series(matrix[first, second]).fill_nan(None) for name, matrix in found.items()}
    frame = pl.DataFrame({"expert": first, "other": second, **columns})
    joined = pl.Series("joint_tokens", together if together is not None else [None] * len(frame), dtype=pl.Int64)
    return frame.insert_column(2, joined)


def redundancy(run: store.Run, *, kind: str = "") -> pl.DataFrame:
    """One row per MoE layer and kind, or of one kind: how alike its experts are.

    Columns: layer, step, label, kind, title; pairs that the kind says something about, mean, p05, p25, p50, p75, p95,
    largest with its two experts; above_50, above_70, above_90 = pairs above these similarities; chance = mean |value|
    of random vectors of the same width, null where no width says it.
    """
    rows = []
    for key, tables in layer_tables(run):
        for name, values in _of_kind(tables, key, kind).items():
            found = similarity.redundancy(similarity=values)
            rows.append(
                (
                    *key,
                    layer_label(*key),
                    name,
                    BY_NAME[name].title,
                    found.pairs,
                    found.mean,
                    *found.quantiles.tolist(),
                    found.largest,
                    found.first,
                    found.second,
                    *found.above.tolist(),
                    chance(tables, name, key),
                )
            )
    return pl.DataFrame(rows, schema=_REDUNDANCY, orient="row")


def agreement(run: store.Run) -> pl.DataFrame:
    """One row per MoE layer and two kinds, from the stored metrics.

    Columns: layer, step, label, first, second; pairs of experts, spearman with low and high = 95 % of what renamed
    experts give, p_value, kendall, r_squared.
    """
    names = {
        "similarity_agreement": "spearman",
        "similarity_kendall": "kendall",
        "similarity_r_squared": "r_squared",
        "similarity_p_value": "p_value",
    }
    parts = [run.metrics(metric).with_columns(pl.lit(name).alias("name")) for metric, name in names.items()]
    frame = pl.concat(parts)
    parsed = [json.loads(text or "{}") for text in frame["parameters"].to_list()]
    frame = frame.with_columns(
        pl.Series("first", [item.get("first") for item in parsed], dtype=pl.String),
        pl.Series("second", [item.get("second") for item in parsed], dtype=pl.String),
    )
    keys = ["layer", "step", "first", "second"]
    band = frame.filter(pl.col("control") == "renamed").select(*keys, "low", "high")
    seen = frame.filter(pl.col("control") == "observed")
    wide = seen.group_by(keys).agg(
        pl.col("at").first().cast(pl.Int64).alias("pairs"),
        *(pl.col("value").filter(pl.col("name") == name).first().alias(name) for name in names.values()),
    )
    rank = {kind.name: place for place, kind in enumerate(KINDS)}
    ordered = wide.join(band, on=keys, how="left").sort(
        "layer", "step", *(pl.col(name).replace_strict(rank, default=len(rank)) for name in ("first", "second"))
    )
    return with_label(ordered).select(_AGREEMENT)


def _of_kind(tables: SimilarityTables, key: tuple[int, int], kind: str) -> dict[str, np.ndarray]:
    """The matrices of one layer: of one kind, or of all for an empty name."""
    if not kind:
        return layer_matrices(tables, key, parts=True)
    values = BY_NAME[kind].read(tables, key)
    return {kind: values} if values is not None and _says_something(values) else {}


def _says_something(values: np.ndarray | None) -> bool:
    return values is not None and bool(np.isfinite(values[~np.eye(len(values), dtype=bool)]).any())


def _matrices(run: store.Run, label: str) -> dict[str, np.ndarray]:
    layer, step = parse_layer(label)
    return layer_matrices(SimilarityTables(run, layer=layer), (layer, step), parts=True)


_KINDS = {"kind": pl.String, "title": pl.String, "level": pl.String, "here": pl.Boolean, "part": pl.Boolean,
          "missing": pl.String}  # fmt: skip
_MATRIX = {"expert": pl.Int64, "other": pl.Int64, "place": pl.Int64, "other_place": pl.Int64,
           "similarity": pl.Float64, "angular": pl.Float64, "shifted": pl.Float64}  # fmt: skip
_QUANTILES = ("p05", "p25", "p50", "p75", "p95")
_REDUNDANCY = {
    "layer": pl.Int32, "step": pl.Int32, "label": pl.String, "kind": pl.String, "title": pl.String, "pairs": pl.Int64,
    "mean": pl.Float64, **dict.fromkeys(_QUANTILES, pl.Float64), "largest": pl.Float64, "expert": pl.Int64,
    "other": pl.Int64, "above_50": pl.Int64, "above_70": pl.Int64, "above_90": pl.Int64, "chance": pl.Float64,
}  # fmt: skip
_AGREEMENT = ["layer", "step", "label", "first", "second", "pairs", "spearman", "low", "high", "p_value", "kendall",
              "r_squared"]  # fmt: skip
