"""Sources to documents, a span at a time.

A span is a stretch of a source that can be read without the rest: about 256 KiB of a text or JSON Lines file, a few
rows of a Parquet file. So a small sample of a large file is drawn from all over it, and nothing else is read. Gzip
files and hub datasets cannot be entered in the middle: they are one span, read from the beginning.

A text file is cut into documents of ``block`` bytes, each cut moved on to the next blank line (else line end, else
character) within 4 KiB. A file shorter than that is one document.
"""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Iterable, Iterator

from moescope.errors import CorpusError
from profiler.corpus.rows import parquet_height, row_documents
from profiler.corpus.sources import Document, ReadOptions, Source, open_source

SPAN = 1 << 18  # bytes
CUT_WINDOW = 4096  # bytes in which a cut looks for a blank line
OPEN_SPANS = 16  # spans of a domain that are read in turn
SHUFFLED = 1 << 20  # characters of a span that are shuffled at once

Span = tuple[Source, int, int]


def spans(source: Source, options: ReadOptions) -> list[Span]:
    """The spans of a source: together they hold each document once."""
    step, end = SPAN, source.size
    if source.compressed or source.format == "hub":
        return [(source, 0, -1)]
    if source.format == "text":
        step = max(1, SPAN // options.block) * options.block
    if source.format == "parquet":
        end = parquet_height(source)
        step = min(1024, max(1, end * SPAN // source.size))
    return [(source, start, min(start + step, end)) for start in range(0, end, step)]


def documents(span: Span, options: ReadOptions) -> Iterator[Document]:
    """The documents of a span, in the order of the file."""
    source, start, stop = span
    if source.format == "text":
        return _text_documents(source, start, stop, options.block)
    return row_documents(source, start, stop, options)


def shuffled(spans: list[Span], options: ReadOptions, rng: random.Random) -> Iterator[Document]:
    """All documents in an order drawn by ``rng``: the spans are shuffled, 16 are read in turn, each shuffled itself."""
    waiting = iter(rng.sample(spans, len(spans)))
    reading: deque[Iterator[Document]] = deque()
    while True:
        while len(reading) < OPEN_SPANS and (span := next(waiting, None)) is not None:
            reading.append(_shuffled_blocks(documents(span, options), rng))
        if not reading:
            return
        turn = reading.popleft()
        document = next(turn, None)
        if document is not None:
            reading.append(turn)
            yield document


def _shuffled_blocks(documents: Iterable[Document], rng: random.Random) -> Iterator[Document]:
    block: list[Document] = []
    size = 0
    for document in documents:
        block.append(document)
        size += document.size
        if size >= SHUFFLED:
            rng.shuffle(block)
            yield from block
            block, size = [], 0
    rng.shuffle(block)
    yield from block


def _text_documents(source: Source, start: int, stop: int, block: int) -> Iterator[Document]:
    with open_source(source) as file:
        at, ahead = start, b""  # where the next document begins, and bytes from there on that were read already
        if start:
            file.seek(start)
            window = file.read(CUT_WINDOW)
            at, ahead = start + _cut(window), window[_cut(window) :]
        for target in itertools.count(start + block, block):
            wanted = target + CUT_WINDOW - at
            data = ahead + file.read(wanted - len(ahead))
            cut = min(len(data), target - at + _cut(data[target - at :]))
            if cut:
                whole = at == 0 and cut == len(data) < wanted
                origin = source.name if whole else f"{source.name}@{at}"
                yield Document(_decode(data[:cut], source, at), source.domain, origin)
            at, ahead = at + cut, data[cut:]
            if not data or 0 <= stop <= target:
                return


def _cut(window: bytes) -> int:
    """Where to cut: after the first blank line, else line end, else character; at the end if the file ends there."""
    if len(window) < CUT_WINDOW:
        return len(window)
    for mark in (b"\n\n", b"\r\n\r\n", b"\n"):
        found = window.find(mark)
        if found >= 0:
            return found + len(mark)
    return next((i for i, byte in enumerate(window) if byte & 0xC0 != 0x80), 0)


def _decode(data: bytes, source: Source, offset: int) -> str:
    try:
        return data.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{source.name} is not UTF-8 (byte {data[error.start]:#04x} at offset {offset + error.start}):"
            " convert it, for example with iconv"
        ) from None
