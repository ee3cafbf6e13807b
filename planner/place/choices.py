"""What :mod:`planner.place.heterogeneous` chooses from, as a JSON file says it.

::

    {"variants": ["whole", "int4"], "domains": ["chat", "code"], "devices": ["server", "laptop"],
     "loss": [[1.9, 1.2], [2.0, 1.3]], "memory": [32e9, 9e9],
     "latency": [[0.02, null], [0.015, 0.06]], "latency_limit": [0.1, null], "memory_limit": [80e9, 16e9]}

Tables have a row for each variant. ``null`` is infinite: a variant that cannot run on a device, or no limit.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from moescope.errors import PlanError
from planner.place.heterogeneous import Choices
from profiler.metrics._arrays import FloatArray

NAMES = ("variants", "domains", "devices")
AXES = {
    "loss": ("variants", "domains"), "latency": ("variants", "devices"), "energy": ("variants", "devices"),
    "memory": ("variants",), "share": ("domains",), "latency_limit": ("domains",), "energy_limit": ("devices",),
    "memory_limit": ("devices",),
}  # fmt: skip
"""The rows and columns of each entry."""

REQUIRED = ("loss", "latency", "memory")
_DEFAULTS = {"energy": 0.0, "share": 1.0, "latency_limit": math.inf, "energy_limit": math.inf, "memory_limit": math.inf}
_MAY_BE_INFINITE = ("latency", "latency_limit", "energy_limit", "memory_limit")


def parse(text: str) -> Choices:
    """The choices of a file's text.

    Raises:
        PlanError: it is no JSON object, names are missing or there twice, an entry is unknown, missing or of another
            shape, or a number is none.
    """
    try:
        content = json.loads(text)
    except ValueError as error:
        raise PlanError(f"choices are no JSON: {error}") from None
    if not isinstance(content, dict):
        raise PlanError(f"choices are a {type(content).__name__}: give an object with {', '.join((*NAMES, *REQUIRED))}")
    unknown = sorted(set(content) - {*NAMES, *AXES})
    if unknown:
        raise PlanError(f"choices have no entry {unknown[0]!r}: there are {', '.join((*NAMES, *AXES))}")
    missing = [name for name in (*NAMES, *REQUIRED) if name not in content]
    if missing:
        raise PlanError(f"choices lack {', '.join(missing)}")
    names = {name: _names(name, content[name]) for name in NAMES}
    entries: dict[str, Any] = {**names, **{name: _table(name, content, names) for name in AXES}}
    return Choices(**entries)


def _names(what: str, values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not values or not all(isinstance(one, str) and one for one in values):
        raise PlanError(f"{what} are {json.dumps(values)[:80]}: give a list of names")
    if len(set(values)) < len(values):
        raise PlanError(f"{what} {', '.join(values)[:80]}: name each once")
    return tuple(values)


def _table(name: str, content: dict[str, Any], names: dict[str, tuple[str, ...]]) -> FloatArray:
    """An entry as an array; what is left out has its default."""
    shape = tuple(len(names[axis]) for axis in AXES[name])
    if content.get(name) is None:
        if name in REQUIRED:
            raise PlanError(f"{name} is null: give numbers")
        return np.full(shape, _DEFAULTS[name])
    rows = content[name]
    wanted = " rows of ".join(f"{len(names[axis])} ({axis})" for axis in AXES[name])
    flat = [rows] if len(shape) == 1 else rows
    lengths = {len(row) if isinstance(row, list) else -1 for row in flat} if isinstance(flat, list) else {-1}
    if lengths != {shape[-1]} or (len(shape) == 2 and len(flat) != shape[0]):
        raise PlanError(f"{name} does not have {wanted} numbers")
    return np.array([[_number(name, value) for value in row] for row in flat], np.float64).reshape(shape)


def _number(name: str, value: Any) -> float:
    if value is None and name in _MAY_BE_INFINITE:
        return math.inf
    if isinstance(value, bool) or not isinstance(value, int | float):
        hint = " or null" if name in _MAY_BE_INFINITE else ""
        raise PlanError(f"{name} holds {json.dumps(value)[:40]}: give numbers of 0 or more{hint}")
    return float(value)
