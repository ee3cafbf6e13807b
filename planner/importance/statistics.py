"""What scores read: the sums of one run, of one domain and phase or of all, one row per expert, neuron or channel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

import store
from moescope.errors import PlanError

EXPERT = ["layer", "step", "expert", "kind"]
"""The columns that name an expert; kind is routed or shared."""

NEURON = [*EXPERT, "neuron"]
"""The columns that name a neuron of an expert: row k of gate and up, column k of down."""

CHANNEL = [*EXPERT, "channel"]
"""The columns that name a channel of an expert's input."""

_LAYER = ["layer", "step"]


class Statistics:
    """The sums of one run. Frames are sorted by their key columns.

    Args:
        run: a run.
        level: what has to be recorded, a comma list; named where something is missing.
        domain: only tokens of this domain; None = all.
        phase: only prompt or only decode; None = both.

    Raises:
        PlanError: the run has no such domain.
    """

    def __init__(
        self,
        run: store.Run,
        *,
        level: str,
        domain: str | None = None,
        phase: Literal["prompt", "decode"] | None = None,
    ) -> None:
        self.run, self.level, self.domain, self.phase = run, level, domain, phase
        if domain is not None and domain not in self.domains:
            raise PlanError(f"run {run.name!r} has no domain {domain!r}; it has {', '.join(self.domains)}")

    @cached_property
    def domains(self) -> list[str]:
        """The domains that were counted, sorted."""
        return sorted(set(self.run.domains) | set(self.run.table("router_load")["domain"].to_list()))

    def domains_in(self, table: str) -> list[str]:
        """The domains for which a table has rows of the wanted phase, sorted."""
        frame = self.run.table(table)
        if self.phase is not None:
            frame = frame.filter(pl.col("phase") == self.phase)
        return sorted(frame["domain"].unique().to_list())

    def of(self, domain: str) -> Statistics:
        """The same for one domain."""
        return Statistics(self.run, level=self.level, domain=domain, phase=self.phase)

    @cached_property
    def routed(self) -> pl.DataFrame:
        """Every routed expert that holds weights; zero, copy and constant experts have nothing to score."""
        frame = pl.DataFrame(
            {
                "layer": [layer.layer for layer in self.run.layers],
                "step": [layer.step for layer in self.run.layers],
                "expert": [list(range(layer.num_experts)) for layer in self.run.layers],
            },
            schema={"layer": pl.Int32, "step": pl.Int32, "expert": pl.List(pl.Int32)},
        )
        empty = self.run.table("expert").filter(pl.col("kind") != "routed")
        every = frame.explode("expert").join(empty, on=EXPERT[:3], how="anti")
        return every.with_columns(kind=pl.lit("routed")).sort(EXPERT)

    def experts(self, table: str, *columns: str) -> pl.DataFrame:
        """Columns of a table of scalars, one row per routed expert; 0 where no token used it.

        Raises:
            PlanError: the run lacks them.
        """
        rows = self._rows(table, columns)
        if "kind" in rows.columns:
            rows = rows.filter(pl.col("kind") == "routed").drop("kind")
        summed = rows.group_by(EXPERT[:3]).agg(self._merged(table, columns))
        every = self.routed.join(summed, on=EXPERT[:3], how="left")
        return every.with_columns(pl.col(columns).fill_null(0)).sort(EXPERT)

    def ranks(self, *columns: str) -> pl.DataFrame:
        """Columns of lists of table ``expert_rank``, one row per routed expert and place in the list (from 0)."""
        rows = self._rows("expert_rank", columns).with_columns(place=_places(columns[0])).explode("place", *columns)
        summed = rows.group_by([*EXPERT[:3], "place"]).agg(self._merged("expert_rank", columns))
        places = summed.select(*_LAYER, "place").unique()
        every = self.routed.join(places, on=_LAYER).join(summed, on=[*EXPERT[:3], "place"], how="left")
        return every.with_columns(pl.col(columns).fill_null(0)).sort([*EXPERT, "place"])

    def vectors(
        self, table: str, *columns: str, axis: Literal["neuron", "channel"] = "neuron", norm: str | None = None
    ) -> pl.DataFrame:
        """Columns of lists, one row per neuron or channel, shared experts included, with ``tokens`` of its expert.

        Routed experts that no token used stand with 0.

        Args:
            table: a table of sums per neuron or channel.
            columns: its columns.
            axis: what the places in the lists are.
            norm: a column of table ``expert_weight`` to stand beside them.

        Raises:
            PlanError: the run lacks them, or keeps them pooled while a domain is wanted.
        """
        wanted = ["tokens", *columns]
        rows = _with_unused(self._rows(table, wanted, vectors=True), self.routed, columns)
        several = rows.select(EXPERT).is_duplicated().any()  # domains or phases
        if norm is not None:
            rows = self._with_norm(rows, norm)
        values = [*columns, norm] if norm else list(columns)
        frame = rows.select(*EXPERT, *wanted, *values[len(columns) :], _places(columns[0]).alias(axis))
        frame = frame.explode(axis, *values).with_columns(pl.col(values).cast(pl.Float64), pl.col(axis).cast(pl.Int32))
        keys = [*EXPERT, axis]
        if several:
            merged = [*self._merged(table, wanted), *(pl.col(name).first() for name in values[len(columns) :])]
            frame = frame.group_by(keys).agg(merged)
        return frame.sort(keys)

    def _with_norm(self, rows: pl.DataFrame, norm: str) -> pl.DataFrame:
        joined = rows.join(self._rows("expert_weight", [norm]).select(*EXPERT, norm), on=EXPERT, how="left")
        unread = joined.filter(pl.col(norm).is_null())
        if not unread.is_empty():
            layer, _, expert, kind = unread.select(EXPERT).row(0)
            raise self._missing(f"expert_weight.{norm}", f" of layer {layer}, {kind} expert {expert}")
        return joined

    def tokens(self) -> pl.DataFrame:
        """(layer, step, tokens): real tokens that each layer's router saw."""
        rows = self._rows("router_load", ["tokens"])
        return rows.group_by(_LAYER).agg(pl.col("tokens").sum()).sort(_LAYER)

    def matrices(self, table: str, column: str) -> Iterator[tuple[tuple[int, int], NDArray[np.float64]]]:
        """((layer, step), (experts, width) matrix) of a column of lists, layer by layer, a row per expert."""
        rows = self._rows(table, [column], vectors=True)
        for (layer, step), part in layers_of(rows):
            values = part[column].cast(pl.List(pl.Float64)).list.to_array(len(part[column][0])).to_numpy()
            matrix = np.zeros((int(part["expert"].max()) + 1, values.shape[1]))  # type: ignore[arg-type]
            np.add.at(matrix, part["expert"].to_numpy(), values)
            yield (int(layer), int(step)), matrix

    def _rows(self, table: str, columns: Sequence[str], *, vectors: bool = False) -> pl.DataFrame:
        """Rows of the wanted domain and phase; every MoE layer is there, and every column filled."""
        frame = self.run.table(table)
        absent = [name for name in columns if name not in frame.columns]  # an older file of the same schema
        if absent:
            raise self._missing(f"{table}.{absent[0]}")
        known = frame.select(pl.all_horizontal(pl.col(columns).is_not_null())).to_series()
        frame = frame.filter(known)
        if frame.is_empty():
            raise self._missing(f"{table}.{columns[-1]}")
        if self.domain is not None and "domain" in frame.columns:
            if vectors and set(frame["domain"].unique()) == {""}:
                raise PlanError(
                    f"run {self.run.name!r} keeps {table} pooled over domains: leave the domain out, or collect it"
                    " again with --vectors-per-domain"
                )
            frame = frame.filter(pl.col("domain") == self.domain)
        if self.phase is not None and "phase" in frame.columns:
            frame = frame.filter(pl.col("phase") == self.phase)
        if frame.is_empty():
            wanted = {"domain": self.domain, "phase": self.phase}
            part = " and ".join(f"{name} {value!r}" for name, value in wanted.items() if value is not None)
            raise PlanError(f"run {self.run.name!r} has no token with {part}, so {table} says nothing of it")
        seen = set(frame.select(_LAYER).unique().iter_rows())
        for layer in self.run.layers:
            if (layer.layer, layer.step) not in seen:
                raise self._missing(f"{table}.{columns[-1]}", f" of layer {layer.layer}")
        return frame

    def _missing(self, what: str, where: str = "") -> PlanError:
        only = ", if its routers show logits" if "logit" in what else ""
        return PlanError(f"run {self.run.name!r} has no {what}{where}: collect it with --level {self.level}{only}")

    @staticmethod
    def _merged(table: str, columns: Sequence[str]) -> list[pl.Expr]:
        """How rows of different domains and phases become one, as the schema says: sums add up, maxima stay maxima."""
        rules = {column.name: column.rule for column in store.tables()[table].columns}
        return [pl.col(name).max() if rules[name] == "max" else pl.col(name).sum() for name in columns]


def layers_of(frame: pl.DataFrame) -> Iterator[tuple[tuple[int, int], pl.DataFrame]]:
    """((layer, step), its rows) for each layer of a frame, in the frame's order."""
    for (layer, step), part in frame.group_by(_LAYER, maintain_order=True):
        yield (int(layer), int(step)), part


def _places(column: str) -> pl.Expr:
    return pl.int_ranges(pl.col(column).list.len())


def _with_unused(rows: pl.DataFrame, routed: pl.DataFrame, columns: Sequence[str]) -> pl.DataFrame:
    """The rows, and rows of zeros for routed experts that have none, as wide as the others of their layer."""
    widths = rows.filter(pl.col("kind") == "routed").group_by(_LAYER).agg(width=pl.col(columns[0]).list.len().max())
    unused = routed.join(rows, on=EXPERT, how="anti").join(widths, on=_LAYER)
    if unused.is_empty():
        return rows
    zeros = {name: pl.lit(0.0, pl.Float32).repeat_by("width") for name in columns}
    unused = unused.with_columns(**zeros, tokens=pl.lit(0, pl.Int64)).drop("width")
    return pl.concat([rows.select(unused.columns), unused], how="vertical_relaxed")
