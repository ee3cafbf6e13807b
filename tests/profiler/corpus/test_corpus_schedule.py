"""Budget, balance, order, laziness, resumption."""

from __future__ import annotations

import gzip
import io
import json
import random
import shutil
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest

from moescope.errors import CorpusError
from profiler.corpus import open_corpus, readers, rows, schedule
from profiler.corpus.sources import open_source


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sentences(seed: int, count: int, longest: int = 60) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices("abcdefgh ", k=rng.randint(5, longest))) for _ in range(count)]


@pytest.fixture
def three(tmp_path):
    """Three domains; ``small`` holds about 300 tokens, the others thousands."""
    for seed, (name, count, longest) in enumerate([("large", 400, 60), ("medium", 400, 20), ("small", 9, 60)]):
        write(tmp_path / f"{name}.jsonl", [{"text": text} for text in sentences(seed, count, longest)])
    return tmp_path


def in_order(corpus):
    """(sequence, domain, length) in the order of sequence ids."""
    found = []
    for batch in corpus.batches():
        lengths = batch.attention_mask.sum(axis=1)
        found += zip(batch.sequences.tolist(), batch.domains, lengths.tolist(), strict=True)
    return sorted(found)


def test_the_budget_is_met_to_the_token_and_spread(three, tokenizer):
    for budget in (600, 601, 999):
        corpus = open_corpus(three, tokenizer=tokenizer, sequence_length=32, token_budget=budget)
        tokens = Counter()
        for _, domain, length in in_order(corpus):
            tokens[domain] += length
        assert tokens.total() == corpus.num_tokens == budget
        if budget // 3 < 250:
            assert max(tokens.values()) - min(tokens.values()) <= 32


def test_a_domain_that_runs_out_leaves_its_share(three, tokenizer):
    everything = open_corpus(three / "small.jsonl", tokenizer=tokenizer, sequence_length=32).num_tokens
    corpus = open_corpus(three, tokenizer=tokenizer, sequence_length=32, token_budget=3000)
    tokens = {domain: row["tokens"] for domain, row in corpus.describe()["domains"].items()}
    assert tokens["small"] == everything < 1000
    assert abs(tokens["large"] - tokens["medium"]) <= 32
    assert sum(tokens.values()) == 3000


def test_any_beginning_is_balanced(three, tokenizer):
    corpus = open_corpus(three, tokenizer=tokenizer, sequence_length=32, token_budget=700)
    tokens = Counter(dict.fromkeys(corpus.domains, 0))
    for _, domain, length in in_order(corpus):
        tokens[domain] += length
        assert max(tokens.values()) - min(tokens.values()) <= 32


def test_a_budget_larger_than_the_text_takes_everything(three, tokenizer):
    everything = open_corpus(three, tokenizer=tokenizer)
    assert open_corpus(three, tokenizer=tokenizer, token_budget=10**9).sha256 == everything.sha256
    texts = sum(len(path.read_text().splitlines()) for path in three.iterdir())
    assert everything.documents == texts


def test_the_same_seed_gives_the_same_sequences_wherever_the_files_lie(three, tmp_path_factory, tokenizer):
    first = open_corpus(three, tokenizer=tokenizer, token_budget=2000)
    moved = shutil.copytree(three, tmp_path_factory.mktemp("x") / "moved")
    assert open_corpus(moved, tokenizer=tokenizer, token_budget=2000).sha256 == first.sha256
    assert open_corpus(three, tokenizer=tokenizer, token_budget=2000, seed=1).sha256 != first.sha256
    assert open_corpus(three, tokenizer=tokenizer, token_budget=2000, batch_size=3).sha256 == first.sha256


def test_documents_are_shuffled_within_a_domain(three, tokenizer):
    corpus = open_corpus(three / "large.jsonl", tokenizer=tokenizer, batch_size=1)
    places = [int(batch.sources[0].split("@")[1]) for batch in corpus.batches()]
    assert abs(np.corrcoef(places, np.arange(len(places)))[0, 1]) < 0.3


@pytest.mark.parametrize("skipped", [set(), {0}, {3, 4, 5, 6, 7, 8, 9}, set(range(0, 60, 2)), set(range(10**4))])
def test_skipping_changes_nothing_else(three, tokenizer, skipped):
    corpus = open_corpus(three, tokenizer=tokenizer, sequence_length=32, token_budget=2000, batch_size=4)

    def rows(skip):
        return {
            int(s): (row[mask == 1].tolist(), domain, source)
            for batch in corpus.batches(skip)
            for s, row, mask, domain, source in zip(
                batch.sequences, batch.input_ids, batch.attention_mask, batch.domains, batch.sources, strict=True
            )
        }

    whole = rows(frozenset())
    assert rows(skipped) == {s: row for s, row in whole.items() if s not in skipped}


def test_a_resumed_run_sees_the_remaining_batches_unchanged(three, tokenizer):
    def opened():
        return open_corpus(three, tokenizer=tokenizer, sequence_length=32, token_budget=3000, batch_size=4)

    batches = list(opened().batches())
    done = {int(s) for batch in batches[:5] for s in batch.sequences}
    for batch, expected in zip(opened().batches(done), batches[5:], strict=True):
        assert np.array_equal(batch.input_ids, expected.input_ids)
        assert batch.sequences.tolist() == expected.sequences.tolist()


def test_batches_waste_little_and_keep_the_domains_mixed(three, tokenizer):
    corpus = open_corpus(three, tokenizer=tokenizer, sequence_length=64, token_budget=6000, batch_size=4)
    cells = sum(batch.input_ids.size for batch in corpus.batches())
    assert corpus.num_tokens / cells > 0.9
    fed = Counter()
    for number, batch in enumerate(corpus.batches(), 1):
        fed.update(batch.domains)
        assert len(batch.sequences) <= 4
        if number % 16 == 0:
            assert fed["large"] > 5 and fed["medium"] > 5
    lengths = [batch.input_ids.shape[1] for batch in corpus.batches()]
    assert lengths[0] == max(lengths[:16])


