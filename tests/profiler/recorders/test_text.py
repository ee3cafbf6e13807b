"""Which bytes a token stands for, in byte-level, SentencePiece and other vocabularies."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from profiler.capture.batch import Tokens
from profiler.recorders.text import TextRecorder, token_bytes


def fast(backend: Any, **special: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.fixture
def byte_level() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = ["<s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "\u0120the", "\u00c3\u00bc"]
    backend = Tokenizer(models.BPE(vocab={piece: place for place, piece in enumerate(pieces)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return fast(backend, bos_token="<s>")


@pytest.fixture
def sentencepiece() -> Any:
    from tokenizers import Tokenizer, decoders, models

    vocabulary = [("<unk>", 0.0), ("<s>", 0.0), ("<0xC3>", -1.0), ("\u2581the", -1.0), ("\u2581", -2.0), ("a", -3.0)]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return fast(backend, bos_token="<s>", unk_token="<unk>")


def test_byte_level_pieces_are_bytes(byte_level: Any) -> None:
    ids = byte_level.convert_tokens_to_ids
    assert token_bytes(byte_level, ids("\u0120the")) == b" the"
    assert token_bytes(byte_level, ids("\u00c3\u00bc")) == "\u00fc".encode()
    assert token_bytes(byte_level, ids("\u00c3")) == b"\xc3"  # half a character
    assert token_bytes(byte_level, ids("<s>")) == b"<s>"


def test_every_byte_has_a_letter(byte_level: Any) -> None:
    found = {token_bytes(byte_level, token) for token in range(1, 257)}
    assert found == {bytes([value]) for value in range(256)}


def test_sentencepiece_pieces_are_text_or_single_bytes(sentencepiece: Any) -> None:
    ids = sentencepiece.convert_tokens_to_ids
    assert token_bytes(sentencepiece, ids("\u2581the")) == b" the"
    assert token_bytes(sentencepiece, ids("<0xC3>")) == b"\xc3"
    assert token_bytes(sentencepiece, ids("a")) == b"a"
    assert token_bytes(sentencepiece, ids("<s>")) == b"<s>"


def test_other_vocabularies_are_decoded() -> None:
    from tokenizers import Tokenizer, models

    tokenizer = fast(Tokenizer(models.WordLevel({"word": 0, "[UNK]": 1}, unk_token="[UNK]")), unk_token="[UNK]")
    assert token_bytes(tokenizer, 0) == b"word"
    assert token_bytes(tokenizer, 77) == b""


def test_sequences_are_chunked_and_tokens_described_once(byte_level: Any) -> None:
    recorder = TextRecorder(byte_level)
    length = 700
    position = torch.arange(length).repeat(2)
    sequence = torch.arange(2).repeat_interleave(length)
    tokens = Tokens(sequence, position, torch.zeros_like(sequence), [("text", "prompt")], 2 * length, None, sequence)
    recorder.update(tokens, (position % 5).reshape(2, length))
    drained = recorder.drain()
    chunks = drained["sequence_token"].sort("sequence", "start")
    assert chunks.select("sequence", "start").rows() == [(0, 0), (0, 512), (1, 0), (1, 512)]
    assert [len(ids) for ids in chunks["token_ids"]] == [512, 188, 512, 188]
    assert chunks["special"][0][:6].to_list() == [True, False, False, False, False, True]
    assert drained["vocabulary"]["token_id"].to_list() == [0, 1, 2, 3, 4]
    recorder.update(tokens, (position % 6).reshape(2, length))
    assert recorder.drain()["vocabulary"]["token_id"].to_list() == [5]
    assert recorder.drain() == {}
