"""Finding text in the kept tokens of a run: block by block, across the borders of tokens, for a limited time."""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moescope.errors import StoreError
from store.connection import Parameters

SECONDS = 5.0
"""That a search takes at most, about: it stops after the block of sequences in which they are over."""

BLOCK_TOKENS = 1 << 19
"""Tokens whose text is in memory at once."""

LONGEST = 500
"""Letters of an expression."""

AROUND = 60
"""Letters of text before and after a hit in a snippet."""

HITS = {
    "sequence": pl.Int64, "domain": pl.String, "tokens": pl.Int64, "hits": pl.Int64, "position": pl.Int64,
    "before": pl.String, "match": pl.String, "after": pl.String,
}  # fmt: skip

_META = frozenset("\\.+*?()|[]{}^$#&-~")
Query = Callable[[str, Parameters], pl.DataFrame]


@dataclass(frozen=True)
class TextSearch:
    """What a search found.

    Attributes:
        frame: one row per sequence with a hit: sequence, domain, tokens, hits, position of the token in which the first
            hit begins, and the text before it, of it and after it.
        searched: sequences that were looked at.
        sequences: that there are to look at; more than ``searched`` when the time was over.
    """

    frame: pl.DataFrame
    searched: int
    sequences: int

    @property
    def complete(self) -> bool:
        """Whether everything was looked at."""
        return self.searched == self.sequences


def expression(wanted: str, *, regex: bool) -> str:
    """The regular expression of a search: for words, their letters in either case with any space between them.

    Raises:
        StoreError: it is empty, too long, none, or matches the empty text.
    """
    if not wanted.strip():
        raise StoreError("nothing to search for: give some words, or a regular expression")
    if len(wanted) > LONGEST:
        raise StoreError(f"the search has {len(wanted):,} letters; it may have {LONGEST}")
    if not regex:
        words = ("".join(f"\\{one}" if one in _META else one for one in word) for word in wanted.split())
        return "(?i)" + r"\s+".join(words)
    try:
        # Borders of words and lines match nothing too, beside a letter.
        if (pl.Series(["", "a", " a\n"]).str.extract(wanted, 0) == "").any():
            raise StoreError(f"the expression {wanted!r} matches the empty text, which is everywhere: ask for a letter")
    except pl.exceptions.PolarsError as error:
        raise StoreError(
            f"{wanted!r} is no regular expression that can be searched ({_reason(str(error))}); look-around and "
            "back-references are left out, so that every search ends in time"
        ) from None
    return wanted


def _reason(message: str) -> str:
    """What the library says of an expression, without its drawing of where."""
    said = [line.partition("error: ")[2] for line in message.splitlines() if "error: " in line]
    return said[-1] if said else "too large"


def search(query: Query, numbers: pl.DataFrame, wanted: str, *, regex: bool, seconds: float) -> TextSearch:
    """Search the sequences of ``numbers`` (sequence, domain, tokens; ascending)."""
    pattern = expression(wanted, regex=regex)
    words = _words(query)
    until, searched, found = time.monotonic() + seconds, 0, []
    for block in _blocks(numbers):
        found.append(_in_block(query, block, words, pattern))
        searched += len(block)
        if time.monotonic() > until:
            break
    frame = pl.concat(found) if found else pl.DataFrame(schema=HITS)
    return TextSearch(frame, searched, len(numbers))


def token_spans(pieces: list[bytes], pattern: str) -> list[tuple[int, int]]:
    """First and last token of every hit in successive tokens; ``pattern`` from :func:`expression`."""
    text, ends = _text(pieces)
    # Hits are put between signs that stand for nothing in any text, since the library gives no places of all hits.
    plain = text.translate(_SIGNS_OUT)
    marked = str(pl.Series([plain]).str.replace_all(pattern, f"{_OPEN}${{0}}{_SHUT}").item())
    spans, at = [], 0
    for part in marked.split(_OPEN)[1:] if marked != plain else []:
        at = at or len(marked.split(_OPEN, 1)[0].encode())
        hit, rest = part.split(_SHUT, 1)
        length = len(hit.encode())
        first, last = np.searchsorted(ends, [at, at + max(length - 1, 0)], side="right").tolist()
        spans.append((first, last))
        at += length + len(rest.encode())
    return spans


