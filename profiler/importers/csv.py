"""CSV of two layouts: ``layer,expert``, a line per selection, and ``token,layer,slot,expert,weight``, a trace.

Columns are found by their names in the first line, or, without such a line, by their number: two are counts, five a
trace. A column ``sequence`` may stand anywhere in a trace with names; without it all tokens make one sequence.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moescope.errors import ImportFileError
from profiler.importers.format import Format
from profiler.importers.recording import CountBlock, ImportOptions, Recording, TraceBlock
from profiler.importers.shape import Axis, layer_axis

BATCH_BYTES = 1 << 24
"""Text that is parsed at once; a trace's tokens are put together over the border of two batches."""

MAX_LINE = 1 << 16
COUNTS, TRACE = ("layer", "expert"), ("token", "layer", "slot", "expert", "weight")
_NAMES = re.compile(r"[A-Za-z_]")


def read(path: Path, options: ImportOptions) -> Recording:
    """Open a CSV file, plain or .gz.

    Raises:
        ImportFileError: it has neither layout, or nothing says how many experts there are.
    """
    if not path.is_file():
        raise ImportFileError(f"{path} is no file; csv takes FILE.csv or FILE.csv.gz")
    columns, named = _columns(path)
    layers, top_k = _scan(path, columns, named)
    trace = "weight" in columns
    axis = layer_axis(
        options=options, path=path, entries=len(layers), top_k=top_k if trace else 0, numbers=layers,
        largest=lambda: max(int(part["expert"].max()) for part in _batches(path, columns, named)),  # type: ignore[arg-type]
    )  # fmt: skip
    if trace:
        blocks: Iterator[TraceBlock | CountBlock] = _trace(path, columns, named, axis, top_k, options)
        omissions = {"text": "the file has no token ids"}
    else:
        blocks = iter([_counts(path, columns, named, axis, options)])
        reason = "the file lists selections without the tokens that made them"
        omissions = {"trace": reason, "order": reason, "weights": "the file has no gate weights", "text": reason}
    return Recording(layers=axis.layers, blocks=blocks, omissions=omissions, settings={"columns": list(columns)})


def _columns(path: Path) -> tuple[tuple[str, ...], bool]:
    """Names of the columns, and whether the first line holds them."""
    with _open(path) as stream:
        line = stream.readline(MAX_LINE)
    try:
        first = [part.strip().strip('"').lower() for part in line.decode("utf-8-sig").strip().split(",")]
    except UnicodeDecodeError as error:
        raise ImportFileError(f"{path} is no text file: {error.reason} in its first line") from error
    named = any(_NAMES.match(part) for part in first)
    for wanted in (TRACE, COUNTS):
        if named and set(wanted) <= set(first) and len(set(first)) == len(first):
            return tuple(first), True
        if not named and len(first) == len(wanted):
            return wanted, False
    raise ImportFileError(
        f"{path} begins with {', '.join(first)[:80]!r}; csv takes the columns {','.join(TRACE)} or {','.join(COUNTS)}"
    )


def _open(path: Path) -> gzip.GzipFile:
    opener = gzip.open if path.suffix == ".gz" else open
    return opener(path, "rb")  # type: ignore[return-value]


def _batches(path: Path, columns: tuple[str, ...], named: bool) -> Iterator[pl.DataFrame]:
    """The lines as whole numbers (and the weight as a float), in parts of bounded size."""
    schema = {name: pl.Float64 if name == "weight" else pl.Int64 for name in (*COUNTS, *TRACE, "sequence")}
    rest, first = b"", named
    with _open(path) as stream:
        while chunk := stream.read(BATCH_BYTES):
            text = rest + chunk
            cut = text.rfind(b"\n") + 1
            if not cut and len(text) > BATCH_BYTES + MAX_LINE:
                raise ImportFileError(f"{path}: a line is longer than {MAX_LINE} bytes")
            text, rest = text[:cut], text[cut:]
            if first and text:
                text, first = text.partition(b"\n")[2], False
            if text.strip():
                yield _parse(path, text, columns, schema)
    if rest.strip() and not first:
        yield _parse(path, rest, columns, schema)


def _parse(path: Path, text: bytes, columns: tuple[str, ...], schema: Mapping[str, type[pl.DataType]]) -> pl.DataFrame:
    kinds = {name: schema.get(name, pl.String) for name in columns}
    try:
        frame = pl.read_csv(text, has_header=False, new_columns=list(columns), schema=kinds)
    except pl.exceptions.PolarsError as error:
        raise ImportFileError(f"{path}: {str(error).splitlines()[0][:150]}") from error
    known = frame.select(name for name in columns if name in schema)
    if known.null_count().sum_horizontal().item():
        raise ImportFileError(f"{path}: a line has an empty field, or fewer fields than {','.join(columns)}")
    return known


