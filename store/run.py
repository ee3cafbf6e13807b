"""Reading one run, finished or still being collected, as tables, as a trace, or with SQL. No torch from here on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb
import numpy as np
import polars as pl
from numpy.typing import NDArray

from moescope.errors import StoreError
from store import connection, derived, live, packed, remote, stretch, text_search
from store.damage import damage
from store.info import Badge, LayerInfo, Progress, RunInfo, badge
from store.opening import open_file, open_folder
from store.parts import in_every
from store.schema import quoted, tables
from store.scores import LayerScores, RouterScores, unpack_layer_scores, unpack_scores
from store.sparse import Sparse
from store.text_search import TextSearch
from store.tokens import TokenIds, unpack_tokens
from store.trace import CHUNK_TOKENS, LayerSelections, Trace, unpack_layer, unpack_trace
from store.version import version_of
from store.whole import listing

if TYPE_CHECKING:
    from store.remote.ranged import OneRun

FILE_SUFFIX = ".duckdb"


@dataclass(frozen=True)
class SequenceText:
    """The tokens of one sequence.

    Attributes:
        token_ids: (tokens,) ids.
        pieces: UTF-8 bytes of each token; a token may hold only a part of a character.
        special: (tokens,) bool, special tokens of the tokenizer.
    """

    token_ids: NDArray[np.int64]
    pieces: list[bytes]
    special: NDArray[np.bool_]


_BROKEN = (duckdb.IOException, duckdb.FatalException, duckdb.InternalException, duckdb.SerializationException)
"""What DuckDB raises where a file is not what it was."""

TEXT_TABLES = ("sequence_token", "vocabulary")
"""What a run opened without its text reads as empty."""


def open_run(path: str | Path, *, text: bool = True, fetch: bool = True, summary: bool = False) -> Run:
    """Open ``NAME.duckdb``, or ``NAME.live/`` while it is collected.

    Args:
        path: of a run in a directory; or in a remote store, as a URL or a path in its mirror.
        text: False hides token ids and text, as if the run had not kept them.
        fetch: what is in a remote store and not here is fetched first; False reads the pieces that are asked for where
            they lie, and none of what stands beside the run.
        summary: of a finished run, only what its info, layers and badge say can be asked: what a list of many needs.

    Raises:
        StoreError: there is no such run, it is not one, or its schema is of another version.
        InputError: it is in a remote store, and there is no room for it here.
    """
    path = remote.run_path(path)
    lying = None if fetch else remote.lying(path)
    if lying is not None:
        return Run(path, live_folder=False, text=text, lying=lying, summary=summary)
    unreadable = remote.bring(path, shards=fetch)
    if path.is_dir() and path.name.endswith(live.SUFFIX):
        return Run(path, live_folder=True, text=text)
    if not path.is_file():
        names = [entry.name for entry in listing(path.parent) if entry.name.endswith(FILE_SUFFIX)]
        near = [name for name in names if not name.startswith(".") and not name.endswith(derived.SUFFIX)]
        hint = f"; {path.parent} has {', '.join(near[:5])}" if near else ""
        raise StoreError(f"no run at {path}{hint}")
    return Run(path, live_folder=False, text=text, unreadable=unreadable, summary=summary)


class Run:
    """One profiling of one model on one corpus, opened for reading. Made by :func:`open_run`.

    Attributes:
        path: the file, or the folder of a live run.
        live: it is being collected.
        name: of the run.
        version: see :func:`version_of`.
        unreadable: one sentence per file beside the run that is damaged and counts as not there.
    """

    def __init__(
        self,
        path: Path,
        *,
        live_folder: bool,
        text: bool = True,
        lying: OneRun | None = None,
        unreadable: tuple[str, ...] = (),
        summary: bool = False,
    ) -> None:
        self.path = path
        self._hidden: tuple[str, ...] = () if text else TEXT_TABLES
        self.live = live_folder
        self.name = path.name.removesuffix(live.SUFFIX if live_folder else FILE_SUFFIX)
        self.version = version_of(path)
        self.unreadable: tuple[str, ...] = ()
        if live_folder:
            self._connection = open_folder(path, self._hidden)
        else:
            self._connection, spoilt = open_file(path, self._hidden, lying, summary=summary)
            self.unreadable = (*unreadable, *spoilt)

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Run {self.name!r}: {self.info.model}, {self.info.tokens} tokens>"

    @cached_property
    def info(self) -> RunInfo:
        """Provenance; sequences and tokens of a live run are those published so far."""
        if not self.live:
            found = RunInfo.from_row(self.table("run").row(0, named=True))
            found.text_kept = found.text_kept and not self._hidden
            return found
        info = live.read_info(self.path)
        info.text_kept = info.text_kept and not self._hidden
        counted = self.query("select count(*) as sequences, coalesce(sum(tokens), 0)::bigint as tokens from sequence")
        info.sequences, info.tokens = counted.row(0)
        return info

    @cached_property
    def layers(self) -> list[LayerInfo]:
        """The MoE layers, in the order of a trace's axis 0."""
        rows = self.query("select * from layer order by layer, step").iter_rows(named=True)
        return [LayerInfo(**{name: value for name, value in row.items() if value is not None}) for row in rows]

    @cached_property
    def domains(self) -> list[str]:
        """The domains of the run's text, sorted."""
        found = self.query("select distinct domain from sequence order by domain")
        if found.is_empty():  # imported counts have no sequences
            found = self.query("select distinct domain from expert_load order by domain")
        return found["domain"].to_list()

    @cached_property
    def badge(self) -> Badge:
        """Whether the capture proved itself right, and why not if it did not."""
        return badge(self.table("check").to_dicts())

    @property
    def progress(self) -> Progress | None:
        """How far a live run is; None for a finished one."""
        return live.read_progress(self.path) if self.live else None

    def table(self, name: str, *, layer: int | None = None, columns: Sequence[str] | None = None) -> pl.DataFrame:
        """All rows of one table of the schema, or those of one layer, merged over shards while the run is live.

        Args:
            layer: only its rows.
            columns: read only these beside the key columns: the lists of the others stay packed.

        Raises:
            StoreError: the schema has no such table, or the table no such column.
        """
        if name not in tables():
            raise StoreError(f"no table {name!r} in a run; there are {', '.join(tables())}")
        keys = ", ".join(quoted(key) for key in tables()[name].keys)
        wanted = "*" if columns is None else ", ".join(quoted(column) for column in (*tables()[name].keys, *columns))
        where = "" if layer is None else f" where layer = {int(layer)}"
        found = self.query(f"select {wanted} from {quoted(name)}{where}" + (f" order by {keys}" if keys else ""))
        if "expert" in tables()[name].keys:
            self._require_experts(name, found)
        return found

    def _require_experts(self, name: str, found: pl.DataFrame) -> None:
        """Refuse rows of routed experts that their layer does not have: numbers of experts become places in arrays."""
        counts = {(layer.layer, layer.step): layer.num_experts for layer in self.layers}
        routed = found.filter(pl.col("kind") != "shared") if "kind" in tables()[name].keys else found
        ends = routed.group_by("layer", "step").agg(first=pl.col("expert").min(), last=pl.col("expert").max())
        for layer, step, first, last in ends.iter_rows():
            most = counts.get((layer, step))
            if most is not None and (first is None or first < 0 or last >= most):
                wrong = last if first is not None and first >= 0 else first
                raise StoreError(
                    f"{self.path} is damaged: table {name} has expert {wrong} of layer {layer}, which has {most}: put "
                    "a copy in its place"
                )

    def query(
        self, sql: str, parameters: connection.Parameters = None, *, seconds: float | None = None
    ) -> pl.DataFrame:
        """The answer of one SELECT over the run's tables and the view ``route``; nothing else is allowed.

        Raises:
            StoreError: another statement, SQL that DuckDB refuses, or one that takes longer than ``seconds``.
        """
        try:
            return connection.query(self._connection, sql, parameters, seconds=seconds)
        except StoreError as error:
            if isinstance(error.__cause__, _BROKEN):
                raise self._broken(error) from error.__cause__
            raise

    def _broken(self, error: StoreError) -> StoreError:
        """What to say where files could not be read that could be when the run was opened."""
        if self.live and not self.path.is_dir():
            return StoreError(f"{self.path} was finished, renamed or deleted while it was read: open the run again")
        if self.live:
            return StoreError(str(damage(self.path, error)))
        return StoreError(f"{self.path} or what lies beside it is damaged: put a copy in its place ({error})")

    def metrics(self, metric: str | None = None) -> pl.DataFrame:
        """Rows of the derived table ``metric_value``: one metric's, or all."""
        if metric is None:
            return self.query("select * from metric_value")
        return self.query("select * from metric_value where metric = ?", [metric])

    def metric_vectors(self, metric: str) -> pl.DataFrame:
        """Rows of the derived table ``metric_vector`` of one metric: a list per expert, such as a row of a matrix."""
        return self.query("select * from metric_vector where metric = ? order by all", [metric])

    @cached_property
    def has_trace(self) -> bool:
        """Whether the run holds selections token by token; imported counts do not."""
        return not self.query("select 1 from route_chunk limit 1").is_empty()

    @cached_property
    def traced_sequences(self) -> pl.DataFrame:
        """The sequences whose selections were to be kept (sequence, domain, tokens, prompt_tokens), in order: all of
        them, or those of ``--trace-every``. Traces hold these, and no others.
        """
        return self._traced(
            self.query("select sequence, domain, tokens, prompt_tokens from sequence order by sequence")
        )

    def _traced(self, sequences: pl.DataFrame) -> pl.DataFrame:
        """Those rows of sequences whose selections were to be kept."""
        every = int(self.info.settings.get("recording", {}).get("trace_every", 1))
        if every == 1:
            return sequences
        return sequences.filter(in_every(sequences["sequence"].to_numpy().astype(np.int64), every))

    @cached_property
    def omissions(self) -> dict[str, str]:
        """What this run cannot say, by subject (see table ``omission``), with the reason; empty for a watched model."""
        return dict(self.query("select subject, reason from omission order by subject").iter_rows())

    def selections(
        self,
        *,
        domain: str | None = None,
        layers: Sequence[int] | None = None,
        sequences: Sequence[int] | None = None,
        max_sequences: int | None = None,
    ) -> Trace:
        """The trace, or the part of it that one domain, some layers, or some sequences make.

        Args:
            domain: only sequences of this domain.
            layers: only these layers, by decoder-layer index.
            sequences: only these sequences, by number.
            max_sequences: at most so many sequences, the first ones.

        Raises:
            StoreError: the run has no such domain or layer.
        """
        wanted = self._wanted_layers(layers)
        chosen = self._wanted_sequences(domain, sequences, max_sequences, traced=True)
        numbers = chosen["sequence"].to_numpy().astype(np.int64)
        chunks = packed.chunks(
            self.query, self._sparse, layers=sorted({layer for layer, _ in wanted}), sequences=numbers.tolist()
        )
        return unpack_trace(
            chunks=chunks,
            layers=wanted,
            sequences=numbers,
            lengths=chosen["tokens"].to_numpy().astype(np.int64),
            domains=chosen["domain"].to_list(),
            num_experts=max((layer.num_experts for layer in self.layers), default=0),
        )

    def stretch(
        self, sequence: int, *, first: int = 0, last: int = 2**32 - 1, layers: Sequence[int] | None = None
    ) -> Trace:
        """The trace of the tokens ``first`` to ``last`` of one sequence, read without the rest of it.

        Axis 1 holds this sequence alone, or none where the run has no such sequence; axis 2 begins at ``first``.

        Raises:
            StoreError: the run has no such layer.
        """
        wanted = self._wanted_layers(layers)
        chosen = self._wanted_sequences(None, [sequence], None, traced=True)
        if chosen.is_empty():
            return self.selections(sequences=[sequence], layers=layers)
        return stretch.trace(
            self.query,
            layers=wanted,
            sequence=sequence,
            first=first,
            last=last,
            length=int(chosen["tokens"][0]),
            domain=chosen["domain"][0],
            num_experts=max((layer.num_experts for layer in self.layers), default=0),
        )

    def layer_selections(
        self,
        *,
        layer: int,
        step: int = 0,
        first: int = 0,
        last: int = 2**32 - 1,
        sequences: Sequence[int] | None = None,
        weights: bool = False,
    ) -> LayerSelections:
        """One layer's selections without padding, of the sequences numbered ``first`` to ``last``: the way to read a
        trace that is larger than memory.

        Args:
            sequences: only those of these numbers.
            weights: read the gate weights too; without, they stay packed.

        Raises:
            StoreError: the run has no such layer.
        """
        known = self._layer(layer, step)
        among, numbers = packed.among(sequences)
        ranged = f"sequence between $first and $last{among} order by sequence"
        of = {"first": first, "last": last, **numbers}
        chosen = self._traced(self.query(f"select sequence, tokens from sequence where {ranged}", of))
        chunks = packed.layer_chunks(
            self.query, self._sparse, layer=layer, step=step, first=first, last=last, sequences=sequences,
            weights=weights,
        )  # fmt: skip
        return unpack_layer(
            chunks=chunks,
            sequences=chosen["sequence"].to_numpy().astype(np.int64),
            lengths=chosen["tokens"].to_numpy().astype(np.int64),
            num_experts=max(one.num_experts for one in self.layers),
            top_k=known.top_k,
        )

    def layer_scores(
        self,
        *,
        layer: int,
        step: int = 0,
        first: int = 0,
        last: int = 2**32 - 1,
        sequences: Sequence[int] | None = None,
    ) -> LayerScores:
        """One layer's largest router scores, read as :meth:`layer_selections` reads selections. Sequences without
        scores (``--scores-every``), and layers whose router shows none, are left out.

        Raises:
            StoreError: the run has no such layer.
        """
        self._layer(layer, step)
        among, numbers = packed.among(sequences)
        of = {"layer": layer, "step": step, "first": first, "last": last, **numbers}
        chunks = self.query(
            "select sequence, start, width, low, high, experts, scores, log_partition from score_chunk where layer ="
            f" $layer and step = $step and sequence between $first and $last{among}",
            of,
        )
        numbered = chunks["sequence"].unique().to_list()
        chosen = self.query(
            "select sequence, tokens from sequence where sequence in (select unnest(?::uinteger[])) order by sequence",
            [numbered],
        )
        return unpack_layer_scores(
            chunks=chunks,
            sequences=chosen["sequence"].to_numpy().astype(np.int64),
            lengths=chosen["tokens"].to_numpy().astype(np.int64),
        )

    @cached_property
    def scored_sequences(self) -> pl.DataFrame:
        """The sequences that have router scores in any layer (sequence, domain, tokens), in order."""
        return self.query(
            "select sequence, domain, tokens from sequence"
            " where sequence in (select distinct sequence from score_chunk) order by sequence"
        )

    def router_scores(
        self,
        *,
        domain: str | None = None,
        layers: Sequence[int] | None = None,
        sequences: Sequence[int] | None = None,
        max_sequences: int | None = None,
    ) -> RouterScores:
        """The largest router scores of every token of the sequences that have any; the arguments choose a part as for
        :meth:`selections`.

        Raises:
            StoreError: the run has no such domain or layer, or was collected without router scores.
        """
        wanted = self._wanted_layers(layers)
        chosen = self._wanted_sequences(domain, sequences, max_sequences)
        if not self.has_scores:
            raise StoreError(f"run {self.name!r} holds no router scores: collect it again with --router-scores")
        chosen = chosen.join(self.scored_sequences, on="sequence", how="semi", maintain_order="left")
        numbers = chosen["sequence"].to_numpy().astype(np.int64)
        named = sorted({layer for layer, _ in wanted})
        chunks = packed.chunks(self.query, self._sparse, layers=named, sequences=numbers.tolist(), table="score_chunk")
        return unpack_scores(
            chunks=chunks,
            layers=wanted,
            sequences=numbers,
            lengths=chosen["tokens"].to_numpy().astype(np.int64),
            domains=chosen["domain"].to_list(),
        )

    def stretch_scores(
        self, sequence: int, *, first: int = 0, last: int = 2**32 - 1, layers: Sequence[int] | None = None
    ) -> RouterScores:
        """The largest router scores of the tokens ``first`` to ``last`` of one sequence, as :meth:`stretch` reads its
        trace.

        Raises:
            StoreError: the run has no such layer or sequence, or was collected without router scores.
        """
        wanted, chosen = self._wanted_layers(layers), self._wanted_sequences(None, [sequence], None)
        scored = self.query("select 1 from score_chunk where sequence = ? limit 1", [sequence])
        if chosen.is_empty() or scored.is_empty():
            raise StoreError(f"run {self.name!r} holds no router scores of sequence {sequence}")
        length, domain = int(chosen["tokens"][0]), chosen["domain"][0]
        return stretch.scores(
            self.query, layers=wanted, sequence=sequence, first=first, last=last, length=length, domain=domain
        )

    @cached_property
    def has_scores(self) -> bool:
        """Whether the run holds router scores token by token, be it of some sequences."""
        return not self.query("select 1 from score_chunk limit 1").is_empty()

    def sequence_text(self, sequence: int, *, first: int = 0, last: int = 2**32 - 1) -> SequenceText | None:
        """The tokens ``first`` to ``last`` of one sequence; None when the run keeps no text (or has no such
        sequence)."""
        rows = self.query(
            "select start, token_ids, special from sequence_token where sequence = ? and start between ? and ? "
            "order by start",
            [int(sequence), max(first - CHUNK_TOKENS + 1, 0), last],
        )
        if not len(rows):
            return None
        begin = int(rows["start"][0])
        kept = slice(max(first - begin, 0), max(last + 1 - begin, 0))
        ids = rows["token_ids"].explode().to_numpy().astype(np.int64)[kept]
        text = self.token_bytes(np.unique(ids).tolist())
        special = rows["special"].explode().to_numpy().astype(bool)[kept]
        return SequenceText(ids, [text.get(int(token), b"") for token in ids], special)

    def search_text(
        self, wanted: str, *, regex: bool = False, domain: str | None = None, seconds: float = text_search.SECONDS
    ) -> TextSearch:
        """Which sequences hold some words, or match a regular expression, across the borders of tokens.

        Args:
            wanted: the words, in upper or lower case, or with ``regex`` an expression of linear time (no look-around,
                no back-references).
            domain: of this domain only.
            seconds: after so many, what has been found so far.

        Raises:
            StoreError: the expression is none, or would match everywhere; the run keeps no text or has no such domain.
        """
        numbers = self._wanted_sequences(domain, None, None, traced=True).select("sequence", "domain", "tokens")
        if not self.has_tokens:
            raise StoreError(f"run {self.name!r} keeps no text to search")
        return text_search.search(self.query, numbers, wanted, regex=regex, seconds=seconds)

    @cached_property
    def has_tokens(self) -> bool:
        """Whether the run holds the token ids of its text."""
        return not self.query("select 1 from sequence_token limit 1").is_empty()

    @cached_property
    def has_predictions(self) -> bool:
        """Whether the run holds the tokens that the model held most likely: level ``predictions``."""
        return not self.query("select 1 from sequence_token where predicted is not null limit 1").is_empty()

    def token_ids(self, *, first: int = 0, last: int = 2**32 - 1) -> TokenIds:
        """Token ids of the sequences numbered ``first`` to ``last``, in the order of :meth:`layer_selections`.

        Tokens that the run does not hold are -1: all of them where it keeps no text, and those by whose empty text an
        import stands in for what it does not know.
        """
        ranged = "sequence between ? and ? order by sequence"
        chosen = self.query(f"select sequence, tokens from sequence where {ranged}", [first, last])
        chunks = self.query(
            f"select sequence, start, token_ids, predicted from sequence_token where {ranged}, start", [first, last]
        )
        return unpack_tokens(
            chunks=chunks,
            sequences=chosen["sequence"].to_numpy().astype(np.int64),
            lengths=chosen["tokens"].to_numpy().astype(np.int64),
            unknown=self._empty_tokens,
        )

    @cached_property
    def _empty_tokens(self) -> list[int]:
        if not self.info.origin.startswith("import"):
            return []
        return self.query("select token_id from vocabulary where octet_length(bytes) = 0")["token_id"].to_list()

    def token_bytes(self, ids: Sequence[int]) -> dict[int, bytes]:
        """The UTF-8 bytes that token ids stand for, which may be a part of a character; unknown ones are left out."""
        found = self.query("select token_id, bytes from vocabulary where token_id in (select unnest(?))", [list(ids)])
        return {token: piece or b"" for token, piece in found.iter_rows()}

    @cached_property
    def _sparse(self) -> Sparse:
        wide = sum(layer.top_k for layer in self.layers)
        tokens = self.info.tokens / max(self.info.sequences, 1)
        return Sparse(
            self.query, sequences=0 if self.live else self.info.sequences, sequence_bytes=round(4 * wide * tokens)
        )

    def _layer(self, layer: int, step: int) -> LayerInfo:
        for one in self.layers:
            if (one.layer, one.step) == (layer, step):
                return one
        raise StoreError(f"run {self.name!r} has no MoE layer {layer}, step {step}")

    def _wanted_layers(self, layers: Sequence[int] | None) -> list[tuple[int, int]]:
        all_layers = [(layer.layer, layer.step) for layer in self.layers]
        if layers is None:
            return all_layers
        missing = sorted(set(layers) - {layer for layer, _ in all_layers})
        if missing:
            known = ", ".join(str(layer) for layer, _ in all_layers)
            raise StoreError(f"run {self.name!r} has no MoE layer {missing[0]}; it has {known}")
        return [pair for pair in all_layers if pair[0] in set(layers)]

    def _wanted_sequences(
        self, domain: str | None, sequences: Sequence[int] | None, limit: int | None, *, traced: bool = False
    ) -> pl.DataFrame:
        if domain is not None and domain not in self.domains:
            raise StoreError(f"run {self.name!r} has no domain {domain!r}; it has {', '.join(self.domains)}")
        frame = self.query("select sequence, domain, tokens from sequence order by sequence")
        frame = self._traced(frame) if traced else frame
        if domain is not None:
            frame = frame.filter(pl.col("domain") == domain)
        if sequences is not None:
            frame = frame.filter(pl.col("sequence").is_in(list(sequences)))
        return frame.head(limit) if limit is not None else frame
