"""What a reader of another engine's files hands over: labelled blocks of tokens, or of counts, and what is missing.

A reader checks what it reads and yields blocks of bounded size, so that a file of any length passes through; nothing of
it is written before the first block has been read without complaint.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import store
from moescope import memory

BLOCK_TOKENS = 1 << 15
"""Tokens per block that readers aim at: of 48 layers with 8 experts each, 25 MiB of ids and 50 MiB of weights."""

ENTRY_BYTES = 48
"""Bytes that an id and its weight take while a block is read, checked, packed and written."""


def block_tokens(entries: int) -> int:
    """Tokens per block under the memory limit, where there is one.

    Args:
        entries: ids per token, over all layers.
    """
    entry = entries * ENTRY_BYTES
    return max(memory.share(memory.IMPORT_BLOCK, BLOCK_TOKENS * entry) // entry, 1)


@dataclass(frozen=True)
class ImportOptions:
    """What the user says about a file that the file may not say itself.

    Attributes:
        config: the model's configuration (content of config.json); empty where none was given.
        model: name of the model for the run; empty = from the configuration or the file.
        num_experts: routed experts per layer; 0 = from the file or the configuration.
        top_k: experts per token; 0 = likewise.
        domain: label of sequences that the file does not label.
        phase: phase of tokens that the file does not tell apart, "prompt" or "decode".
        extra: files that belong to some formats: ``physical_to_logical`` (a map of replicas), ``tokens`` (token texts).
    """

    config: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    num_experts: int = 0
    top_k: int = 0
    domain: str = "imported"
    phase: str = "decode"
    extra: dict[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class SequenceLabel:
    """What is known of a sequence; the importer counts its tokens."""

    domain: str
    source: str = ""


@dataclass(frozen=True)
class TraceBlock:
    """Selections of some tokens in all layers of the recording.

    Attributes:
        ids: (layers, tokens, k) integers, logical expert ids, -1 = none. In descending weight; where the source
            keeps no order or no weights, as it stands (``weights`` is None then, and the omissions say so).
        weights: same shape, float, combine weights; None where the source has none.
        sequence: (tokens,) number of the sequence, from 0.
        position: (tokens,) position inside it, from 0; each (sequence, position) occurs once in a recording.
        generated: (tokens,) bool, true for tokens that were decoded, false for the prompt's.
        token_ids: (tokens,) ids in the model's vocabulary; None where the source has none.
    """

    ids: NDArray[np.integer[Any]]
    weights: NDArray[np.floating[Any]] | None
    sequence: NDArray[np.int64]
    position: NDArray[np.int64]
    generated: NDArray[np.bool_]
    token_ids: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class CountBlock:
    """Selections per expert, counted by the source over spans of time.

    Attributes:
        counts: (spans, layers, experts) integers, logical experts.
        spans: (spans,) their numbers in the order of time, from 0; each occurs once in a recording. A source that
            counts everything once has the single span 0.
        domain: label of the text.
    """

    counts: NDArray[np.integer[Any]]
    spans: NDArray[np.int64]
    domain: str = "imported"


@dataclass
class Recording:
    """One source, opened: what it is about, and an iterator over its content.

    Attributes:
        layers: what is routed where, in the order of the blocks' layer axis; all have the same ``num_experts``.
        blocks: read lazily; raises :class:`moescope.errors.ImportFileError` where the file is damaged.
        labels: sequence number -> label, filled at the latest when the sequence's first block is yielded; sequences
            that are not in it get the options' domain.
        model: the name that the file gives the model, if any.
        total_tokens: tokens in the file where it says so before it is read, for the progress line; 0 = unknown.
        omissions: subject (see table ``omission``) -> why this source cannot say it.
        notes: (name, status "pass" | "warning", detail) of the reader's own checks: rows of table ``check``.
        settings: facts of the source for the run's settings (engine, window, files).
        vocabulary: token id -> UTF-8 bytes, for sources that carry text.
    """

    layers: list[store.LayerInfo]
    blocks: Iterator[TraceBlock | CountBlock]
    labels: dict[int, SequenceLabel] = field(default_factory=dict)
    model: str = ""
    total_tokens: int = 0
    omissions: dict[str, str] = field(default_factory=dict)
    notes: list[tuple[str, str, str]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    vocabulary: dict[int, bytes] = field(default_factory=dict)
