"""Files, folders, labels, spans; and input that must be refused in one line."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import random
import sys
import types
from pathlib import Path

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moescope.errors import CorpusError
from profiler.corpus import open_corpus
from profiler.corpus.readers import documents, spans
from profiler.corpus.sources import ReadOptions, Source, resolve


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory: messages name files as the user wrote them."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(path: str, content: str | bytes = "some text") -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(tokenizer, paths, **options) -> str:
    with pytest.raises(CorpusError) as caught:
        open_corpus(paths, tokenizer=tokenizer, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 2
    return message


def domains(paths, labels=None) -> dict[str, str]:
    return {source.name: source.domain for source in resolve(paths, labels)[0]}


def test_domains_come_from_label_subfolder_or_stem(folder):
    put("a/code.txt")
    put("a/german/one.txt")
    put("a/german/deep/two.md")
    put("a/.hidden/x.txt")
    put("a/train-00000-of-00002.jsonl.gz", gzip.compress(b'{"text": "x"}'))
    assert domains("a") == {
        "a/code.txt": "code",
        "a/train-00000-of-00002.jsonl.gz": "train",
        "a/german/one.txt": "german",
        "a/german/deep/two.md": "german",
    }
    assert set(domains("mine=a").values()) == {"mine"}
    assert set(domains("a", {"a": "mine"}).values()) == {"mine"}
    assert domains(["x=a/code.txt", Path("a/german/one.txt")]) == {"a/code.txt": "x", "a/german/one.txt": "one"}


def test_folders_and_globs_are_sorted_and_files_taken_once(folder):
    for name in ("b", "a", "c"):
        put(f"d/{name}.txt")
    assert list(domains("d")) == ["d/a.txt", "d/b.txt", "d/c.txt"]
    assert list(domains("d/[bc].txt")) == ["d/b.txt", "d/c.txt"]
    assert list(domains(["d/c.txt", "./d", "d/**/*.txt"])) == ["d/c.txt", "./d/a.txt", "./d/b.txt"]
    assert domains(["d", "odd=d/a.txt"])["d/a.txt"] == "odd"


def test_an_equals_sign_in_a_path_is_no_label(folder):
    put("k=v.txt")
    put("d/k=v/x.txt")
    assert domains("k=v.txt") == {"k=v.txt": "k=v"}
    assert domains("d/k=v/x.txt") == {"d/k=v/x.txt": "x"}


def test_unreadable_files_in_a_folder_are_skipped_and_named(folder, tokenizer):
    put("d/a.txt")
    put("d/model.bin", b"\0\1\2")
    put("d/empty.txt", b"")
    corpus = open_corpus("d", tokenizer=tokenizer)
    assert corpus.describe()["files_skipped"] == 2
    assert any("2 files were skipped" in warning for warning in corpus.warnings)


def test_a_label_wins_over_a_column(folder, tokenizer):
    put("x.jsonl", '{"text": "abc", "domain": "inner"}\n')
    assert open_corpus("x.jsonl", tokenizer=tokenizer).domains == ["inner"]
    assert open_corpus("outer=x.jsonl", tokenizer=tokenizer).domains == ["outer"]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=st.lists(st.sampled_from(["wörter ", "x" * 700, "\n", "\n\n", "\r\n\r\n", "日本語" * 300]), max_size=120),
    block=st.sampled_from([5000, 8192]),
    step=st.sampled_from([1, 3]),
)
def test_text_spans_hold_every_byte_once(folder, monkeypatch, parts, block, step):
    content = "".join(parts).encode() or b"x"
    monkeypatch.setattr("profiler.corpus.readers.SPAN", step * block)
    options = ReadOptions(block=block)
    put("x.txt", content)
    source = Source("x.txt", "text", "x", size=len(content))
    cut = [document for span in spans(source, options) for document in documents(span, options)]
    assert "".join(document.content for document in cut).encode() == content
    assert all(document.size and len(document.content.encode()) <= block + 4096 + 4096 for document in cut)
    put("x.txt.gz", gzip.compress(content))
    packed = Source("x.txt.gz", "text", "x", compressed=True, size=1)
    streamed = [document.content for span in spans(packed, options) for document in documents(span, options)]
    assert streamed == [document.content for document in cut]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(0, 400), min_size=1, max_size=60), span=st.integers(1, 500), end=st.booleans())
def test_json_spans_hold_every_line_once(folder, monkeypatch, lengths, span, end):
    lines = [json.dumps({"text": f"{i}" + "y" * length}) for i, length in enumerate(lengths)]
    put("x.jsonl", "\n".join(lines) + "\n" * end)
    monkeypatch.setattr("profiler.corpus.readers.SPAN", span)
    source = Source("x.jsonl", "jsonl", "x", size=os.path.getsize("x.jsonl"))
    found = [d.content for part in spans(source, ReadOptions()) for d in documents(part, ReadOptions())]
    assert found == [json.loads(line)["text"] for line in lines]


def test_compressed_text_equals_plain_text(folder, tokenizer):
    text = "the quick brown fox\n\n" * 5000
    put("a/x.txt", text)
    put("b/x.txt.gz", gzip.compress(text.encode()))
    plain, packed = (open_corpus(path, tokenizer=tokenizer) for path in ("a", "b"))
    assert plain.num_tokens == packed.num_tokens
    assert plain.documents == packed.documents > 4


def test_a_byte_order_mark_is_no_text(folder, tokenizer):
    put("a.txt", "\ufeffabc")
    put("b.jsonl", '\ufeff{"text": "abc"}\n')
    for path in ("a.txt", "b.jsonl"):
        (batch,) = open_corpus(path, tokenizer=tokenizer).batches()
        assert tokenizer.decode(batch.input_ids[0]) == "<s>abc"


def test_chats_in_parquet(folder, chat_tokenizer):
    rows = [[{"role": "user", "content": "hi", "name": None}, {"role": "assistant", "content": "yes", "name": None}]]
    pl.DataFrame({"messages": rows}).write_parquet("x.parquet")
    (batch,) = open_corpus("x.parquet", tokenizer=chat_tokenizer).batches()
    assert chat_tokenizer.decode(batch.input_ids[0]) == "<s><|start|>user\nhi<|end|>\n<|start|>assistant\nyes<|end|>\n"


def test_hub_datasets_are_streamed(folder, tokenizer, monkeypatch):
    asked = []

    def load_dataset(name, config, *, split, streaming):
        asked.append((name, config, split, streaming))
        return ({"text": f"row {i}"} for i in range(10**9))

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    corpus = open_corpus("hf:me/texts:de", tokenizer=tokenizer, token_budget=600, split="test", seed=3)
    assert set(asked) == {("me/texts", "de", "test", True)}
    assert corpus.num_tokens == 600
    assert corpus.domains == ["de"]
    assert open_corpus("mine=hf:me/texts", tokenizer=tokenizer, token_budget=600).domains == ["mine"]


def test_hub_datasets_fail_in_one_line(folder, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert refusal(tokenizer, "hf:me/texts") == "hf:me/texts needs the package datasets: pip install datasets"

    def load_dataset(*_, **__):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert "(split train) cannot be read: ConnectionError: no route" in refusal(tokenizer, "hf:me/texts")
    assert "names no dataset" in refusal(tokenizer, "hf:")


def test_missing_paths_come_with_near_names(folder, tokenizer):
    put("german.txt")
    assert refusal(tokenizer, "germn.txt") == "germn.txt does not exist: did you mean german.txt?"
    assert "nor does the folder no: check" in refusal(tokenizer, "no/x.txt")
    assert "x*.txt holds no file" in refusal(tokenizer, "x*.txt")
    assert "no text was given" in refusal(tokenizer, [])
    assert "domains labels other.txt, which is not among the paths" in refusal(
        tokenizer, "german.txt", domains={"other.txt": "x"}
    )
    assert "is labelled a and b" in refusal(tokenizer, ["a=german.txt", "b=german.txt"])
    assert "empty label or path" in refusal(tokenizer, "a=")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"", "x.txt is empty"),
        ("x.txt", b"  \n", "the corpus holds no token: 1 documents were read"),
        ("x.jsonl", b"\n\n", "x.jsonl has no rows"),
        ("x.jsonl", b'{"text": ""}\n{"text": null}', "no token: 2 documents"),
        ("x.txt", b"caf\xe9", "x.txt is not UTF-8 (byte 0xe9 at offset 3): convert it"),
        ("x.txt", b"a" * 70_000 + b"\n\xff", "x.txt is not UTF-8 (byte 0xff at offset 70001)"),
        ("x.txt", "abc".encode("utf-16"), "x.txt is UTF-16: convert it to UTF-8"),
        ("x.txt", b"ab\0c", "x.txt is binary (zero byte at 2)"),
        ("x.dat", pickle.dumps({"text": "abc"}), "x.dat is a pickle, which can run code"),
        ("x.jsonl", pickle.dumps([1]), "x.jsonl is a pickle"),
        ("x.zip", b"PK\x03\x04abc", "x.zip is a zip archive"),
        ("x.txt", b"\x1f\x8babc", "gzip data without the ending .gz"),
        ("x.csv", b"text,domain\n", "x.csv ends in .csv, which is not read: convert"),
        ("x.jsonl.zst", b"abc", "ends in .zst, which is not read: decompress"),
        ("x.jsonl.gz", b"abc", "x.jsonl.gz is not gzip, as its ending says"),
        ("x.jsonl.gz", gzip.compress(b'{"text": "abc"}' * 100, mtime=0)[:40], "x.jsonl.gz cannot be read to its end"),
        ("x.txt.gz", gzip.compress(os.urandom(4000), mtime=0)[:1000], "x.txt.gz cannot be read to its end"),
        ("x.parquet", b"abc", "x.parquet is not Parquet, as its ending says"),
        ("x.parquet", b"PAR1 abc", "x.parquet cannot be read as Parquet"),
        ("x.jsonl", b'{"text": "a"}\n\n{"text": "b"\n', "x.jsonl:3: not JSON (Expecting"),
        ("x.json", b'[{"text": "a"}]', "x.json:1: holds a list where an object is due: write one object per line"),
        ("x.json", b'[\n{"text": "a"}]', "starts '[': write one object per line"),
        ("x.jsonl", b'"abc"', "x.jsonl:1: holds a str where an object is due"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "x.jsonl:2: not UTF-8 (byte 0xff at offset 24)"),
        (
            "x.jsonl",
            b'{"body": "a", "id": 1}',
            "x.jsonl:1 has no column text, only body, id: name one with text_column",
        ),
        ("x.jsonl", b'{"text": "a"}\n{"txt": "a"}', "x.jsonl:2 has no column text, only txt"),
        ("x.jsonl", b"{}", "has no column text, only nothing"),
        ("x.jsonl", b'{"text": 5}', "x.jsonl:1 column text holds a int: a text or a list of messages is due"),
        ("x.jsonl", b'{"text": "\\ud800"}', "x.jsonl:1 column text holds half of a surrogate pair"),
        ("x.jsonl", b'{"text": [{"from": "human", "value": "a"}]}', "needs role and content, this one has from, value"),
        ("x.jsonl", b'{"text": ["a"]}', "needs role and content, this one has str"),
        ("x.jsonl", b"[" * 100_000, "x.jsonl:1: not JSON"),
    ],
)
def test_hostile_files_are_refused_in_one_line(folder, tokenizer, name, content, message):
    assert message in refusal(tokenizer, put(name, content))


def test_missing_columns_of_parquet_are_named(folder, tokenizer):
    pl.DataFrame({"body": ["a"], "domain": [1]}).write_parquet("x.parquet")
    assert "x.parquet row 0 has no column text, only body, domain" in refusal(tokenizer, "x.parquet")
    pl.DataFrame({"text": ["a"], "id": [1]}).write_parquet("y.parquet")
    assert "y.parquet row 0 has no column topic" in refusal(tokenizer, "y.parquet", domain_column="topic")
    pl.DataFrame({"text": [], "id": []}, schema={"text": pl.String, "id": pl.Int64}).write_parquet("z.parquet")
    assert "z.parquet has no rows" in refusal(tokenizer, "z.parquet")


def test_damaged_parquet_is_refused_in_one_line(folder, tokenizer):
    """Whatever is wrong inside: a message, or, where the damage hits text only, a corpus."""
    pl.DataFrame({"text": [f"row {i}" for i in range(2000)]}).write_parquet("x.parquet", row_group_size=500)
    whole = Path("x.parquet").read_bytes()
    rng = random.Random(0)
    messages = []
    for _ in range(40):
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 20])):
            damaged[rng.randrange(4, len(damaged))] = rng.randrange(256)
        put("y.parquet", bytes(damaged))
        try:
            open_corpus("y.parquet", tokenizer=tokenizer, token_budget=600)
        except CorpusError as error:
            messages.append(str(error))
    assert len(messages) > 5
    assert not any("\n" in message for message in messages)


def test_special_files_are_refused(folder, tokenizer):
    os.mkfifo("pipe")
    assert "pipe is not a regular file" in refusal(tokenizer, "pipe")
    os.symlink("nowhere", "link.txt")
    assert "link.txt is a link to nowhere, which does not exist" in refusal(tokenizer, "link.txt")
    os.mkdir("bare")
    assert "bare holds no file" in refusal(tokenizer, "bare")
    put("bins/x.bin", b"\0")
    assert "bins holds 1 files, none of them text" in refusal(tokenizer, "bins")


def test_a_literal_escape_in_code_is_text(folder, tokenizer):
    put("x.jsonl", json.dumps({"text": "re.compile('\\ud800')"}) + "\n")
    assert open_corpus("x.jsonl", tokenizer=tokenizer).documents == 1


def test_impossible_options(folder, tokenizer):
    put("x.txt")
    assert refusal(tokenizer, "x.txt", sequence_length=1) == "sequence_length is 1: a sequence needs at least 2 tokens"
    assert "token_budget is 100, less than one sequence of 512" in refusal(tokenizer, "x.txt", token_budget=100)
    assert "batch_size is 0" in refusal(tokenizer, "x.txt", batch_size=0)


def test_a_sequence_longer_than_the_tokenizer_allows(folder, tokenizer, monkeypatch):
    put("x.txt")
    monkeypatch.setattr(tokenizer, "model_max_length", 128)
    assert "sequence_length is 512, but the tokenizer allows 128" in refusal(tokenizer, "x.txt")
    assert open_corpus("x.txt", tokenizer=tokenizer, sequence_length=128).num_sequences == 1
