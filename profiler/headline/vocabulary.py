"""Specialization of experts in single tokens, beside shuffled token ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from profiler.headline.subject import Rows, Sample, Subject, as_text
from profiler.metrics import specialization
from profiler.metrics._intervals import jackknife
from profiler.metrics.specialization import FIRST_CHOICE_OCCURRENCES, TokenIndex
from store import part_of_sequence

SAMPLE_TOKENS = 131_072
"""Tokens of whole sequences, drawn at random, on which vocabulary specialization rests."""

MIN_OCCURRENCES = (1, 10)
"""Occurrences that a token id needs: OLMoE's figures take all ids, its lists those with ten."""

CONFIDENCE = 0.95
SHUFFLED = ("shuffled_in_sequence", "shuffled")

Values = NDArray[np.float64]


def vocabulary_rows(subject: Subject) -> Rows:
    """Both forms of vocabulary specialization, of every MoE layer and of the model; the second of every expert too.

    For the tokens that go in, those that the model predicts, and those that really follow. Controls: token ids shuffled
    over the text, and inside each sequence. Nothing for a run without a trace or without token ids.
    """
    if not subject.has_trace or not subject.run.has_tokens:
        return []
    sample = subject.sample(SAMPLE_TOKENS)
    rows: Rows = []
    for name, token_ids in token_kinds(sample).items():
        texts = _texts(sample, token_ids)
        known = np.flatnonzero(token_ids >= 0)
        texts_with = np.unique(np.searchsorted(sample.block.offsets, known, side="right"))
        place: dict[str, Any] = {"tokens": len(known), "sequences": len(texts_with)}
        place["parameters"] = as_text({"tokens": name})
        totals: dict[str, list[_Layer]] = {control: [] for control in texts}
        for axis, layer in enumerate(subject.run.layers):
            ids = sample.ids(axis)
            for control, indices in texts.items():
                found = _Layer.of(ids, indices, layer.num_experts)
                totals[control].append(found)
                where = {**place, "control": control, "layer": layer.layer, "step": layer.step}
                rows += _rows(found.vocabulary, found.first_choice, where)
                if control == "observed":
                    rows += _expert_rows(found.first_choice[0], where)
        for control, layers in totals.items():
            vocabulary = np.mean([layer.vocabulary for layer in layers], axis=0)
            first_choice = np.concatenate([layer.first_choice for layer in layers], axis=1)
            rows += _rows(vocabulary, first_choice, {**place, "control": control})
    return [row for row in rows if np.isfinite(row["value"])]


def token_kinds(sample: Sample) -> dict[str, NDArray[np.int32]]:
    """Ids of the tokens of a sample, (tokens,), -1 = none: input, next, and predicted where the run has it."""
    parts: dict[str, list[NDArray[np.int32]]] = {"input": [], "predicted": [], "next": []}
    for block in sample.subject.blocks:
        read = sample.subject.run.token_ids(first=int(block.sequences[0]), last=int(block.sequences[-1]))
        kept = np.repeat(np.isin(read.sequences, sample.block.sequences), np.diff(read.offsets))
        for name, ids in (("input", read.ids), ("predicted", read.predicted), ("next", read.following)):
            parts[name].append(ids[kept])
    whole = {name: np.concatenate(ids) for name, ids in parts.items()}
    return {name: ids for name, ids in whole.items() if (ids >= 0).any()}


def _texts(sample: Sample, token_ids: NDArray[np.int32]) -> dict[str, list[TokenIndex]]:
    """Indices of a text by control; of the observed one followed by those without each part of its sequences."""
    part = np.repeat(part_of_sequence(sample.block.sequences) // 2, sample.block.lengths)  # eighths: half the work
    observed = [TokenIndex.of(token_ids)]
    if len(present := np.unique(part)) > 1:
        observed += [TokenIndex.of(token_ids, kept=part != one) for one in present]
    shuffled = {control: [TokenIndex.of(token_ids[sample.order(control)])] for control in SHUFFLED}
    return {"observed": observed, **shuffled}


@dataclass(frozen=True)
class _Layer:
    """Figures of one layer, of the whole text first and then without each part of it.

    vocabulary (1 + parts, minima): by least number of occurrences. first_choice (1 + parts, experts).
    """

    vocabulary: Values
    first_choice: Values

    @classmethod
    def of(cls, ids: NDArray[np.int16], indices: list[TokenIndex], num_experts: int) -> _Layer:
        vocabulary, first_choice = [], []
        first = np.ascontiguousarray(ids[:, :1])
        for index in indices:
            counts = specialization.vocabulary_counts(ids=ids, index=index, num_experts=num_experts)
            vocabulary.append(
                [specialization.vocabulary_specialization(counts=counts, min_occurrences=n) for n in MIN_OCCURRENCES]
            )
            firsts = specialization.vocabulary_counts(ids=first, index=index, num_experts=num_experts)
            first_choice.append(specialization.first_choice_vocabulary(counts=firsts, num_experts=num_experts))
        return cls(np.array(vocabulary), np.array(first_choice))


def _rows(vocabulary: Values, first_choice: Values, place: dict[str, Any]) -> Rows:
    """Rows of one layer or of the model, with intervals where the text was cut into parts."""
    rows = [
        {**place, "metric": "vocabulary_specialization", "at": float(least), **_ranged(vocabulary[:, index])}
        for index, least in enumerate(MIN_OCCURRENCES)
    ]
    known = np.isfinite(first_choice)
    mean = np.where(known, first_choice, 0.0).sum(axis=1) / np.maximum(known.sum(axis=1), 1)
    mean = np.where(known.any(axis=1), mean, np.nan)
    at = float(FIRST_CHOICE_OCCURRENCES)
    return [*rows, {**place, "metric": "first_choice_vocabulary", "at": at, **_ranged(mean)}]


def _ranged(values: Values) -> dict[str, float]:
    """A value and its interval; values (1 + parts,), the whole text first."""
    found = {"value": float(values[0])}
    if len(values) > 2 and np.isfinite(values).all():
        low, high = jackknife(estimate=values[0], without=values[1:], confidence=CONFIDENCE)
        found |= {"low": max(float(low), 0.0), "high": min(float(high), 1.0)}
    return found


def _expert_rows(values: Values, place: dict[str, Any]) -> Rows:
    at = float(FIRST_CHOICE_OCCURRENCES)
    return [
        {**place, "metric": "first_choice_vocabulary", "at": at, "expert": expert, "value": value}
        for expert, value in enumerate(values.tolist())
    ]
