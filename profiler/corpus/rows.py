"""Documents out of sources that have columns: JSON Lines, Parquet, hub datasets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from moescope.errors import CorpusError
from profiler.corpus.sources import Document, ReadOptions, Source, open_source

LONGEST_LINE = 1 << 28  # bytes

Row = tuple[dict[str, Any], int]  # values, and byte offset (JSON Lines) or row number


def row_documents(source: Source, start: int, stop: int, options: ReadOptions) -> Iterator[Document]:
    """Documents of the lines that begin in bytes start..stop of a JSON Lines file, or of rows start..stop of others."""
    for row in _rows(source, start, stop, options):
        yield _row_document(row, source, options)


def names_domain(source: Source, options: ReadOptions) -> bool:
    """Whether the first row names its domain in a column. Raises CorpusError where a column is missing."""
    first = next(_rows(source, 0, 1 if source.format == "parquet" else -1, options), None)
    if first is None:
        raise CorpusError(f"{source.name} has no rows: remove it or give a file with text")
    _row_document(first, source, options)
    return not source.labelled and options.domain_column in first[0]


def parquet_height(source: Source) -> int:
    """Number of rows, from the file's footer."""
    import polars as pl

    with _whole(source):
        return int(pl.scan_parquet(source.name, glob=False).select(pl.len()).collect().item())


def _rows(source: Source, start: int, stop: int, options: ReadOptions) -> Iterator[Row]:
    if source.format == "jsonl":
        return _json_rows(source, start, stop)
    if source.format == "parquet":
        return _parquet_rows(source, start, stop, options)
    return _hub_rows(source, options)


def _json_rows(source: Source, start: int, stop: int) -> Iterator[Row]:
    with open_source(source) as file:
        if start:  # the line that reaches into this span belongs to the span before
            file.seek(start - 1)
            skipped = file.readline(stop - start + 1)
            if not skipped.endswith(b"\n"):
                return
            start += len(skipped) - 1
        at = start
        while (stop < 0 or at < stop) and (line := file.readline(LONGEST_LINE)):
            if len(line) == LONGEST_LINE:
                longest = LONGEST_LINE >> 20
                raise CorpusError(f"{_place(source, at)}: longer than {longest} MiB: write one object per line")
            if line.strip(b" \t\r\n\xef\xbb\xbf"):
                yield _parse_line(line, source, at), at
            at += len(line)


def _parse_line(line: bytes, source: Source, at: int) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig" if at == 0 else "utf-8"))
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{_place(source, at)}: not UTF-8 (byte {line[error.start]:#04x} at offset {at + error.start}):"
            " convert the file, for example with iconv"
        ) from None
    except (ValueError, RecursionError) as error:
        start = line[:40].decode("utf-8", "replace").strip()
        hint = "write one object per line" if start.startswith("[") or start == "{" else "repair the line"
        raise CorpusError(f"{_place(source, at)}: not JSON ({error}), starts {start!r}: {hint}") from None
    if not isinstance(row, dict):
        hint = 'write one object per line, for example {"text": "..."}'
        raise CorpusError(f"{_place(source, at)}: holds a {type(row).__name__} where an object is due: {hint}")
    return row


def _parquet_rows(source: Source, start: int, stop: int, options: ReadOptions) -> Iterator[Row]:
    import polars as pl

    with _whole(source):
        frame = pl.scan_parquet(source.name, glob=False)
        columns = frame.collect_schema().names()
        texts = {options.text_column, "messages"}
        if not texts.isdisjoint(columns):  # otherwise the message lists them all
            columns = [name for name in columns if name in texts or name == options.domain_column]
        rows = frame.select(columns).slice(start, stop - start).collect().to_dicts()
    for number, row in enumerate(rows, start):
        yield row, number


@contextmanager
def _whole(source: Source) -> Iterator[None]:
    """Parquet that is damaged is a CorpusError, also where it makes the reader panic."""
    import polars as pl

    try:
        yield
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        raise CorpusError(f"{source.name} cannot be read as Parquet ({_first_line(error)}): is it complete?") from None


def _hub_rows(source: Source, options: ReadOptions) -> Iterator[Row]:
    try:
        from datasets import load_dataset  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise CorpusError(f"{source.name} needs the package datasets: pip install datasets") from None
    name, _, config = source.name.removeprefix("hf:").partition(":")
    try:
        stream = load_dataset(name, config or None, split=options.split, streaming=True)
        for number, row in enumerate(stream):
            yield dict(row), number
    except Exception as error:  # the library raises some thirty kinds: no such name, no network, no permission, ...
        raise CorpusError(
            f"{source.name} (split {options.split}) cannot be read: {type(error).__name__}: {_first_line(error)}"
        ) from None


def _row_document(row: Row, source: Source, options: ReadOptions) -> Document:
    values, at = row
    column = options.text_column
    if column not in values and column == "text" and "messages" in values:
        column = "messages"
    if column not in values:
        raise _row_error(source, at, f"has no column {column}, only {_names(values)}: name one with text_column")
    domain = source.domain
    if not source.labelled:
        if options.domain_column != "domain" and options.domain_column not in values:
            hint = f"has no column {options.domain_column}, only {_names(values)}: name one with domain_column"
            raise _row_error(source, at, hint)
        named = values.get(options.domain_column)
        domain = source.domain if named is None else str(named).strip() or source.domain
    content = values[column]
    if content is None:
        content = ""
    if isinstance(content, list):
        content = [_message(message, source, at) for message in content]
    elif not isinstance(content, str):
        hint = f"column {column} holds a {type(content).__name__}: a text or a list of messages is due"
        raise _row_error(source, at, hint)
    try:
        (content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, default=str)).encode()
    except UnicodeEncodeError:  # JSON can spell it, UTF-8 cannot
        hint = f"column {column} holds half of a surrogate pair, which is no text: repair the row"
        raise _row_error(source, at, hint) from None
    return Document(content, domain, f"{source.name}{'@' if source.format == 'jsonl' else '#'}{at}")


def _message(message: Any, source: Source, at: int) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
        keys = _names(message) if isinstance(message, dict) else type(message).__name__
        raise _row_error(source, at, f"a message needs role and content, this one has {keys}: rename its keys")
    return {key: value for key, value in message.items() if value is not None or key == "content"}


def _names(values: dict[str, Any]) -> str:
    return ", ".join(sorted(map(str, values))) or "nothing"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _row_error(source: Source, at: int, message: str) -> CorpusError:
    return CorpusError(f"{_place(source, at)} {message}")


def _place(source: Source, at: int) -> str:
    """``file:line`` of a byte offset, or ``file row n``."""
    if source.format != "jsonl":
        return f"{source.name} row {at}"
    line, left = 1, at
    with open_source(source) as file:
        while left > 0 and (data := file.read(min(left, 1 << 20))):
            line += data.count(b"\n")
            left -= len(data)
    return f"{source.name}:{line}"