class Counting:
    """Counts the bytes that readers take from files."""

    def __init__(self, monkeypatch):
        self.read = 0
        for module in (readers, rows):
            monkeypatch.setattr(module, "open_source", self.open)

    @contextmanager
    def open(self, source):
        with open_source(source) as file:
            yield SimpleNamespace(seek=file.seek, read=self.counted(file.read), readline=self.counted(file.readline))

    def counted(self, method):
        def call(size):
            data = method(size)
            self.read += len(data)
            return data

        return call


def test_a_small_budget_reads_little_of_a_large_file_and_from_all_over_it(tmp_path, tokenizer, monkeypatch):
    lines = [json.dumps({"text": text}) for text in sentences(0, 50)]
    large = tmp_path / "large.jsonl"
    large.write_text(("\n".join(lines) + "\n") * 10_000)
    size = large.stat().st_size
    assert size > 20e6
    counting = Counting(monkeypatch)
    corpus = open_corpus(large, tokenizer=tokenizer, sequence_length=64, token_budget=4000)
    assert counting.read < 20 * readers.SPAN < size / 4
    places = [int(source.split("@")[1]) / size for batch in corpus.batches() for source in batch.sources]
    assert min(places) < 0.25
    assert max(places) > 0.75


def test_a_small_budget_reads_little_of_a_large_text(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "large.txt").write_text("the quick brown fox\n\n" * 1_000_000)
    counting = Counting(monkeypatch)
    corpus = open_corpus(tmp_path / "large.txt", tokenizer=tokenizer, sequence_length=64, token_budget=4000)
    assert counting.read < 20 * readers.SPAN
    assert corpus.num_tokens == 4000


def test_domains_of_a_sorted_file_are_found(tmp_path, tokenizer):
    rows = [{"text": text, "domain": f"d{i // 1000}"} for i, text in enumerate(sentences(1, 4000))]
    corpus = open_corpus(write(tmp_path / "x.jsonl", rows), tokenizer=tokenizer, token_budget=4096)
    tokens = {domain: row["tokens"] for domain, row in corpus.describe()["domains"].items()}
    assert sorted(tokens) == ["d0", "d1", "d2", "d3"]
    assert max(tokens.values()) - min(tokens.values()) <= 64


def test_looking_for_a_rare_domain_ends(tmp_path, tokenizer, monkeypatch):
    """A gzip file with one rare document first: what waits meanwhile is bounded, the others are fed."""
    monkeypatch.setattr(schedule, "HELD", 20_000)
    monkeypatch.setattr(schedule, "DISCOVERED", 2_000)
    monkeypatch.setattr(readers, "SHUFFLED", 1_000)
    rows = [{"text": "rare", "domain": "rare"}]
    rows += [{"text": text, "domain": "common"} for text in sentences(1, 20_000)]
    with gzip.open(tmp_path / "x.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    read = 0
    original = schedule._Pool._read_group

    def counted(self, key):
        nonlocal read
        read += 1
        return original(self, key)

    monkeypatch.setattr(schedule._Pool, "_read_group", counted)
    corpus = open_corpus(tmp_path / "x.jsonl.gz", tokenizer=tokenizer, token_budget=5000)
    assert corpus.num_tokens == 5000
    assert set(corpus.domains) == {"rare", "common"}
    assert read < 3000


def test_a_domain_that_got_nothing_is_named(three, tokenizer):
    (three / "blank.txt").write_text("\n\n")
    corpus = open_corpus(three, tokenizer=tokenizer, token_budget=2000)
    assert "blank" not in corpus.domains
    assert any("domains without a token: blank" in warning for warning in corpus.warnings)


def test_too_many_domains_are_refused(tmp_path, tokenizer):
    path = write(tmp_path / "x.jsonl", [{"text": "abc", "domain": i} for i in range(300)])
    with pytest.raises(CorpusError, match="more than 256 domains.*LABEL=PATH"):
        open_corpus(path, tokenizer=tokenizer)


def test_a_long_document_does_not_fill_a_budget_alone(tmp_path, tokenizer):
    path = write(tmp_path / "x.jsonl", [{"text": text * 40} for text in sentences(3, 12)])
    corpus = open_corpus(path, tokenizer=tokenizer, sequence_length=64, token_budget=640)
    assert corpus.documents == corpus.num_sequences == 10


def test_parquet_spans_hold_each_row_once(tmp_path, tokenizer):
    texts = sentences(5, 3000)
    pl.DataFrame({"text": texts, "domain": ["p", "q"] * 1500, "unused": range(3000)}).write_parquet(
        tmp_path / "x.parquet", row_group_size=700
    )
    corpus = open_corpus(tmp_path / "x.parquet", tokenizer=tokenizer, bos=False)
    found = {}
    for batch in corpus.batches():
        for source, domain, row, mask in zip(
            batch.sources, batch.domains, batch.input_ids, batch.attention_mask, strict=True
        ):
            number = int(source.split("#")[1])
            assert domain == "pq"[number % 2]
            found[number] = tokenizer.decode(row[mask == 1])
    assert found == dict(enumerate(texts))


def test_a_full_disk_is_said_in_one_line(three, tokenizer, monkeypatch):
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: io.FileIO("/dev/full", "w"))
    with pytest.raises(CorpusError, match=r"the tokens do not fit into .* \(No space left on device\): free space"):
        open_corpus(three, tokenizer=tokenizer)
