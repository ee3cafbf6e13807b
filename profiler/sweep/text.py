"""The text of a sweep: what is judged, and apart from it what figures such as ODP's medians are taken from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from moescope.errors import CorpusError, InputError
from profiler.corpus import TokenBatch

SHARE = 0.2
"""Of each domain's sequences, the part that only calibrates, if nobody says otherwise."""


@dataclass(frozen=True)
class Text:
    """Sequences in two parts that share none.

    Attributes:
        judged: what every figure of loss is of.
        calibration: the first sequences of each domain; empty where a domain has one only.
    """

    judged: list[TokenBatch]
    calibration: list[TokenBatch]

    @property
    def domains(self) -> list[str]:
        """Of the judged sequences, in their order."""
        return list(dict.fromkeys(domain for batch in self.judged for domain in batch.domains))

    @property
    def tokens(self) -> int:
        """Of the judged sequences."""
        return sum(int(batch.attention_mask.sum()) for batch in self.judged)

    @property
    def calibration_tokens(self) -> int:
        """Of the others."""
        return sum(int(batch.attention_mask.sum()) for batch in self.calibration)


def divide(batches: Iterable[TokenBatch], *, share: float = SHARE) -> Text:
    """The first sequences of each domain calibrate, the others are judged.

    Args:
        batches: the whole text.
        share: part of each domain's sequences that calibrates, rounded up; one sequence at least is judged.

    Raises:
        CorpusError: no sequence of two tokens or more.
        InputError: a share outside 0..0.9.
    """
    if not 0.0 <= share <= 0.9:
        raise InputError(f"--calibration {share:g}: give a part of the text from 0 to 0.9")
    held = list(batches)
    members: dict[str, list[int]] = {}
    for batch in held:
        for sequence, domain in zip(batch.sequences.tolist(), batch.domains, strict=True):
            members.setdefault(domain, []).append(sequence)
    first = {
        sequence
        for found in members.values()
        for sequence in sorted(found)[: min(len(found) - 1, int(np.ceil(share * len(found))))]
    }
    parts = Text(*[[kept for batch in held if (kept := _only(batch, first, inside))] for inside in (False, True)])
    if not any((batch.attention_mask.sum(1) > 1).any() for batch in parts.judged):
        raise CorpusError("nothing to predict: the text has no sequence of two tokens or more")
    return parts


def _only(batch: TokenBatch, chosen: set[int], inside: bool) -> TokenBatch | None:
    """The sequences of a batch that are chosen (or are not), without columns of padding; None if there is none."""
    rows = [row for row, sequence in enumerate(batch.sequences.tolist()) if (sequence in chosen) == inside]
    if not rows:
        return None
    mask = batch.attention_mask[rows]
    end = max(1, int(mask.sum(1).max()))
    return TokenBatch(
        input_ids=batch.input_ids[rows, :end],
        attention_mask=mask[:, :end],
        special=batch.special[rows, :end],
        sequences=batch.sequences[rows],
        domains=[batch.domains[row] for row in rows],
        sources=[batch.sources[row] for row in rows],
    )
