"""What an export leaves out, in few sentences: what is said of one layer after another is said once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_OF_A_LAYER = re.compile(r"layer (?P<layer>\d+)(?: step \d+)?(?: expert \d+)?(?: \((?P<what>[^)]*)\))?: (?P<why>.+)")


def told_once(sentences: Sequence[str]) -> list[str]:
    """The sentences in their order, those that give one reason for several layers put together.

    Args:
        sentences: of ``compressor.exporters.Exported.left_out``; ``layer 3 expert 5 (gate 4 bit): WHY`` and
            ``layer 3 (WHAT): WHY`` are of a layer, all others stand for themselves.
    """
    groups: dict[str, list[str]] = {}
    for sentence in sentences:
        found = _OF_A_LAYER.fullmatch(sentence)
        groups.setdefault(sentence if found is None else f"\n{found['why']}", []).append(sentence)
    return [each[0] if len(each) == 1 else _together(each) for each in groups.values()]


def _together(sentences: Sequence[str]) -> str:
    found = [match for match in map(_OF_A_LAYER.fullmatch, sentences) if match is not None]
    if not found:
        return f"{sentences[0]} ({len(sentences):,} times)"
    layers = sorted({int(one["layer"]) for one in found})
    what = {one["what"] for one in found}
    same = f" ({found[0]['what']})" if len(what) == 1 and found[0]["what"] else ""
    units = f"{len(sentences):,} experts of " if len(sentences) > len(layers) else ""
    return f"{units}layer{'s' if len(layers) > 1 else ''} {ranges(layers)}{same}: {found[0]['why']}"


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers in words: ``0 to 5, 7, 9 to 12``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)
