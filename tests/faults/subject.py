"""What is killed: a piece of work on a folder, and how to tell afterwards that nothing came to harm."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tests.faults.killing import Say


class Subject(Protocol):
    """One kind of work. Everything but ``begin`` runs in children."""

    name: str

    def prepare(self, folder: Path) -> None:
        """Make what all trials share; runs once, in a child."""

    def begin(self, folder: Path) -> None:
        """Make what one trial needs in its own folder; runs in the process that forks, so it only copies files."""

    def work(self, folder: Path, say: Say) -> None:
        """The work, which may be killed; ``say`` reports what is committed."""

    def stage(self, folder: Path) -> str:
        """In a few words, what a kill left on disk."""

    def look(self, folder: Path, said: Sequence[Any]) -> list[str]:
        """What is lost or cannot be read right after the kill."""

    def again(self, folder: Path) -> list[str]:
        """Do the work to its end; what differs then from work that nobody disturbed."""


def fingerprint(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def names(folder: Path) -> list[str]:
    """What lies in a folder, hidden files too."""
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
