"""The kinds of similarity between experts, and their matrices from the tables of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl
from numpy.typing import NDArray

import store
from profiler.metrics import similarity

Matrix = NDArray[np.float64]
Key = tuple[int, int]
"""(layer, step)."""


@dataclass(frozen=True)
class Kind:
    """One way to say how alike two experts are.

    Attributes:
        metric: its name in the registry of metrics.
        title: for people.
        level: the level of collection that records it.
        subject: the word in table ``omission`` under which an imported run says why it lacks it.
        part: similarity of one matrix of the weights only; pages offer it, agreement is computed without it.
        read: the matrix of one layer; None where the run has nothing.
    """

    name: str
    metric: str
    title: str
    level: str
    subject: str
    read: Callable[[SimilarityTables, Key], Matrix | None]
    part: bool = False


class SimilarityTables:
    """The tables of a run that hold sums over pairs of experts; domains and phases are added up on reading.

    Args:
        run: the run.
        layer: read this decoder layer only; None = all.
    """

    def __init__(self, run: store.Run, *, layer: int | None = None) -> None:
        self.run, self._layer = run, layer
        self.experts = {(layer.layer, layer.step): layer.num_experts for layer in run.layers}

    def sums(self, table: str, column: str, key: Key) -> Matrix | None:
        """(experts, width of the lists) of one layer; None where no row has the column."""
        rows = self._rows(table, column).get(key)
        rows = rows.drop_nulls(column) if rows is not None else None
        return _stacked(rows, column, self.experts[key]) if rows is not None and len(rows) else None

    def weights(self, matrix: str, column: str, key: Key) -> Matrix | None:
        """(experts, experts) of ``expert_weight_similarity``; None where the layer was not compared."""
        rows = self._rows("expert_weight_similarity", column).get(key)
        rows = rows.filter(pl.col("matrix") == matrix) if rows is not None else None
        return _stacked(rows, column, self.experts[key]) if rows is not None and len(rows) else None

    def compared(self, key: Key) -> set[str]:
        """The matrices (gate, up, down) whose weights were compared in a layer."""
        rows = self._rows("expert_weight_similarity").get(key)
        return set() if rows is None else set(rows["matrix"]) - {"all"}

    def count(self, table: str, column: str, key: Key) -> int:
        """Sum of a column that is the same for all experts: tokens of the first one there."""
        rows = self._rows(table, column).get(key)
        if rows is None:
            return 0
        first = rows.filter(pl.col("expert") == rows["expert"].min()) if "expert" in rows.columns else rows
        return int(first[column].fill_null(0).sum())

    def logit_sums(self, key: Key) -> Matrix:
        """(experts,) sums of the router logits of one layer."""
        rows = self._rows("expert_load", "logit_sum").get(key)
        total = np.zeros(self.experts[key])
        if rows is not None:
            rows = rows.filter(pl.col("kind") == "routed").drop_nulls("logit_sum")
            np.add.at(total, rows["expert"].to_numpy(), rows["logit_sum"].to_numpy())
        return total

    @cached_property
    def _tables(self) -> dict[tuple[str, ...], dict[Key, pl.DataFrame]]:
        return {}

    def _rows(self, table: str, *columns: str) -> dict[Key, pl.DataFrame]:
        """Rows by layer; only the wanted columns are read, for each list is as long as there are experts."""
        if (table, *columns) not in self._tables:
            read = self.run.table(table, layer=self._layer, columns=columns)
            parts = read.partition_by("layer", "step", as_dict=True)
            self._tables[table, *columns] = {(int(layer), int(step)): rows for (layer, step), rows in parts.items()}
        return self._tables[table, *columns]


def matrices(run: store.Run, *, parts: bool = False) -> Iterator[tuple[Key, dict[str, Matrix]]]:
    """((layer, step), matrices by kind) of every MoE layer; kinds that the run says nothing about are left out.

    Args:
        parts: also gate, up and down by themselves.
    """
    for key, tables in layer_tables(run):
        yield key, layer_matrices(tables, key, parts=parts)


def layer_tables(run: store.Run) -> Iterator[tuple[Key, SimilarityTables]]:
    """((layer, step), its tables) of every MoE layer: one layer after the other, for all together may be a GiB."""
    for layer in run.layers:
        yield (layer.layer, layer.step), SimilarityTables(run, layer=layer.layer)


def layer_matrices(tables: SimilarityTables, key: Key, *, parts: bool = False) -> dict[str, Matrix]:
    """The matrices of one layer by kind, each (experts, experts)."""
    found = {}
    for kind in KINDS:
        matrix = kind.read(tables, key) if parts or not kind.part else None
        if matrix is not None and np.isfinite(matrix[~np.eye(len(matrix), dtype=bool)]).any():
            found[kind.name] = matrix
    return found


def chance(tables: SimilarityTables, kind: str, key: Key) -> float | None:
    """Mean |similarity| of random vectors of the width that a kind compares; None where no width says it.

    Neurons that were matched are the best of many, and tokens are not independent of each other, so matched weights and
    everything that is summed over tokens have no such figure.
    """
    if kind == "router_row":
        width = _width(tables.sums("router_row", "weights", key))
    elif not kind.startswith("weight"):
        return None
    else:
        hidden, compared = _width(tables.sums("expert_similarity", "output_sum", key)), tables.compared(key)
        neurons = next(layer.expert_width for layer in tables.run.layers if (layer.layer, layer.step) == key) or 0
        widths = {"weight": len(compared) * neurons * hidden, "weight_mean": len(compared) * hidden}
        width = widths.get(kind, neurons * hidden if kind.removeprefix("weight_") in compared else 0)
    return similarity.random_absolute_cosine(width) if width else None


def _width(matrix: Matrix | None) -> int:
    return matrix.shape[1] if matrix is not None else 0


def _stacked(rows: pl.DataFrame, column: str, experts: int) -> Matrix:
    """(experts, width) the lists of a column, added up by expert; NaN for an expert without a row."""
    width = int(rows[column].list.len().max() or 0)  # type: ignore[arg-type]
    values = rows[column].cast(pl.List(pl.Float64)).list.to_array(width).to_numpy()
    total, numbers = np.zeros((experts, width)), rows["expert"].to_numpy()
    np.add.at(total, numbers, values)
    total[np.setdiff1d(np.arange(experts), numbers)] = np.nan
    return total


def _router_row(tables: SimilarityTables, key: Key) -> Matrix | None:
    rows = tables.sums("router_row", "weights", key)
    return None if rows is None else similarity.cosine_matrix(rows=rows)


def _router_logit(tables: SimilarityTables, key: Key) -> Matrix | None:
    products, tokens = (
        tables.sums("expert_pair", "logit_products", key),
        tables.count("router_load", "logit_tokens", key),
    )
    if products is None or not tokens:
        return None
    return similarity.logit_correlation(products=products, sums=tables.logit_sums(key), tokens=tokens)


def _output_cosine(tables: SimilarityTables, key: Key) -> Matrix | None:
    sums, tokens = tables.sums("expert_similarity", "cosine_sum", key), tables.count("expert_similarity", "tokens", key)
    if sums is None or not tokens:
        return None
    silent = ~(np.diag(sums) > 0)  # experts that put out nothing have no direction
    return np.where(silent[:, None] | silent[None], np.nan, sums / tokens)


def _ratio_of(table: str, column: str) -> Callable[[SimilarityTables, Key], Matrix | None]:
    def read(tables: SimilarityTables, key: Key) -> Matrix | None:
        sums = tables.sums(table, column, key)
        return None if sums is None else similarity.normalised_gram(gram=sums)

    return read


def _weight(matrix: str, column: str) -> Callable[[SimilarityTables, Key], Matrix | None]:
    return lambda tables, key: tables.weights(matrix, column, key)


KINDS: tuple[Kind, ...] = (
    Kind("router_row", "router_row_similarity", "router rows", "activations", "outputs", _router_row),
    Kind("router_logit", "router_logit_similarity", "router logits", "routing", "logits", _router_logit),
    Kind("output_cosine", "output_cosine", "output cosine", "similarity", "outputs", _output_cosine),
    Kind("output_product", "output_product_similarity", "output products", "similarity", "outputs",
         _ratio_of("expert_similarity", "product_sum")),
    Kind("cka", "cka", "CKA", "similarity", "outputs", _ratio_of("expert_similarity", "hsic_sum")),
    Kind("debiased_cka", "debiased_cka", "debiased CKA", "similarity", "outputs",
         _ratio_of("expert_similarity", "unbiased_hsic_sum")),
    Kind("gated_output", "gated_output_similarity", "weighted outputs", "activations", "outputs",
         _ratio_of("expert_pair", "output_products")),
    Kind("weight", "weight_similarity", "weights", "similarity", "outputs", _weight("all", "cosine")),
    Kind("weight_mean", "neuron_mean_similarity", "neuron means", "similarity", "outputs",
         _weight("all", "mean_cosine")),
    Kind("weight_matched", "matched_weight_similarity", "matched weights", "similarity", "outputs",
         _weight("all", "matched_cosine")),
    Kind("weight_gate", "weight_similarity", "gate weights", "similarity", "outputs", _weight("gate", "cosine"), True),
    Kind("weight_up", "weight_similarity", "up weights", "similarity", "outputs", _weight("up", "cosine"), True),
    Kind("weight_down", "weight_similarity", "down weights", "similarity", "outputs", _weight("down", "cosine"), True),
)  # fmt: skip
"""Every kind, in the order in which pages list them."""

BY_NAME = {kind.name: kind for kind in KINDS}
