"""Any frame as one that every table and every CSV can hold: text in the place of lists, structs and bytes."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import polars as pl

from moescope.errors import InputError

FORMATS = ("csv", "parquet", "json")
"""What the data of a figure or an answer is written as."""


def flat(frame: pl.DataFrame, *, limit: int | None = None) -> pl.DataFrame:
    """The same rows and columns, where cells are numbers, booleans, times or text.

    Args:
        limit: letters of a cell that are kept; None = all.
    """
    return frame.with_columns([_plain(frame[name], limit) for name in frame.columns])


def records(frame: pl.DataFrame) -> str:
    """The rows as a JSON list of objects; lists and structs stay what they are, NaN and infinity read null."""
    floats = [name for name, kind in frame.schema.items() if kind.is_float() or isinstance(kind, pl.Decimal)]
    finite = [pl.when(pl.col(name).is_finite()).then(pl.col(name)).alias(name) for name in floats]
    whole = frame.with_columns(pl.col(name).cast(pl.Float64) for name in floats).with_columns(finite)
    return json.dumps(whole.to_dicts(), ensure_ascii=False, default=_other)


def encoded(frame: pl.DataFrame, kind: str) -> bytes:
    """The frame as the bytes of a file of one of :data:`FORMATS`; Parquet keeps lists and structs."""
    if kind == "parquet":
        buffer = io.BytesIO()
        frame.write_parquet(buffer)
        return buffer.getvalue()
    return (flat(frame).write_csv() if kind == "csv" else records(frame) + "\n").encode()


def ending(path: Path, formats: tuple[str, ...] = FORMATS) -> str:
    """The format that a file's ending names.

    Raises:
        InputError: it is none of them.
    """
    found = path.suffix.lower().removeprefix(".")
    if found not in formats:
        raise InputError(f"{path}: the ending says what is written; there are {', '.join(formats)}")
    return found


def _plain(column: pl.Series, limit: int | None) -> pl.Series:
    kind = column.dtype
    if isinstance(kind, pl.Decimal):
        return column.cast(pl.Float64)
    if kind == pl.Null:
        return column.cast(pl.String)
    if kind == pl.String:
        return column if limit is None else _cut(column, limit)
    if kind.is_nested() or kind == pl.Binary or kind == pl.Object:
        texts = [None if value is None else _text(value) for value in column.to_list()]
        return _plain(pl.Series(column.name, texts, pl.String), limit)
    return column


def _cut(column: pl.Series, limit: int) -> pl.Series:
    long = column.str.len_chars() > limit
    return column.to_frame().select(
        pl.when(long).then(pl.col(column.name).str.slice(0, limit) + "…").otherwise(pl.col(column.name))
    )[column.name] if long.any() else column  # fmt: skip


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return _bytes(value)
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=_other)


def _other(value: object) -> object:
    return _bytes(value) if isinstance(value, bytes) else str(value)


def _bytes(value: bytes) -> str:
    """Bytes as the text that they are, else as hexadecimal digits."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.hex()
