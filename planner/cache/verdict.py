"""Whether caching experts pays: sizes of a cache against what the same memory gives without one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from moescope.sizes import size

Word = Literal["fits", "pays", "pays above", "does not pay"]
"""``fits``: all experts fit on the device, nothing is to be cached. ``pays``: at the memory that was asked for.
``pays above``: with more of it, see :attr:`Verdict.above`. ``does not pay``: at no size."""

GAIN = 0.9
"""Part of the time without a cache that the upper end of a cached time's interval may take for caching to pay; ours: a
tenth less is what one feels, and more than presets of machines are right about."""


@dataclass(frozen=True)
class SizePoint:
    """One size of the device's memory for experts.

    Attributes:
        bytes: of it.
        slots: experts that it holds, over all layers.
        way: the fastest way that goes by the trace, in words.
        ms: its time per token; low, high: interval over requests.
        plain: the fastest way that needs no trace: whole layers on the device, the CPU runs the others.
        chance: ``way`` on uniformly random experts.
        bound: what no policy can beat at this size.
    """

    bytes: int
    slots: int
    way: str
    ms: float
    low: float
    high: float
    plain: float
    chance: float
    bound: float

    @property
    def without(self) -> float:
        """The fastest that the memory gives without knowing anything of the routing."""
        return min(self.plain, self.chance)

    @property
    def pays(self) -> bool:
        """The whole interval is below :data:`GAIN` times that."""
        return self.high <= GAIN * self.without


@dataclass(frozen=True)
class Verdict:
    """The answer, and why.

    Attributes:
        word: see :data:`Word`.
        above: bytes for experts from which caching pays at all larger sizes that were tried; None where it never does,
            or at all of them.
        reasons: sentences, the most important first.
    """

    word: Word
    above: int | None
    reasons: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """In a few words."""
        if self.word == "fits":
            return "all experts fit: nothing is to be cached"
        if self.word == "pays above" and self.above is not None:
            return f"caching pays only above {size(self.above)} for experts"
        return "caching pays" if self.word == "pays" else "caching does not pay"


def judge(points: Sequence[SizePoint], *, asked: int, whole: int, told: Sequence[str] = ()) -> Verdict:
    """The verdict for one size of memory.

    Args:
        points: sizes that were tried, ascending; the one asked for is among them.
        asked: bytes that experts may take on the device.
        whole: bytes of all experts.
        told: further reasons, of whoever knows more than times.
    """
    if asked >= whole:
        words = f"All experts take {size(whole)}, and the device has {size(asked)} for them."
        return Verdict("fits", None, (words, *told))
    here = min(points, key=lambda point: abs(point.bytes - asked))
    above = _from_where(points)
    word: Word = "pays" if here.pays else "does not pay" if above is None else "pays above"
    return Verdict(word, above, (_why(here), *_elsewhere(points, here, above), *told))


def _from_where(points: Sequence[SizePoint]) -> int | None:
    """The smallest size from which it pays at all larger ones; the whole model, where all are alike, does not count."""
    found = None
    for point in reversed(points):
        if not point.pays:
            break
        found = point.bytes
    return found


def _why(point: SizePoint) -> str:
    interval = f"{point.ms:.3g} ms per token ({point.low:.3g} to {point.high:.3g})"
    others = f"{point.plain:.3g} with whole layers on the device and {point.chance:.3g} with the same on random experts"
    gain = point.without / point.ms - 1 if point.ms > 0 else 0.0
    if point.pays:
        return f"With {size(point.bytes)} for experts, {point.way}: {interval}, against {others}: {gain:+.0%}."
    if point.high < point.without:
        return f"With {size(point.bytes)} for experts, {point.way}: {interval}, against {others}: too little."
    return (
        f"With {size(point.bytes)} for experts the best that goes by the trace, {point.way}, takes {interval};"
        f" without any trace it is {point.without:.3g}."
    )


def _elsewhere(points: Sequence[SizePoint], here: SizePoint, above: int | None) -> list[str]:
    if here.pays:
        gap = here.ms / here.bound - 1 if here.bound > 0 else 0.0
        return [f"No policy could take less than {here.bound:.3g} ms there: {gap:.0%} are left to win."]
    if above is not None:
        first = next(point for point in points if point.bytes == above)
        return [f"From {size(above)} on it does: {first.ms:.3g} ms against {first.without:.3g} there."]
    if min(point.bound for point in points) > 0 and here.bound > GAIN * here.without:
        return [f"Not even a policy that knew the future could: it would take {here.bound:.3g} ms."]
    return []
