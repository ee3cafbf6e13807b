"""Items that are solved or not: a prompt and the answer that has to follow, from a file or from the held-out text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.errors import CorpusError, InputError
from profiler.corpus import TokenBatch

PROMPT_TOKENS, ANSWER_TOKENS, ITEMS = 48, 3, 200
"""Of items made from text."""


@dataclass(frozen=True)
class Item:
    """One item.

    Attributes:
        domain: of its text, or what the file says.
        prompt: (length,) token ids.
        answer: (length,) token ids that have to follow.
    """

    domain: str
    prompt: NDArray[np.int64]
    answer: NDArray[np.int64]


def read_items(path: str | Path, tokenizer: Any, *, most_tokens: int | None = None) -> list[Item]:
    """Items from JSON Lines: ``{"prompt": ..., "answer": ..., "domain": ...}``, the domain optional.

    Prompt and answer are put together as they stand: an answer that follows a blank begins with one.

    Args:
        path: the file.
        tokenizer: of the model.
        most_tokens: positions of the model.

    Raises:
        InputError: the file cannot be read, a line is no item, or an item is longer than the model has positions.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--items {path}: {getattr(error, 'strerror', None) or error}") from error
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            found.append(_item(f"--items {path}, line {number}", line, tokenizer))
            length = len(found[-1].prompt) + len(found[-1].answer)
            if most_tokens is not None and length > most_tokens:
                raise InputError(
                    f"--items {path}, line {number}: {length} tokens, more than the model's {most_tokens}: shorten it"
                )
    if not found:
        raise InputError(f"--items {path}: no item; give lines such as {_EXAMPLE}")
    return found


def items_of_text(
    batches: Sequence[TokenBatch],
    *,
    prompt_tokens: int = PROMPT_TOKENS,
    answer_tokens: int = ANSWER_TOKENS,
    most: int = ITEMS,
) -> list[Item]:
    """Items from text: some tokens of a sequence, and the next few; pieces of a sequence do not overlap.

    The domains take turns until there are ``most``.

    Raises:
        CorpusError: no sequence is long enough.
    """
    size = prompt_tokens + answer_tokens
    queues: dict[str, list[Item]] = {}
    for batch in batches:
        for row, domain in enumerate(batch.domains):
            ids = batch.input_ids[row, batch.attention_mask[row] == 1]
            for start in range(0, len(ids) - size + 1, size):
                piece = ids[start : start + size]
                queues.setdefault(domain, []).append(Item(domain, piece[:prompt_tokens], piece[prompt_tokens:]))
    if not queues:
        raise CorpusError(f"no sequence has the {size} tokens of a prompt and its answer: give longer text or --items")
    longest = max(map(len, queues.values()))
    return [queue[turn] for turn in range(longest) for queue in queues.values() if turn < len(queue)][:most]


def items_digest(items: Sequence[Item]) -> str:
    """What tells two lists of items apart."""
    done = hashlib.sha256()
    for item in items:
        done.update(json.dumps([item.domain, item.prompt.tolist(), item.answer.tolist()]).encode())
    return done.hexdigest()[:12]


_EXAMPLE = '{"prompt": "2 + 3 =", "answer": " 5"}'


def _item(place: str, line: str, tokenizer: Any) -> Item:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise InputError(f"{place}: no JSON ({error}); write {_EXAMPLE}") from None
    texts = [entry.get(name) if isinstance(entry, dict) else None for name in ("prompt", "answer")]
    if not all(isinstance(text, str) and text for text in texts):
        raise InputError(f"{place}: an item has a prompt and an answer, such as {_EXAMPLE}")
    prompt = np.asarray(tokenizer(texts[0])["input_ids"], dtype=np.int64)
    answer = np.asarray(tokenizer(texts[1], add_special_tokens=False)["input_ids"], dtype=np.int64)
    if not len(prompt) or not len(answer):
        raise InputError(f"{place}: prompt and answer need a token each")
    return Item(str(entry.get("domain", "items")), prompt, answer)
