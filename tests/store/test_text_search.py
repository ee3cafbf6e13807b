"""Text found in kept tokens, and stretches of a sequence read alone: against Python's own strings and whole reads."""

from __future__ import annotations

import re

import numpy as np
import polars as pl
import pytest
from numpy.testing import assert_array_equal

import store
from moescope.errors import StoreError
from store import text_search

WORDS = [
    b"",
    b" the",
    b" Th",
    b"e",
    b" cat",
    b"con",
    b"cat",
    b"\n",
    "日本".encode()[:2],
    "日本".encode()[2:],
    b"\xff",
    b".",
]
LENGTHS = {0: 700, 3: 30, 4: 5000}
"""Sequences by number: one of several chunks, a gap in the numbers, and one that is read by a scan."""


def _ids(number: int) -> np.ndarray:
    ids = np.random.default_rng(number).integers(0, len(WORDS), LENGTHS[number])
    ids[:3] = [5, 6, 8] if number == 3 else [2, 3, 4]
    return ids


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> store.Run:
    writer = store.RunWriter.create(tmp_path_factory.mktemp("text"), "mine", store.RunInfo(model="toy", text_kept=True))
    chunks = [(number, start) for number, length in LENGTHS.items() for start in range(0, length, 512)]
    parts = [_ids(number)[start : start + 512] for number, start in chunks]
    sequence = np.concatenate([np.full(length, number) for number, length in LENGTHS.items()])
    position = np.concatenate([np.arange(length) for length in LENGTHS.values()])
    traces = []
    for layer in (1, 2):
        rng = np.random.default_rng(layer)
        ids = np.argsort(rng.random((len(sequence), 9)), axis=1)[:, : layer + 1]
        weights = -np.sort(-rng.random(ids.shape))
        traces.append(
            store.pack_trace(layer=layer, sequence=sequence, position=position, ids=ids, weights=weights, num_experts=9)
        )
    writer.write_shard(
        {
            "layer": {"layer": [1, 2], "step": [0, 0], "num_experts": [9, 9], "top_k": [2, 3]},
            "sequence": {"sequence": [*LENGTHS], "domain": ["a", "b", "a"], "tokens": [*LENGTHS.values()]},
            "sequence_token": {
                "sequence": [number for number, _ in chunks],
                "start": [start for _, start in chunks],
                "token_ids": [part.tolist() for part in parts],
                "special": [[False] * len(part) for part in parts],
            },
            "vocabulary": {"token_id": list(range(len(WORDS))), "bytes": WORDS},
            "route_chunk": pl.concat(traces),
        }
    )
    return store.open_run(writer.finish(seconds=1.0))


def _text(number: int) -> str:
    return b"".join(WORDS[one] for one in _ids(number)).decode("utf-8", "replace")


@pytest.mark.parametrize(
    ("wanted", "regex", "python"),
    [
        ("the CAT", False, r"(?i)the\s+cat"),
        ("日本", False, "日本"),
        (r"\bcat[.\n]", True, r"\bcat[.\n]"),
        ("con(cat)+", True, "con(?:cat)+"),
        (".", False, r"\."),
    ],
)
def test_hits_are_those_of_python(run: store.Run, wanted: str, regex: bool, python: str) -> None:
    found = run.search_text(wanted, regex=regex)
    assert found.complete and found.sequences == 3
    expected = {number: list(re.finditer(python, _text(number))) for number in LENGTHS}
    counts = {number: len(hits) for number, hits in expected.items() if hits}
    assert dict(found.frame.select("sequence", "hits").iter_rows()) == counts
    for row in found.frame.iter_rows(named=True):
        text, first = _text(row["sequence"]), expected[row["sequence"]][0]
        assert row["match"] == first.group()
        assert row["before"] == text[max(0, first.start() - 60) : first.start()]
        assert row["after"] == text[first.end() : first.end() + 60]


def test_tokens_of_hits_are_found_across_borders(run: store.Run) -> None:
    for number in LENGTHS:
        pieces = [WORDS[one] for one in _ids(number)]
        spans = text_search.token_spans(pieces, text_search.expression("the cat", regex=False))
        assert len(spans) == len(re.findall(r"(?i)the\s+cat", _text(number)))
        for first, last in spans:
            joined = b"".join(pieces[first : last + 1]).decode("utf-8", "replace").lower()
            assert re.search(r"the\s+cat", joined)
            assert not re.search(r"the\s+cat", b"".join(pieces[first:last]).decode("utf-8", "replace").lower())
    row = run.search_text("concat").frame.row(0, named=True)
    assert row["position"] == text_search.token_spans(
        [WORDS[one] for one in _ids(row["sequence"])], "(?i)concat"
    )[0][0]  # fmt: skip


def test_a_word_inside_an_earlier_word_is_no_hit() -> None:
    spans = text_search.token_spans([b"con", b"cat", b" ", b"cat", "\ufdd0".encode(), b"cat"], r"\bcat")
    assert spans == [(3, 3), (5, 5)]


@pytest.mark.parametrize("wanted", ["(", "a*", "(?=a)", "", "  ", "x" * 501, r"(a)\1", r"\b", "(?m)$"])
def test_what_cannot_be_searched_is_said(run: store.Run, wanted: str) -> None:
    with pytest.raises(StoreError):
        run.search_text(wanted, regex=True)


def test_the_fault_of_an_expression_is_named(run: store.Run) -> None:
    with pytest.raises(StoreError, match="unclosed group"):
        run.search_text("(cat", regex=True)


def test_one_domain_and_a_limited_time(run: store.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(run.search_text("cat", domain="b").frame["sequence"]) == {3}
    with pytest.raises(StoreError, match="no domain"):
        run.search_text("cat", domain="z")
    monkeypatch.setattr(text_search, "BLOCK_TOKENS", 100)
    found = run.search_text("cat", seconds=-1.0)
    assert (found.searched, found.sequences, found.complete) == (2, 3, False)


@pytest.mark.parametrize(
    ("number", "first", "last"), [(0, 0, 99), (0, 500, 699), (4, 1000, 1767), (4, 4990, 9999), (3, 0, 0)]
)
def test_a_stretch_is_the_part_of_the_whole(run: store.Run, number: int, first: int, last: int) -> None:
    whole = run.selections(sequences=[number])
    part = run.stretch(number, first=first, last=last)
    kept = slice(first, last + 1)
    assert_array_equal(part.ids, whole.ids[:, :, kept])
    assert_array_equal(part.weights, whole.weights[:, :, kept])
    assert part.lengths.tolist() == [part.ids.shape[2]]
    assert_array_equal(run.stretch(number, first=first, last=last, layers=[2]).ids, whole.ids[1:, :, kept])
    text = run.sequence_text(number, first=first, last=last)
    assert text is not None
    assert_array_equal(text.token_ids, _ids(number)[kept])
    assert text.pieces == [WORDS[one] for one in _ids(number)[kept]]


def test_a_stretch_of_no_sequence_is_empty(run: store.Run) -> None:
    assert run.stretch(99).ids.shape[1] == 0
