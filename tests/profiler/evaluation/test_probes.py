"""Probes on models with planted behaviour: who copies copies, who calculates calculates, and nobody else does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from profiler.corpus import TokenBatch, open_corpus
from profiler.evaluation import context_probes, evaluate, text_probes
from profiler.evaluation.probes import ENOUGH, TITLES, Probe, summarize
from tests.profiler.capture.tiny import tokenizer
from tests.profiler.evaluation.planted import Planted, copier, ignorant

WORDS = tokenizer()
SIZE = len(WORDS)


def corpus(folder: Any, texts: dict[str, list[str]], length: int = 200) -> Any:
    for name, lines in texts.items():
        (folder / f"{name}.txt").write_text("\n\n".join(lines), encoding="utf-8")
    return open_corpus([folder / f"{name}.txt" for name in texts], tokenizer=WORDS, sequence_length=length)


def probes(model: Any, base: Any, found: Any) -> dict[str, Probe]:
    skip = ["routing", "generation", "speed"]
    result = evaluate(model, base, found.batches, tokenizer=WORDS, skip=skip)
    assert [one.name for one in result.probes] == list(TITLES)
    return {one.name: one for one in result.probes}


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Any:
    rng = np.random.default_rng(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    lines = [" ".join("".join(rng.choice(list(letters), 5)) for _ in range(30)) for _ in range(6)]
    return corpus(tmp_path_factory.mktemp("prose"), {"one": lines, "two": [line.upper() for line in lines]})


def test_a_model_that_copies(prose: Any) -> None:
    found = probes(Planted(copier, SIZE), Planted(ignorant, SIZE), prose)
    copying, retrieval = found["copying"], found["retrieval"]
    assert copying.items == 2 * context_probes.ITEMS * (context_probes.SPAN - context_probes.GIVEN)
    # Three tokens are a key that rarely stands elsewhere: nearly all of the span is copied.
    assert copying.accuracy.value > 0.95 and copying.base_accuracy.value < 0.05
    assert copying.difference.low > 0.8
    assert set(copying.per_domain) == {"one", "two"}
    assert retrieval.accuracy.value > 0.9 and retrieval.base_accuracy.value < 0.05
    assert retrieval.items == 2 * context_probes.ITEMS * context_probes.VALUE
    backwards = probes(Planted(ignorant, SIZE), Planted(copier, SIZE), prose)
    assert backwards["copying"].difference.value == pytest.approx(-copying.difference.value)


def test_equal_models_do_not_differ(prose: Any) -> None:
    for one in probes(Planted(copier, SIZE), Planted(copier, SIZE), prose).values():
        if one.items:
            assert (one.difference.value, one.difference.low, one.difference.high) == (0.0, 0.0, 0.0)


def calculates(seen: Sequence[int]) -> int:
    """The results of sums, digit by digit; else 0."""
    line = WORDS.decode(seen, skip_special_tokens=True).rsplit("\n", 1)[-1]
    left, mark, right = line.partition("= ")
    parts = [part.strip() for part in left.split("+")]
    if not mark or len(parts) < 2 or not all(part.isdigit() for part in parts):
        return 0
    result = str(sum(map(int, parts)))
    return int(WORDS.convert_tokens_to_ids(result[len(right)])) if len(right) < len(result) else 0


def test_a_model_that_calculates(tmp_path: Any) -> None:
    rng = np.random.default_rng(1)
    lines = []
    for _ in range(8):
        pairs = rng.integers(1, 60, (10, 2)).tolist()
        lines.append("\n".join(f"{one} + {two} = {one + two}" for one, two in pairs) + "\nwidth = 12\nx == 3")
    found = probes(Planted(calculates, SIZE), Planted(ignorant, SIZE), corpus(tmp_path, {"sums": lines}))
    arithmetic = found["arithmetic"]
    assert arithmetic.accuracy.value == 1.0 and arithmetic.base_accuracy.value == 0.0
    assert arithmetic.difference.low == 1.0 and arithmetic.enough


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("6 * 12 = 72", "72"),
        ("5 < 8, the larger is 8", ""),
        ("timeout = 30", ""),
        ("3 + 4 = 7\nso 10 / 4 = 2.5\nend", "72.5"),
        ("1 + 1 = 2 and more", ""),
        ("9 - 12 = -3", "-3"),
    ],
)
def test_which_tokens_are_results(text: str, asked: str) -> None:
    ids = np.array(WORDS(f"cut 1 + 1 = 2\n{text}")["input_ids"])
    places = text_probes.results(text_probes.Pieces(WORDS))(ids)
    assert WORDS.decode(ids[places]) == asked


def words_batch(rows: list[list[int]]) -> TokenBatch:
    ids = np.array(rows)
    ones = np.ones_like(ids)
    count = len(rows)
    return TokenBatch(ids, ones, np.zeros_like(ones, bool), np.arange(count), ["text"] * count, [""] * count)


def test_rare_words_are_those_that_were_not_seen() -> None:
    text = "zebra and lion and zebra and quagga"
    ids = np.array(WORDS(text)["input_ids"])
    pieces = text_probes.Pieces(WORDS)
    letter = {name: int(WORDS.convert_tokens_to_ids(name)) for name in "zalq"}
    closed = text_probes.rare_words(pieces, {letter["a"]}, seen=False)(ids)
    opened = text_probes.rare_words(pieces, {letter["a"]}, seen=True)(ids)
    # One token is one letter here: a word begins after a space, and "a" is frequent.
    assert WORDS.decode(ids[closed]) == "zlq"
    assert WORDS.decode(ids[opened]) == "z"


def test_frequent_tokens_leave_half_of_a_short_text() -> None:
    batch = words_batch([[5, 5, 5, 6, 6, 7, 8, 9], [5, 5, 6, 6, 7, 8, 9, 10]])
    assert text_probes.frequent_tokens([batch]) == {5, 6, 7}
    assert text_probes.frequent_tokens([batch], 2) == {5, 6}
    batch.attention_mask[:, :] = 0
    assert text_probes.frequent_tokens([batch]) == set()


def test_hits_are_counted_where_they_were_asked() -> None:
    batch = words_batch([[9, 5, 6, 5], [9, 7, 7, 7]])
    batch.attention_mask[1, 3] = 0
    right = np.array([[True, False, True], [True, True, True]])
    base = np.zeros_like(right)
    rows = text_probes.hits_per_sequence([(batch, right, base)], lambda ids: np.isin(ids, (5, 7, 9)))
    # The first token of a sequence is given; what is padding is not asked for.
    assert [(row["items"], row["hits"], row["base_hits"]) for row in rows] == [(2, 2, 0), (2, 2, 0)]


def test_a_probe_with_too_few_items_says_so() -> None:
    row = {"sequence": 0, "domain": "text", "items": 3, "hits": 2, "base_hits": 3}
    few = summarize("arithmetic", [row, {**row, "sequence": 1, "items": 0, "hits": 0, "base_hits": 0}])
    assert few.items == 3 < ENOUGH and not few.enough
    assert few.accuracy.value == pytest.approx(2 / 3)
    assert few.difference.value == pytest.approx(-1 / 3) and math.isnan(few.difference.low)
    nothing = summarize("copying", [])
    assert nothing.items == 0 and math.isnan(nothing.accuracy.value) and not nothing.enough


def test_without_a_tokenizer_the_text_is_not_read(prose: Any) -> None:
    model = Planted(copier, SIZE)
    found = evaluate(model, model, prose.batches, skip=["routing", "generation", "speed"])
    asked = {one.name: one.items for one in found.probes}
    assert asked["copying"] and asked["retrieval"]
    assert asked["arithmetic"] == asked["closed book"] == asked["open book"] == 0
    assert any("Probe arithmetic: too few items (0)" in note for note in found.notes)


def test_made_contexts() -> None:
    streams = {"a": np.arange(100, 400), "b": np.arange(5)}
    items = context_probes.copying(streams, [1])
    assert len(items) == context_probes.ITEMS and {item.domain for item in items} == {"a"}
    for item in items:
        assert item.ids[0] == 1 and item.asked.sum() == context_probes.SPAN - context_probes.GIVEN
        span = context_probes.SPAN
        assert item.ids[1 : span + 1].tolist() == item.ids[-span:].tolist()
    for item in context_probes.retrieval(streams, [1], between=[2], after=[3]):
        question, answer = item.ids[~item.asked], item.ids[item.asked]
        key = question[-context_probes.KEY - 1 : -1].tolist()
        line = [*key, 2, *answer.tolist(), 3]
        text = question.tolist()
        assert sum(text[place : place + len(line)] == line for place in range(len(text))) == 1
    again = context_probes.copying(streams, [1])
    assert all((one.ids == other.ids).all() for one, other in zip(items, again, strict=True))
