"""Sizes of memory in words, the same on every page and in every message."""

from __future__ import annotations


def size(count: float) -> str:
    """Bytes as ``512 B``, ``3.4 MiB`` or ``1.25 GiB``."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < (1024 if unit == "B" else 999.5):
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:,.0f} GiB" if abs(count) >= 1000 else f"{count:.3g} GiB"
