"""What can be recorded, by the names that users give on the command line."""

from __future__ import annotations

from moescope.errors import InputError

LEVELS = {
    "routing": "selections, gate weights and router scores of every token",
    "activations": "what the experts put out, their neurons, and the residual stream",
}
"""The known levels, each with what it adds; every level implies ``routing``."""


def parse_levels(text: str) -> tuple[str, ...]:
    """The levels named in a comma list, in the order of :data:`LEVELS`, with ``routing`` always among them.

    Raises:
        InputError: a level that is not known.
    """
    names = {part.strip() for part in text.split(",") if part.strip()}
    unknown = sorted(names - set(LEVELS))
    if unknown:
        raise InputError(f"level {unknown[0]!r} is not known: use a comma list of {', '.join(LEVELS)}")
    return tuple(level for level in LEVELS if level in names | {"routing"})
