"""What the tests know of their server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Served:
    """A dashboard that runs, and the file where all its connections to others are noted."""

    url: str
    port: int
    notes: Path
