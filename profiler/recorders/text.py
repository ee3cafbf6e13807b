"""Token ids of the sequences and the bytes that they stand for: tables ``sequence_token`` and ``vocabulary``."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from profiler.capture.batch import Tokens
from profiler.capture.inputs import MODALITIES

CHUNK_TOKENS = 512
"""Tokens per row of ``sequence_token``."""


class TextRecorder:
    """Keeps the token ids of every sequence, and the vocabulary that occurs.

    Args:
        tokenizer: a tokenizer of transformers; it says which tokens are special and what each stands for.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = np.array(sorted(tokenizer.all_special_ids), dtype=np.int64)
        self.bytes_held = 0
        self._parts: list[tuple[NDArray[np.int64], ...]] = []
        self._written: set[int] = set()

    def update(self, tokens: Tokens, input_ids: Tensor, predicted: NDArray[np.int32] | None = None) -> None:
        """Add the real tokens of a forward.

        Args:
            tokens: whose they are.
            input_ids: (batch, length) with padding.
            predicted: (tokens,) the most likely next tokens; None where nobody asked.
        """
        ids = tokens.select(input_ids.reshape(-1))
        modality = torch.zeros_like(ids) if tokens.modality is None else tokens.modality
        parts = [part.cpu().numpy() for part in (tokens.sequence, tokens.position, ids, modality)]
        parts.append(np.full(len(parts[0]), -1) if predicted is None else predicted)
        self._parts.append(tuple(part.astype(np.int64) for part in parts))
        self.bytes_held += sum(part.nbytes for part in self._parts[-1])

    def begin_part(self) -> None:
        """What comes is described anew: another part may be lost, or be read by others."""
        self._written.clear()

    def drain(self) -> dict[str, pl.DataFrame]:
        """Tables ``sequence_token`` and ``vocabulary``; a token id is described once per session or part."""
        if not self._parts:
            return {}
        columns = [np.concatenate([part[index] for part in self._parts]) for index in range(5)]
        sequence, position, ids, modality, predicted = columns
        self._parts.clear()
        self.bytes_held = 0
        if not len(ids):
            return {}
        order = np.lexsort((position, sequence))
        sequence, position, ids, modality, predicted = (column[order] for column in columns)
        special = np.isin(ids, self._special)
        edges = chunk_edges(sequence, position)
        bounds = list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))
        seen = np.union1d(ids, predicted[predicted >= 0])
        fresh = sorted(set(seen.tolist()) - self._written)
        self._written.update(fresh)
        chunks = pl.DataFrame(
            {
                "sequence": sequence[edges[:-1]],
                "start": position[edges[:-1]],
                "token_ids": [ids[a:b].tolist() for a, b in bounds],
                "special": [special[a:b].tolist() for a, b in bounds],
                "modality": [_named(modality[a:b]) for a, b in bounds],
                "predicted": [_known(predicted[a:b]) for a, b in bounds],
            },
            schema_overrides={"modality": pl.List(pl.String), "predicted": pl.List(pl.UInt32)},
        )
        pieces = [token_bytes(self._tokenizer, token) for token in fresh]
        words = pl.DataFrame({"token_id": fresh, "bytes": pl.Series(pieces, dtype=pl.Binary)})
        return {"sequence_token": chunks, "vocabulary": words}


def _named(modality: NDArray[np.int64]) -> list[str] | None:
    """What each token stands for; None where all are text."""
    return [MODALITIES[kind] for kind in modality] if modality.any() else None


def _known(predicted: NDArray[np.int64]) -> list[int | None] | None:
    """The predicted tokens of a chunk; None where nobody asked."""
    return [token if token >= 0 else None for token in predicted.tolist()] if (predicted >= 0).any() else None


def chunk_edges(sequence: NDArray[np.int64], position: NDArray[np.int64]) -> NDArray[np.int64]:
    """(chunks + 1,) bounds of runs of one sequence at successive positions, at most ``CHUNK_TOKENS`` long."""
    broken = (np.diff(sequence) != 0) | (np.diff(position) != 1)
    starts = np.concatenate([[0], np.flatnonzero(broken) + 1])
    run = np.arange(len(sequence)) - np.repeat(starts, np.diff(np.append(starts, len(sequence))))
    return np.append(np.flatnonzero(run % CHUNK_TOKENS == 0), len(sequence))


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """The UTF-8 bytes that a token id stands for, which may be a part of a character.

    Byte-level vocabularies (GPT-2 and its heirs) are mapped back byte by byte, SentencePiece ones by their ``<0xNN>``
    pieces and their mark for a space; anything else is what the tokenizer decodes.
    """
    piece = tokenizer.convert_ids_to_tokens(int(token))
    if piece is None:
        return b""
    if token in tokenizer.all_special_ids:
        return str(piece).encode()
    if (match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece)) is not None:
        return bytes([int(match[1], 16)])
    if _is_byte_level(tokenizer):
        letters = _byte_letters()
        if all(letter in letters for letter in piece):
            return bytes(letters[letter] for letter in piece)
        return str(piece).encode()
    if "\u2581" in piece or _uses_space_mark(tokenizer):
        return str(piece).replace("\u2581", " ").encode()
    return str(tokenizer.decode([int(token)], clean_up_tokenization_spaces=False)).encode()


def _is_byte_level(tokenizer: Any) -> bool:
    cached = tokenizer.__dict__.get("_moescope_byte_level")
    if cached is None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        described = str(backend.decoder) + str(backend.pre_tokenizer) if backend is not None else ""
        cached = tokenizer.__dict__["_moescope_byte_level"] = "ByteLevel" in described
    return bool(cached)


def _uses_space_mark(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = [getattr(backend, name, "") for name in ("decoder", "normalizer", "pre_tokenizer")]
    return "\u2581" in "".join(map(str, parts))


@cache
def _byte_letters() -> dict[str, int]:
    """The letters by which byte-level vocabularies write bytes: printable ones as themselves, others from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    letters.update({chr(0x100 + place): byte for place, byte in enumerate(others)})
    return letters