def _scan(path: Path, columns: tuple[str, ...], named: bool) -> tuple[list[int], int]:
    """One pass over the file: the layers that occur, and experts per token."""
    layers: set[int] = set()
    slots = 0
    for frame in _batches(path, columns, named):
        layers.update(frame["layer"].unique().to_list())
        if "slot" in frame.columns:
            low, high = int(frame["slot"].min()), int(frame["slot"].max())  # type: ignore[arg-type]
            if not 0 <= low <= high < 1 << 15:
                raise ImportFileError(f"{path}: slots run from {low} to {high}; they count a token's experts from 0")
            slots = max(slots, high + 1)
    if not layers:
        raise ImportFileError(f"{path} has no line with a selection")
    if min(layers) < 0 or max(layers) >= 4096:
        raise ImportFileError(f"{path}: layers run from {min(layers)} to {max(layers)}; they are numbered from 0")
    return sorted(layers), slots


def _counts(path: Path, columns: tuple[str, ...], named: bool, axis: Axis, options: ImportOptions) -> CountBlock:
    experts = axis.layers[0].num_experts
    names = np.array([layer.layer for layer in axis.layers])
    counts = np.zeros((1, len(names), experts), np.int64)
    for frame in _batches(path, columns, named):
        expert = frame["expert"].to_numpy()
        _require_range(expert, experts, path)
        np.add.at(counts[0], (np.searchsorted(names, frame["layer"].to_numpy()), expert), 1)
    return CountBlock(counts, np.zeros(1, np.int64), options.domain)


def _trace(
    path: Path, columns: tuple[str, ...], named: bool, axis: Axis, top_k: int, options: ImportOptions
) -> Iterator[TraceBlock]:
    """The trace token by token; lines of a token stand together, tokens in order (per sequence)."""
    held: pl.DataFrame | None = None
    counted: dict[int, tuple[int, int]] = {}
    for frame in _batches(path, columns, named):
        if "sequence" not in frame.columns:
            frame = frame.with_columns(pl.lit(0, pl.Int64).alias("sequence"))
        frame = frame if held is None else pl.concat([held, frame])
        last = frame.select("sequence", "token").row(-1)
        ends = (pl.col("sequence") == last[0]) & (pl.col("token") == last[1])
        held = frame.filter(ends)
        whole = frame.filter(~ends)
        if len(whole):
            yield _block(whole, path, axis, top_k, options, counted)
    if held is not None:
        yield _block(held, path, axis, top_k, options, counted)


def _block(
    frame: pl.DataFrame,
    path: Path,
    axis: Axis,
    top_k: int,
    options: ImportOptions,
    counted: dict[int, tuple[int, int]],
) -> TraceBlock:
    """Whole tokens as a block; ``counted`` says how many tokens each sequence had before, and which comes next."""
    _require_range(frame["expert"].to_numpy(), axis.layers[0].num_experts, path)
    tokens = frame.select("sequence", "token").unique().sort("sequence", "token").with_row_index("row")
    placed = frame.join(tokens, on=["sequence", "token"], how="left", maintain_order="left")
    sequence, token = tokens["sequence"].to_numpy(), tokens["token"].to_numpy()
    position = _positions(sequence, token, path, counted)
    names = np.array([layer.layer for layer in axis.layers])
    ids = np.full((len(names), len(tokens), top_k), -1, np.int64)
    weights = np.zeros(ids.shape, np.float64)
    layer = np.searchsorted(names, frame["layer"].to_numpy())
    at = (layer, placed["row"].to_numpy(), frame["slot"].to_numpy())
    cells = np.ravel_multi_index(at, ids.shape)
    if len(np.unique(cells)) != len(cells):
        raise ImportFileError(f"{path}: a slot of a token comes twice, or a token's lines do not stand together")
    ids[at], weights[at] = frame["expert"].to_numpy(), frame["weight"].to_numpy()
    generated = np.full(len(tokens), options.phase == "decode")
    return TraceBlock(ids, weights, sequence, position, generated)


def _positions(
    sequence: NDArray[np.int64], token: NDArray[np.int64], path: Path, counted: dict[int, tuple[int, int]]
) -> NDArray[np.int64]:
    """Positions from 0 per sequence: tokens may be numbered from any number on, but without gaps."""
    position = np.zeros(len(token), np.int64)
    for number in np.unique(sequence).tolist():
        mine = sequence == number
        numbers = token[mine]
        before, due = counted.get(number, (0, int(numbers[0])))
        expected = due + np.arange(len(numbers))
        if (numbers != expected).any():
            missing = expected[numbers != expected][0]
            raise ImportFileError(f"{path}: token {missing} of sequence {number} is missing where it is due")
        position[mine] = before + np.arange(len(numbers))
        counted[number] = (before + len(numbers), due + len(numbers))
    return position


def _require_range(expert: NDArray[np.int64], experts: int, path: Path) -> None:
    wrong = expert[(expert < 0) | (expert >= experts)]
    if len(wrong):
        raise ImportFileError(f"{path}: expert {wrong[0]} is out of range; {experts} experts are numbered from 0")


FORMATS = (
    Format("csv", "any tool", "FILE.csv[.gz]", "trace (token,layer,slot,expert,weight) or counts (layer,expert)", read),
)
