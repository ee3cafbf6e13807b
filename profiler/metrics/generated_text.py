"""What a model's own text looks like: repetition, variety, loops, and where it leaves another model's text.

All functions take one text as token ids. Damaged models fall into loops long before perplexity shows much.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def ngrams(tokens: Sequence[int], n: int) -> tuple[int, int]:
    """How many n-grams a text has, and how many different ones."""
    found = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
    return len(found), len(set(found))


def repeated_ngrams(tokens: Sequence[int], n: int = 4) -> float:
    """Share of the n-grams that stood before in the same text (Welleck et al., arXiv 1908.04319: seq-rep-n), 0..1.

    NaN for a text shorter than n.
    """
    total, different = ngrams(tokens, n)
    return 1.0 - different / total if total else float("nan")


def distinct_ngrams(tokens: Sequence[int], n: int = 2) -> float:
    """Share of different n-grams (Li et al., arXiv 1510.03055: distinct-n), 0..1; NaN for a text shorter than n."""
    total, different = ngrams(tokens, n)
    return different / total if total else float("nan")


def longest_loop(tokens: Sequence[int]) -> int:
    """Tokens of the longest stretch that is one piece said at least twice in a row; 0 if no piece is.

    ``a b c b c b d`` holds ``b c b c b``: 5. The last repetition may be broken off.
    """
    ids = np.asarray(tokens)
    longest = 0
    for period in range(1, len(ids) // 2 + 1):
        run = 0
        for same in (ids[period:] == ids[:-period]).tolist():
            run = run + 1 if same else 0
            if run >= period:
                longest = max(longest, run + period)
    return longest


def first_difference(tokens: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    for place, (one, other) in enumerate(zip(tokens, others, strict=False)):
        if one != other:
            return place
    return min(len(tokens), len(others))
