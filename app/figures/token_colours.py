"""Colours of tokens: the palette of the figures, each with an ink that can be read on it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from app.figures.style import Theme, palette

STEPS = 33
"""Colours of a scale of tokens."""

EXPERTS = 9
"""Experts that have a colour of their own; the palette's ninth is grey and stands for the others."""

STRENGTH = 0.5
"""Of an expert's colour on the background."""

_GREY = 8
_INKS = ("#0A0F14", "#FFFFFF")


def ramp(theme: Theme = "light") -> list[tuple[str, str]]:
    """(background, ink) from little to much, :data:`STEPS` of them, along the figures' sequential scale; but for its
    last two colours, in which a page of text would be too loud."""
    stops = np.array([_rgb(colour) for colour in palette(theme).sequential[:-2]], np.float64)
    at = np.linspace(0, len(stops) - 1, STEPS)
    mixed = np.stack([np.interp(at, np.arange(len(stops)), stops[:, channel]) for channel in range(3)], axis=1)
    return [with_ink(_hex(colour)) for colour in mixed]


def shades(values: NDArray[np.float64], *, low: float, high: float, count: int = STEPS) -> NDArray[np.int64]:
    """Index of the colour of each value on a ramp of ``count`` colours between ``low`` and ``high``; -1 for NaN."""
    span = high - low if high > low else 1.0
    known = np.isfinite(values)
    part = np.clip((np.where(known, values, low) - low) / span, 0.0, 1.0)
    return np.where(known, np.rint(part * (count - 1)), -1).astype(np.int64)


def expert_colours(experts: Sequence[int], theme: Theme = "light") -> list[tuple[str, str]]:
    """(background, ink) of each of the first experts, and last the grey of all others."""
    colours = [colour for index, colour in enumerate(palette(theme).categorical) if index != _GREY]
    chosen = [_mixed(colour, palette(theme).background) for colour in colours[: min(len(experts), EXPERTS)]]
    return [with_ink(colour) for colour in (*chosen, palette(theme).grid)]


def most_frequent(first: NDArray[np.integer]) -> list[int]:
    """The experts that are first choice most often, the most frequent first; ties by number."""
    counts = np.bincount(first[first >= 0]) if (first >= 0).any() else np.zeros(0, np.int64)
    order = np.lexsort((np.arange(len(counts)), -counts))
    return [int(one) for one in order[:EXPERTS] if counts[one]]


def with_ink(colour: str) -> tuple[str, str]:
    """The colour, and of a dark and a light ink the one that stands out more on it."""
    return colour, max(_INKS, key=lambda ink: contrast(ink, colour))


def contrast(one: str, other: str) -> float:
    """Contrast of two colours, 1 to 21 (WCAG 2)."""
    bright, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def _mixed(colour: str, background: str) -> str:
    """The colour, thinned so that a page of it stays calm and its text stays readable."""
    pairs = zip(_rgb(colour), _rgb(background), strict=True)
    return _hex(np.array([STRENGTH * one + (1 - STRENGTH) * other for one, other in pairs]))


def _luminance(colour: str) -> float:
    parts = [value / 255 for value in _rgb(colour)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _hex(colour: NDArray[np.float64]) -> str:
    return "#" + "".join(f"{round(float(value)):02X}" for value in colour)
