"""Unequal devices: what a file of choices comes to, printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner.place.heterogeneous import Assignment, Choices

_UNITS = {"loss": "nats", "latency": "s", "memory": "bytes", "energy": "J"}
"""Of figures that are printed; per token, but for memory."""


def print_assignment(path: Path, *, as_json: bool) -> int:
    """Solve a file of choices and print which variant serves which domain on which device.

    Raises:
        InputError: the file cannot be read.
        PlanError: it is no such file, or nothing meets its limits.
    """
    from app.text import table
    from planner.place.choices import parse
    from planner.place.heterogeneous import assign

    choices = parse(read(path))
    found = assign(choices)
    if as_json:
        print(json.dumps(content(choices, found)))
        return 0
    served, used = tables(choices, found)
    print(f"{found.loss:.4f} nats per token over all domains, the least that the limits allow\n")
    print("\n\n".join(table(frame.rename(_with_units(frame.columns))) for frame in (served, used)))
    return 0


def content(choices: Choices, found: Assignment) -> dict[str, Any]:
    """The assignment for machines."""
    served, used = tables(choices, found)
    return {"loss": found.loss, "domains": served.to_dicts(), "devices": used.to_dicts()}


def tables(choices: Choices, found: Assignment) -> tuple[Any, Any]:
    """What serves each domain, and what each device carries; limits that there are none of are null."""
    import polars as pl

    served = [
        {
            "domain": name, "variant": choices.variants[variant], "device": choices.devices[device],
            "loss": float(choices.loss[variant, place]), "latency": float(choices.latency[variant, device]),
            "latency limit": _limit(choices.latency_limit[place]),
        }
        for place, (name, variant, device) in enumerate(zip(choices.domains, found.variant, found.device, strict=True))
    ]  # fmt: skip
    used = [
        {
            "device": name, "memory": float(found.memory[place]), "memory limit": _limit(choices.memory_limit[place]),
            "energy": float(found.energy[place]), "energy limit": _limit(choices.energy_limit[place]),
        }
        for place, name in enumerate(choices.devices)
    ]  # fmt: skip
    floats = {name: pl.Float64 for row in (served[0], used[0]) for name in row if name.endswith("limit")}
    return (
        pl.DataFrame(served, schema_overrides={name: kind for name, kind in floats.items() if name in served[0]}),
        pl.DataFrame(used, schema_overrides={name: kind for name, kind in floats.items() if name in used[0]}),
    )


def read(path: Path) -> str:
    """The text of a file.

    Raises:
        InputError: it cannot be read.
    """
    from moescope.errors import InputError

    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _with_units(names: list[str]) -> dict[str, str]:
    return {name: f"{name}, {_UNITS[name.split()[0]]}" for name in names if name.split()[0] in _UNITS}


def _limit(value: float) -> float | None:
    return None if value == float("inf") else float(value)
