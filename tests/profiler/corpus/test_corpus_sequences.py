"""What is fed: texts come back whole, BOS, packing, padding, chats."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moescope.errors import CorpusError
from profiler.corpus import Corpus, open_corpus


def fed(corpus: Corpus, **options) -> dict[int, tuple[list[int], str, str]]:
    """sequence -> (ids, domain, source), from the batches alone."""
    found = {}
    for batch in corpus.batches(**options):
        for row, mask, special, sequence, domain, source in zip(
            batch.input_ids,
            batch.attention_mask,
            batch.special,
            batch.sequences,
            batch.domains,
            batch.sources,
            strict=True,
        ):
            length = int(mask.sum())
            assert mask[:length].all(), "padding stands on the right"
            assert not special[length:].any()
            assert int(sequence) not in found, "a sequence is fed twice"
            found[int(sequence)] = (row[:length].tolist(), domain, source)
    return found


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=80), min_size=1, max_size=6),
    length=st.integers(2, 20),
    bos=st.booleans(),
    seed=st.integers(0, 3),
)
def test_every_text_comes_back_whole(tmp_path, tokenizer, texts, length, bos, seed):
    path = jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    if not any(text.strip() for text in texts):
        with pytest.raises(CorpusError, match="no token"):
            open_corpus(path, tokenizer=tokenizer, sequence_length=length)
        return
    sequences = fed(open_corpus(path, tokenizer=tokenizer, sequence_length=length, bos=bos, seed=seed))
    pieces = defaultdict(list)
    for sequence in sorted(sequences):
        ids, domain, source = sequences[sequence]
        assert len(ids) <= length
        assert domain == "a"
        assert (ids[0] == tokenizer.bos_token_id) == bos
        pieces[int(source.split("@")[1])].append(ids[bos:])
    offset = 0
    for text in texts:  # the oracle: the tokenizer itself, one text at a time
        expected = tokenizer.encode(text, add_special_tokens=False) if text.strip() else []
        assert sum(pieces.pop(offset, []), []) == expected
        offset += len(json.dumps({"text": text})) + 1
    assert not pieces


def test_files_are_cut_and_marked(tmp_path, tokenizer):
    (tmp_path / "x.txt").write_text("abcdefghij")
    corpus = open_corpus(tmp_path / "x.txt", tokenizer=tokenizer, sequence_length=4, batch_size=3)
    (first, second) = corpus.batches()
    assert first.input_ids.dtype == first.attention_mask.dtype == first.sequences.dtype == np.int64
    assert first.input_ids.shape == (3, 4)
    assert first.special.tolist() == [[True, False, False, False]] * 3
    ids = tokenizer.encode("abcdefghij", add_special_tokens=False)
    assert second.input_ids.tolist() == [[tokenizer.bos_token_id, ids[9]]]
    assert corpus.num_tokens == 10 + 4
    assert corpus.documents == 1
    assert corpus.num_sequences == 4


def test_padding_uses_pad_eos_or_zero(tmp_path, tokenizer, bare_tokenizer):
    path = jsonl(tmp_path / "x.jsonl", [{"text": "a"}, {"text": "abc"}])
    (batch,) = open_corpus(path, tokenizer=tokenizer).batches()
    assert batch.input_ids[1].tolist()[2:] == [tokenizer.pad_token_id] * 2
    (batch,) = open_corpus(path, tokenizer=bare_tokenizer).batches()
    assert batch.input_ids[1].tolist()[1:] == [0, 0]
    assert not batch.special.any()


def test_without_a_bos_none_is_invented(tmp_path, bare_tokenizer):
    (tmp_path / "x.txt").write_text("abc")
    corpus = open_corpus(tmp_path / "x.txt", tokenizer=bare_tokenizer)
    assert corpus.num_tokens == 3
    assert corpus.describe()["bos_token"] is None


def test_packing_joins_the_documents_of_a_domain(tmp_path, tokenizer):
    texts = {"a": ["ab", "cde", "f"], "b": ["xyz"]}
    path = jsonl(tmp_path / "x.jsonl", [{"text": t, "domain": d} for d in texts for t in texts[d]])
    corpus = open_corpus(path, tokenizer=tokenizer, sequence_length=4, packing=True)
    sequences = fed(corpus)
    for domain, members in texts.items():
        rows = [ids for _, (ids, d, _) in sorted(sequences.items()) if d == domain]
        assert all(len(row) == 4 for row in rows[:-1]), "only the last sequence of a domain may be short"
        joined = [i for row in rows for i in row[1:]]
        text = tokenizer.decode(joined).removesuffix("</s>")  # dropped where nothing else is left for a sequence
        assert sorted(text.split("</s>")) == members
    assert corpus.documents == 4
    assert corpus.describe()["separator_token"] == "</s>"


def test_packing_counts_a_document_where_it_begins(tmp_path, tokenizer):
    path = jsonl(tmp_path / "x.jsonl", [{"text": "abcdefghijkl"}] * 20)
    corpus = open_corpus(path, tokenizer=tokenizer, sequence_length=9, packing=True, token_budget=45)
    assert corpus.num_tokens == 45
    assert corpus.documents == 4  # 40 tokens without BOS, 13 a document


def test_a_sequence_of_special_tokens_only_is_dropped_and_counted(tmp_path, tokenizer):
    (tmp_path / "x.txt").write_text("abc<|end|>")
    corpus = open_corpus(tmp_path / "x.txt", tokenizer=tokenizer, sequence_length=4)
    assert corpus.num_sequences == 1
    assert corpus.describe()["dropped"] == {"documents_without_text": 0, "sequences_without_text": 1}


def test_chats_go_through_the_template(tmp_path, chat_tokenizer):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    path = jsonl(tmp_path / "x.jsonl", [{"messages": messages}])
    corpus = open_corpus(path, tokenizer=chat_tokenizer)
    ((ids, domain, _),) = fed(corpus).values()
    text = "<s><|start|>system\nbe brief<|end|>\n<|start|>user\nhi<|end|>\n"
    assert ids == chat_tokenizer.encode(text, add_special_tokens=False), "the template's BOS is not doubled"
    assert domain == "x"
    (batch,) = corpus.batches()
    marked = chat_tokenizer.convert_ids_to_tokens(batch.input_ids[0][batch.special[0]])
    assert marked == ["<s>", "<|start|>", "<|end|>", "<|start|>", "<|end|>"]
    assert corpus.describe()["messages_per_role"] == {"system": 1, "user": 1}
    assert not any("plain text" in warning for warning in corpus.warnings)


def test_roles_are_chosen(tmp_path, chat_tokenizer):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    rows = [{"turns": messages}, {"turns": messages[1:]}]
    path = jsonl(tmp_path / "x.jsonl", rows)
    corpus = open_corpus(path, tokenizer=chat_tokenizer, text_column="turns", roles=["user"])
    assert corpus.describe()["messages_per_role"] == {"user": 1}
    assert corpus.describe()["dropped"]["documents_without_text"] == 1
    assert "yes" not in chat_tokenizer.decode(next(iter(fed(corpus).values()))[0])


def test_chats_without_a_template(tmp_path, tokenizer):
    path = jsonl(tmp_path / "x.jsonl", [{"messages": [{"role": "user", "content": "hi"}] * 2}])
    with pytest.raises(
        CorpusError, match=r"x.jsonl@0 holds chat messages, but the tokenizer has no chat template: use"
    ):
        open_corpus(path, tokenizer=tokenizer)
    corpus = open_corpus(path, tokenizer=tokenizer, chat_template=False)
    assert tokenizer.decode(next(iter(fed(corpus).values()))[0]) == "<s>hi\n\nhi"


def test_a_template_may_refuse(tmp_path, chat_tokenizer):
    path = jsonl(tmp_path / "x.jsonl", [{"messages": [{"role": "tool", "content": "hi"}]}])
    with pytest.raises(CorpusError, match=r"refuses these messages \(no tools here\): their roles are tool"):
        open_corpus(path, tokenizer=chat_tokenizer)


def test_warnings_name_what_misleads(tmp_path, chat_tokenizer):
    (tmp_path / "x.txt").write_text("abc")
    warnings = " | ".join(open_corpus(tmp_path / "x.txt", tokenizer=chat_tokenizer).warnings)
    assert "an instruct model sees messages" in warnings
    assert "BOS that the tokenizer does not add by itself" in warnings


def test_hash_is_over_lengths_and_ids(tmp_path, tokenizer):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name * 30)
    corpus = open_corpus(tmp_path, tokenizer=tokenizer, sequence_length=8)
    sequences = fed(corpus)
    digest = hashlib.sha256()
    for sequence in range(corpus.num_sequences):
        ids = sequences[sequence][0]
        digest.update(struct.pack(f"<{len(ids) + 1}I", len(ids), *ids))
    assert corpus.sha256 == digest.hexdigest() == corpus.describe()["corpus_sha256"]


def test_description_is_json_and_adds_up(tmp_path, tokenizer):
    (tmp_path / "code.txt").write_text("abc" * 50)
    jsonl(tmp_path / "more.jsonl", [{"text": "abc", "domain": "prose"}, {"text": " \n"}])
    corpus = open_corpus(tmp_path, tokenizer=tokenizer, sequence_length=16, token_budget=100, roles=["user"])
    text = json.dumps(corpus.describe())
    described = json.loads(text)
    assert described["files"] == [str(tmp_path / "code.txt"), str(tmp_path / "more.jsonl")]
    assert described["tokens"] == corpus.num_tokens == sum(d["tokens"] for d in described["domains"].values()) == 100
    assert described["sequences"] == sum(d["sequences"] for d in described["domains"].values())
    assert described["documents"] == 2
    assert described["domains"]["prose"] == {"documents": 1, "sequences": 1, "tokens": 4}
    assert {"sequence_length": 16, "bos": True, "packing": False, "seed": 0, "token_budget": 100}.items() <= (
        described.items()
    )
    sequences = fed(corpus).values()
    assert sum(len(ids) for ids, domain, _ in sequences if domain == "code") == described["domains"]["code"]["tokens"]


def test_importing_the_corpus_loads_no_heavy_library():
    code = "import sys, profiler.corpus; print(*{'torch', 'transformers', 'polars', 'datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
