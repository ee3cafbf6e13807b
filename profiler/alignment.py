"""Which sequences two runs share, token by token, or the reason why they cannot be compared."""

from __future__ import annotations

import hashlib
import itertools
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

import store
from moescope.errors import InputError
from profiler.expert_pairs import LayerPair, Made, pair_layers

BLOCK_TOKENS = 1 << 18
"""Tokens, with padding, that are in memory at once, of one layer of both runs."""

STRETCHES = 16
"""Of a part of the pairs."""

BY_POSITION = "--by-position pairs sequences of the same number and length whatever their tokens are"


@dataclass(frozen=True)
class Alignment:
    """The sequences that two runs share, token by token.

    pairs (sequences, 2): their numbers in the first and in the second run, ascending in the first. lengths
    (sequences,): tokens. by: what was compared, "token ids" or "position". left_out: sequences of each without partner.
    layers: the MoE layers of both. of_tokens: tokens that they share, where these pairs are a part of them; None = all.
    """

    first: store.Run
    second: store.Run
    pairs: NDArray[np.int64]
    lengths: NDArray[np.int64]
    by: str
    left_out: tuple[int, int]
    layers: list[LayerPair]
    of_tokens: int | None = None

    @property
    def tokens(self) -> int:
        """Tokens that are compared."""
        return int(self.lengths.sum())

    def part(self, tokens: int) -> Alignment:
        """About so many tokens at most: stretches of successive pairs, evenly apart; at least one pair of each."""
        if self.tokens <= tokens:
            return self
        ends = np.cumsum(self.lengths)
        kept = np.zeros(len(self.lengths), np.bool_)
        for begin in np.linspace(0, self.tokens, STRETCHES, endpoint=False):
            low, high = np.searchsorted(ends, [begin, begin + tokens / STRETCHES], side="right")
            kept[low : max(int(high), int(low) + 1)] = True
        return replace(self, pairs=self.pairs[kept], lengths=self.lengths[kept], of_tokens=self.tokens)

    @cached_property
    def domains(self) -> NDArray[np.str_]:
        """(sequences,) domain of each pair, as the first run labels it."""
        labels = dict(self.first.table("sequence").select("sequence", "domain").iter_rows())
        return np.array([labels[number] for number in self.pairs[:, 0].tolist()])

    @cached_property
    def blocks(self) -> list[slice]:
        """Successive pairs of at most ``BLOCK_TOKENS`` tokens were all as long as the longest (or one longer pair)."""
        edges, longest = [0], 0
        for index, length in enumerate(self.lengths.tolist()):
            longest = max(longest, length)
            if index > edges[-1] and longest * (index + 1 - edges[-1]) > BLOCK_TOKENS:
                edges.append(index)
                longest = length
        return [slice(low, high) for low, high in itertools.pairwise([*edges, len(self.lengths)])]


def align(first: store.Run, second: store.Run, *, by_position: bool = False, made: Made | None = None) -> Alignment:
    """Pair the sequences of two runs that have the same token ids (or, of imports that know texts of tokens alone, the
    same texts token by token), in any order, each once.

    by_position: pair sequences of the same number and length instead, for runs that keep no token ids.
    made: how the model of one run was made of the other's, where experts or layers went; experts are then compared by
    their numbers in the original.

    Raises:
        InputError: a run has no trace or no order of tokens, their MoE layers or experts differ in number, their
            tokenizers differ, a run keeps no token ids, or no sequence is common.
    """
    for run in (first, second):
        _require_trace(run)
    layers = pair_layers(first, second, made)
    if by_position:
        pairs, lengths = _by_position(first, second)
    else:
        _require_token_ids(first, second)
        pairs, lengths = _by_tokens(first, second)
    left_out = first.info.sequences - len(pairs), second.info.sequences - len(pairs)
    by = "position" if by_position else "token ids"
    return Alignment(first, second, pairs, lengths, by, left_out, layers)


def token_ids(run: store.Run, numbers: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int32]]]:
    """Token ids of each sequence, in the order of ``numbers``, which rise."""
    for part in np.split(numbers, np.flatnonzero(np.diff(numbers) > 64) + 1):
        found = run.token_ids(first=int(part[0]), last=int(part[-1]))
        for number, place in zip(part.tolist(), np.searchsorted(found.sequences, part).tolist(), strict=True):
            yield number, found.ids[found.offsets[place] : found.offsets[place + 1]]


