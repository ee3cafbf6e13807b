"""Codes of a few bits, one behind the other in words of 32 bits, across the words' borders: no bit is left out.

Source: compressed-tensors 0.20, ``pack_to_int32``. Earlier versions left the rest of a word empty where the width does
not divide 32 (unverified); such tensors have other shapes and are refused by who reads them.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 32


def words_for(count: int, bits: int) -> int:
    """Words that ``count`` codes of ``bits`` bits take."""
    return -(-count * bits // WORD)


def pack(codes: Tensor, bits: int) -> Tensor:
    """(R, C) codes from 0 to 2**bits - 1 -> (R, words) int32; code i stands at bit ``i * bits`` of its row."""
    rows, count = codes.shape
    turns = -(-count // WORD)  # of 32 codes, which fill as many words as a code has bits
    padded = torch.zeros(rows, turns * WORD, dtype=torch.int64)
    padded[:, :count] = codes
    padded = padded.reshape(rows, turns, WORD)
    words = torch.zeros(rows, turns, bits, dtype=torch.int64)
    for place in range(WORD):
        word, offset = divmod(place * bits, WORD)
        words[..., word] |= padded[..., place] << offset
        if offset + bits > WORD:
            words[..., word + 1] |= padded[..., place] >> (WORD - offset)
    words &= 2**WORD - 1
    signed = torch.where(words < 2 ** (WORD - 1), words, words - 2**WORD).to(torch.int32)
    return signed.reshape(rows, -1)[:, : words_for(count, bits)].contiguous()


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """(R, words) int32 -> (R, count) codes as uint8."""
    rows = words.shape[0]
    turns = -(-count // WORD)
    padded = torch.zeros(rows, turns * bits, dtype=torch.int64)
    padded[:, : words.shape[1]] = words
    padded = (padded & (2**WORD - 1)).reshape(rows, turns, bits)
    codes = torch.empty(rows, turns, WORD, dtype=torch.uint8)
    for place in range(WORD):
        word, offset = divmod(place * bits, WORD)
        value = padded[..., word] >> offset
        if offset + bits > WORD:
            value |= padded[..., word + 1] << (WORD - offset)
        codes[..., place] = value & (2**bits - 1)
    return codes.reshape(rows, -1)[:, :count]