_OPEN, _SHUT = "\ufdd0", "\ufdd1"  # Unicode says that these are no characters
_SIGNS_OUT = {ord(_OPEN): "\ufffd", ord(_SHUT): "\ufffd"}


def _blocks(numbers: pl.DataFrame) -> Iterator[pl.DataFrame]:
    ends = np.cumsum(numbers["tokens"].to_numpy(), dtype=np.int64)
    edges = np.flatnonzero(np.diff(ends // BLOCK_TOKENS)) + 1
    for low, high in zip([0, *edges.tolist()], [*edges.tolist(), len(numbers)], strict=True):
        if high > low:
            yield numbers[low:high]


def _words(query: Query) -> NDArray[np.object_]:
    """The bytes of every token id, b"" where there are none; the last entry stands for all larger ids."""
    table = query("select token_id, bytes from vocabulary where bytes is not null", None)
    size = int(table["token_id"].to_numpy().max(initial=0)) + 2
    words: NDArray[np.object_] = np.full(size, b"", dtype=np.object_)
    words[table["token_id"].to_numpy()] = table["bytes"].to_list()
    return words


def _in_block(query: Query, block: pl.DataFrame, words: NDArray[np.object_], pattern: str) -> pl.DataFrame:
    """Rows of :data:`HITS` of some sequences."""
    rows = query(
        "select sequence, token_ids from sequence_token where sequence between ? and ? order by sequence, start",
        [int(block["sequence"][0]), int(block["sequence"][-1])],
    )
    joined = rows.group_by("sequence", maintain_order=True).agg(pl.col("token_ids").explode())
    joined = joined.with_columns(pl.col("sequence").cast(pl.Int64))
    joined = joined.join(block.with_columns(pl.col("sequence").cast(pl.Int64)), on="sequence")
    ids = [part.to_numpy() for part in joined["token_ids"]]
    raw = [b"".join(words[np.minimum(one, len(words) - 1)].tolist()) for one in ids]
    texts = pl.Series([one.decode("utf-8", "replace") for one in raw], dtype=pl.String)
    counted = pl.DataFrame(
        {"index": np.arange(len(ids)), "text": texts, "hits": texts.str.count_matches(pattern).cast(pl.Int64)}
    ).filter(pl.col("hits") > 0)
    counted = counted.with_columns(
        pl.col("text").str.find(pattern).alias("at"), pl.col("text").str.extract(pattern, 0).alias("match")
    )
    found = []
    for index, text, hits, at, match in counted.select("index", "text", "hits", "at", "match").iter_rows():
        _, ends = _text(words[np.minimum(ids[index], len(words) - 1)].tolist())
        position = int(np.searchsorted(ends, at, side="right"))
        start = len(text.encode()[:at].decode())
        stop = start + len(match)
        row = joined.row(index, named=True)
        around = text[max(start - AROUND, 0) : start], match[: 2 * AROUND], text[stop : stop + AROUND]
        found.append((row["sequence"], row["domain"], row["tokens"], hits, position, *around))
    return pl.DataFrame(found, schema=HITS, orient="row")


def _text(pieces: list[bytes]) -> tuple[str, NDArray[np.int64]]:
    """The text of successive tokens, and after how many bytes of its UTF-8 each ends."""
    raw = b"".join(pieces)
    try:
        return raw.decode("utf-8"), np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
    except UnicodeDecodeError:
        # What is no UTF-8 becomes U+FFFD, which has other lengths.
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        parts = [decoder.decode(piece, final=index == len(pieces) - 1) for index, piece in enumerate(pieces)]
        lengths = [len(part.encode()) for part in parts]
        return "".join(parts), np.cumsum(lengths, dtype=np.int64)
