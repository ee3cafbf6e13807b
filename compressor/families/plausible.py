"""Numbers of a configuration that no model has: refused before anything is built or reserved for them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compressor.families.config_fields import COUNTS, NUM_LAYERS, SHARED_COUNTS, TOP_K
from moescope.errors import ModelError

MAX_LAYERS, MAX_EXPERTS, MAX_WIDTH = 4_096, 65_536, 1 << 24
"""Decoder layers; experts of one; channels, neurons or words."""

_MOST = {
    **dict.fromkeys(NUM_LAYERS, MAX_LAYERS),
    **dict.fromkeys((*COUNTS, *TOP_K, *SHARED_COUNTS, "num_attention_heads", "num_key_value_heads"), MAX_EXPERTS),
}
_WIDTHS = ("_size", "_dim", "_rank")


def require_plausible(content: Any, name: str) -> None:
    """Look through a configuration and its parts.

    Args:
        name: what the message calls it.

    Raises:
        ModelError: a number of layers, experts or channels is larger than any model's.
    """
    for field, value in _fields(content):
        most = MAX_WIDTH if field.endswith(_WIDTHS) else _MOST.get(field)
        if most is not None and isinstance(value, int | float) and value > most:
            raise ModelError(f"{name} cannot be: {field} is {value:.6g}, and no model has more than {most:,}")


def require_plausible_folder(folder: str | Path) -> None:
    """The same for the ``config.json`` of a folder; what is no folder, or has none that can be read, passes.

    Raises:
        ModelError: as :func:`require_plausible`.
    """
    file = Path(folder) / "config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return  # whoever needs it says so
    require_plausible(content, str(file))


def _fields(content: Any, depth: int = 0) -> Iterator[tuple[str, Any]]:
    if isinstance(content, dict) and depth < 8:
        for field, value in content.items():
            yield field, value
            yield from _fields(value, depth + 1)
