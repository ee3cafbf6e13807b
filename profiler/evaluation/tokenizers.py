"""Two models are compared on the same tokens, which have to mean the same to both."""

from __future__ import annotations

from typing import Any

from moescope.errors import ModelError

_SAMPLE = "A line, 42 numbers: naïve Größe\n\tif x_1 == '中文': return [0x1F, 3.14]"
"""Text whose tokens tell tokenizers with the same vocabulary apart."""


def require_same_tokenizer(first: Any, second: Any) -> None:
    """Refuse two models whose tokens mean different things.

    Raises:
        ModelError: the vocabularies differ, or the same text gives other tokens.
    """
    ours, theirs = first.get_vocab(), second.get_vocab()
    different = [token for token, number in ours.items() if theirs.get(token) != number]
    different += [token for token in theirs if token not in ours]
    if different:
        raise ModelError(
            f"the tokenizers differ in {len(different)} tokens, such as {min(different)!r}: models are compared on the"
            " same tokens only"
        )
    if first(_SAMPLE)["input_ids"] != second(_SAMPLE)["input_ids"]:
        raise ModelError("the tokenizers cut the same text differently: models are compared on the same tokens only")
