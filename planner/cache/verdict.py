"""Whether caching experts pays: sizes of a cache against what the same memory gives without one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from moescope.sizes import size

Word = Literal["fits", "pays", "pays above", "does not pay"]
"""``fits``: all experts fit on the device, nothing is to be cached. ``pays``: at the memory that was asked for.
``pays above``: only with more of it, see :attr:`Verdict.above`. ``does not pay``: neither there nor from a larger size
on."""

GAIN = 0.9
"""Part of the time without a cache that the upper end of a cached time's interval may take for caching to pay; ours: a
tenth less is what one feels, and more than presets of machines are right about."""


FEW = 3
"""Requests that have to be judged for caching to be said to pay."""


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
        requests: judged; of fewer than :data:`FEW` an interval says nothing.
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
    requests: int = 3

    @property
    def without(self) -> float:
        """The fastest that the memory gives without knowing anything of the routing."""
        return min(self.plain, self.chance)

    @property
    def pays(self) -> bool:
        """The whole interval is below :data:`GAIN` times that."""
        return self.requests >= FEW and self.high <= GAIN * self.without


@dataclass(frozen=True)
class Verdict:
    """The answer, and why.

    Attributes:
        word: see :data:`Word`.
        above: bytes for experts from which caching pays at all larger sizes that were tried, but the whole model; None
            where there are none.
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
            return f"caching pays only from {size(self.above)} for experts on"
        return "caching pays" if self.word == "pays" else "caching does not pay"


def judge(
    points: Sequence[SizePoint], *, asked: int, whole: int, room: float | None = None, total: float | None = None,
    shared: bool = False, told: Sequence[str] = (),
) -> Verdict:  # fmt: skip
    """The verdict for one size of memory.

    Args:
        points: sizes that were tried, ascending; the one asked for is among them.
        asked: bytes of the experts that the device can hold.
        whole: bytes of as many as there are.
        room: bytes that experts may take on the device; None = ``asked``.
        total: bytes of all experts, where they differ in size; None = ``whole``.
        shared: device and CPU share one memory.
        told: further reasons, of whoever knows more than times.
    """
    total, room = whole if total is None else total, asked if room is None else room
    if asked >= whole:
        return Verdict("fits", None, (f"All experts take {size(total)}, and the device has {size(room)} for them.",))
    if shared:
        words = (
            "Device and CPU share one memory: what is in it is never copied, so there is nothing to cache. All experts"
            f" take {size(total)}, and the memory has {size(room)} for them; the others would be read from disk,"
            " which moescope recommend counts."
        )
        return Verdict("does not pay", None, (words,))
    here = min(points, key=lambda point: abs(point.bytes - asked))
    above = _from_where([point for point in points if point.bytes < whole])
    word: Word = "pays" if here.pays else "does not pay" if above is None else "pays above"
    few = (f"Only {here.requests} requests were judged, too few to say that it pays.",) if here.requests < FEW else ()
    return Verdict(word, above, (*few, *_why(here), *_elsewhere(points, here, above), *told))


def _from_where(points: Sequence[SizePoint]) -> int | None:
    """The smallest size from which it pays at all larger ones."""
    found = None
    for point in reversed(points):
        if not point.pays:
            break
        found = point.bytes
    return found


def _why(point: SizePoint) -> list[str]:
    told = [
        f"With {size(point.bytes)} for experts, the fastest way that goes by the trace takes {point.ms:.3g} ms per"
        f" token ({point.low:.3g} to {point.high:.3g}): {point.way}. Without a trace, whole layers on the device take"
        f" {point.plain:.3g} ms; the same way on random experts, {point.chance:.3g} ms."
    ]
    if point.pays:
        return [*told, f"That is {_times(point.without, point.ms)} as fast as the better of these."]
    if point.high <= GAIN * point.plain:
        return [
            *told,
            "That is less than whole layers take, but random experts would gain almost as much: the cache helps"
            " whatever the routing.",
        ]
    if point.ms >= point.without:
        return [*told, "Knowing the routing gains nothing."]
    return [*told, f"That does not surely save the {1 - GAIN:.0%} of the time from which on caching is said to pay."]


def _elsewhere(points: Sequence[SizePoint], here: SizePoint, above: int | None) -> list[str]:
    if here.pays:
        gap = f": the fastest way takes {_times(here.ms, here.bound)} that" if here.bound > 0 else ""
        return [f"No way at all could take less than {here.bound:.3g} ms there{gap}."]
    if above is not None:
        first = next(point for point in points if point.bytes == above)
        return [f"With {size(above)} it pays: {first.ms:.3g} ms against {first.without:.3g} ms."]
    less = [point for point in points if point.pays and point.bytes < here.bytes]
    if less:
        most = less[-1]
        return [
            f"With less memory it pays, as with {size(most.bytes)}: {most.ms:.3g} ms against {most.without:.3g} ms."
        ]
    if here.bound > GAIN * here.without:
        return [
            f"Not even a policy that knew the future could save so much: it would take {here.bound:.3g} ms or more."
        ]
    return []


def _times(more: float, less: float) -> str:
    return f"{more / less:.2f} times" if less > 0 else "many times"