def _by_position(first: store.Run, second: store.Run) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    lengths = [dict(run.traced_sequences.select("sequence", "tokens").iter_rows()) for run in (first, second)]
    common = [number for number in sorted(lengths[0]) if lengths[0][number] == lengths[1].get(number) != 0]
    if not common:
        raise InputError(
            f"runs {first.name!r} and {second.name!r} have no sequence of the same number and length: "
            f"{len(lengths[0])} and {len(lengths[1])} sequences"
        )
    numbers = np.array(common, np.int64)
    return np.stack([numbers, numbers], axis=1), np.array([lengths[0][number] for number in common], np.int64)


def _by_tokens(first: store.Run, second: store.Run) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    waiting: defaultdict[bytes, deque[int]] = defaultdict(deque)
    for number, mark, _ in _marks(second, _translation(first, second)):
        waiting[mark].append(number)
    pairs, lengths = [], []
    for number, mark, length in _marks(first):
        if waiting.get(mark):
            pairs.append((number, waiting[mark].popleft()))
            lengths.append(length)
    if not pairs:
        raise InputError(
            f"runs {first.name!r} ({first.info.sequences} sequences) and {second.name!r} ({second.info.sequences}) "
            f"have no sequence of the same tokens{_difference(first, second)}; collect both on the same text"
        )
    return np.array(pairs, np.int64), np.array(lengths, np.int64)


def _translation(first: store.Run, second: store.Run) -> NDArray[np.int32] | None:
    """The first run's id for each id of the second, -1 = none, where an import numbered its token texts itself; None
    where both have the tokenizer's own ids, which must mean the same in both."""
    one, other = (dict(run.table("vocabulary").iter_rows()) for run in (first, second))
    if not any(run.info.settings.get("token_ids_by_text") for run in (first, second)):
        _require_same_tokenizer(first, second, one, other)
        return None
    names = {piece: token for token, piece in one.items() if piece}
    result = np.full(max(other, default=-1) + 1, -1, np.int32)
    for token, piece in other.items():
        result[token] = names.get(piece, -1)
    return result


def _marks(run: store.Run, translation: NDArray[np.int32] | None = None) -> Iterator[tuple[int, bytes, int]]:
    """Number, fingerprint and length of every sequence whose tokens are all known."""
    table = run.traced_sequences
    numbers, ends = table["sequence"].to_numpy().astype(np.int64), np.cumsum(table["tokens"].to_numpy(), dtype=np.int64)
    for part in np.split(numbers, np.flatnonzero(np.diff(ends // BLOCK_TOKENS)) + 1):
        for number, ids in token_ids(run, part):
            if translation is not None:
                ids = np.where(ids < 0, np.int32(-1), translation[ids])
            if len(ids) and ids.min() >= 0:
                yield number, hashlib.blake2b(ids.tobytes(), digest_size=16).digest(), len(ids)


def _difference(first: store.Run, second: store.Run) -> str:
    """Where the first sequence of two runs begins to differ, as the end of a sentence."""
    one, other = (next(token_ids(run, run.traced_sequences["sequence"].to_numpy()[:1]))[1] for run in (first, second))
    common = min(len(one), len(other))
    apart = np.flatnonzero(one[:common] != other[:common])
    if not len(apart):
        return f": their first sequences have {len(one)} and {len(other)} tokens"
    at = int(apart[0])
    pieces = first.token_bytes([int(one[at])]), second.token_bytes([int(other[at])])
    words = [_quoted(piece.get(int(ids[at]), b"")) for piece, ids in zip(pieces, (one, other), strict=True)]
    return f": the first ones differ from token {at} on, id {one[at]} {words[0]} and id {other[at]} {words[1]}"


def _quoted(piece: bytes) -> str:
    return repr(piece.decode(errors="replace")[:20])


def _require_trace(run: store.Run) -> None:
    for subject in ("trace", "order"):
        if subject in run.omissions:
            raise InputError(f"run {run.name!r} has no tokens to compare: {run.omissions[subject]}")
    if not run.has_trace:
        raise InputError(f"run {run.name!r} has no trace yet; compare it when tokens have been collected")


def _require_token_ids(first: store.Run, second: store.Run) -> None:
    for run in (first, second):
        if not run.has_tokens:
            reason = run.omissions.get("text", "it was collected with --no-text").rstrip(".")
            raise InputError(f"run {run.name!r} keeps no token ids ({reason}); {BY_POSITION}")


def _require_same_tokenizer(
    first: store.Run, second: store.Run, one: dict[int, bytes], other: dict[int, bytes]
) -> None:
    shared = [token for token in sorted(one.keys() & other.keys()) if one[token] and other[token]]
    apart = [token for token in shared if one[token] != other[token]]
    if apart:
        token = apart[0]
        raise InputError(
            f"runs {first.name!r} and {second.name!r} have different tokenizers: id {token} is {_quoted(one[token])} "
            f"in one and {_quoted(other[token])} in the other ({len(apart):,} of {len(shared):,} common ids differ)"
        )
