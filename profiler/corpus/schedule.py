"""Which sequences are fed, and in what order.

The domain that was fed fewest tokens so far goes next, so any beginning of the order is balanced, and a domain that
runs out leaves its share to the others. Within a domain, documents come in an order drawn by the seed, and the
sequences of some 64 documents are dealt in turn. Documents are read only as far as the budget needs. All tokens are
written to a temporary file (4 bytes each) before the first is fed, so their number is exact and memory stays small.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import tempfile
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import IO

import numpy as np
from numpy.typing import NDArray

from moescope.errors import CorpusError
from profiler.corpus.readers import Span, shuffled, spans
from profiler.corpus.rows import names_domain
from profiler.corpus.sources import Document, ReadOptions, Source
from profiler.corpus.tokens import Cutter, Piece, Stream

MOST_DOMAINS = 256  # statistics are kept per domain: thousands of labels are a mistake
DISCOVERED = 1 << 22  # characters that are read ahead to learn which domains a column names
HELD = 1 << 26  # characters that may wait while a domain that is rare in a file is looked for
DOCUMENTS_AT_ONCE = 64  # documents tokenised at once, and the characters after which it is enough
CHARACTERS_AT_ONCE = 1 << 17


@dataclass
class Schedule:
    """Sequence i holds ``tokens[starts[i]:starts[i + 1]]``."""

    tokens: NDArray[np.uint32]  # (num_tokens,), backed by a file
    starts: NDArray[np.int64]  # (sequences + 1,)
    domains: list[str]  # (sequences,)
    origins: list[str]  # (sequences,)
    documents: Counter[str] = field(default_factory=Counter)  # per domain
    tokens_fed: Counter[str] = field(default_factory=Counter)  # per domain
    roles: Counter[str] = field(default_factory=Counter)  # messages per role
    domains_without_tokens: list[str] = field(default_factory=list)
    sha256: str = ""  # over each sequence's length and ids, as little-endian 32-bit numbers


class _Pool:
    """Documents of all sources, asked for by domain.

    Sources whose rows name their domain form one group (key None); the others a group per domain.
    """

    def __init__(self, sources: list[Source], options: ReadOptions, seed: int) -> None:
        groups: dict[str | None, list[Span]] = {}
        for source in sources:
            mixed = source.format != "text" and names_domain(source, options)
            groups.setdefault(None if mixed else source.domain, []).extend(spans(source, options))
        self._readers = {key: shuffled(group, options, random.Random(f"{seed}/{key}")) for key, group in groups.items()}
        self._held: dict[str, deque[Document]] = {}
        self._held_size = 0
        for key in groups:
            if key is not None:
                self._open_domain(key)
        while self._held_size < DISCOVERED and self._read_group(None):
            pass

    @property
    def domains(self) -> list[str]:
        return list(self._held)

    def take(self, domain: str) -> Document | None:
        """The next document of a domain; None if it has no more, or none within reach (see ``is_exhausted``)."""
        held = self._held[domain]
        while not held:
            if self._held_size >= HELD or not (self._read_group(domain) or self._read_group(None)):
                return None
        document = held.popleft()
        self._held_size -= document.size
        return document

    def is_exhausted(self, domain: str) -> bool:
        return not self._held[domain] and domain not in self._readers and None not in self._readers

    def _read_group(self, key: str | None) -> bool:
        document = next(self._readers[key], None) if key in self._readers else None
        if document is None:
            self._readers.pop(key, None)
            return False
        self._open_domain(document.domain).append(document)
        self._held_size += document.size
        return True

    def _open_domain(self, domain: str) -> deque[Document]:
        if domain not in self._held and len(self._held) == MOST_DOMAINS:
            raise CorpusError(
                f"the corpus has more than {MOST_DOMAINS} domains, such as {domain}:"
                " give files one label with LABEL=PATH, or name another domain_column"
            )
        return self._held.setdefault(domain, deque())


class _Domain:
    """The pieces of one domain, tokenised as they are asked for."""

    def __init__(self, name: str, pool: _Pool, cutter: Cutter) -> None:
        self._name, self._pool, self._cutter = name, pool, cutter
        self._stream = Stream()
        self._pieces: deque[Piece] = deque()

    def next(self) -> Piece | None:
        while not self._pieces and (documents := list(self._some_documents())):
            pieces = list(self._cutter.add(documents, self._stream))
            self._pieces.extend(pieces if self._cutter.packing else _dealt(pieces))
        if not self._pieces and self._pool.is_exhausted(self._name):
            self._pieces.extend(self._cutter.cut(self._stream, flush=True))
        return self._pieces.popleft() if self._pieces else None

    def _some_documents(self) -> Iterator[Document]:
        size = 0
        for document in islice(iter(lambda: self._pool.take(self._name), None), DOCUMENTS_AT_ONCE):
            yield document
            size += document.size
            if size >= CHARACTERS_AT_ONCE:
                return


def make_schedule(
    sources: list[Source], *, cutter: Cutter, options: ReadOptions, token_budget: int | None, seed: int
) -> Schedule:
    """Read, tokenise and order as many documents as the budget needs. Raises CorpusError if no token is left."""
    pool = _Pool(sources, options, seed)
    starts, domains, origins = [0], [], []
    documents: Counter[str] = Counter()
    fed: Counter[str] = Counter()
    roles: Counter[str] = Counter()
    digest = hashlib.sha256()
    with tempfile.TemporaryFile(buffering=0) as file:
        for domain, piece in _pieces(pool, cutter, fed, token_budget):
            ids = piece.ids.astype("<u4").tobytes()
            _append(file, ids)
            digest.update(len(piece.ids).to_bytes(4, "little") + ids)
            starts.append(starts[-1] + len(piece.ids))
            domains.append(domain)
            origins.append(piece.origin)
            documents[domain] += len(piece.begun)
            roles.update(role for document in piece.begun for role in document)
        if not domains:
            read = cutter.plain_texts + cutter.chats
            raise CorpusError(f"the corpus holds no token: {read} documents were read, all without text; give others")
        tokens = np.memmap(file, dtype="<u4", mode="r")
    unfed = [domain for domain in pool.domains if not fed[domain]]
    return Schedule(tokens, np.array(starts), domains, origins, documents, fed, roles, unfed, digest.hexdigest())


def _dealt(pieces: list[Piece]) -> list[Piece]:
    """First pieces of all documents, then second ones, and so on: no long document fills a small budget alone."""
    seen: Counter[str] = Counter()
    ranked = []
    for piece in pieces:
        ranked.append((seen[piece.origin], piece))
        seen[piece.origin] += 1
    return [piece for _, piece in sorted(ranked, key=lambda pair: pair[0])]


def _append(file: IO[bytes], data: bytes) -> None:
    try:
        if file.write(data) < len(data):  # unbuffered: a full disk may take a part
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        folder = tempfile.gettempdir()
        raise CorpusError(f"the tokens do not fit into {folder} ({error.strerror}): free space or set TMPDIR") from None


def _pieces(pool: _Pool, cutter: Cutter, fed: Counter[str], token_budget: int | None) -> Iterator[tuple[str, Piece]]:
    """Domain and piece in the order of feeding; the last piece is shortened to meet the budget."""
    lines: dict[str, _Domain] = {}
    left = token_budget
    while left is None or left > 0:
        for name in sorted(pool.domains, key=fed.__getitem__):
            line = lines.setdefault(name, _Domain(name, pool, cutter))
            piece = line.next()
            if piece is not None:
                break
        else:
            return
        if left is not None:
            if len(piece.ids) > left:
                piece = Piece(piece.ids[:left], piece.origin, piece.begun)
                if cutter.is_special(piece.ids).all():
                    return
            left -= len(piece.ids)
        fed[name] += len(piece.ids)
        yield name, piece
