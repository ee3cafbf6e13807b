"""What a format is: declared at the end of the file that reads it, in ``FORMATS``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from profiler.importers.recording import ImportOptions, Recording


@dataclass(frozen=True)
class Format:
    """One format that can be imported.

    Attributes:
        name: what ``moescope import`` takes.
        source: the tool that writes it.
        path: what PATH is, in a few words.
        gives: what a run of it can say.
        read: the reader: opens a path lazily; raises ImportFileError where it is not of this format.
        section: the text of its section in docs/importers.md, put there by ``python -m profiler.document``; empty =
            the section is written there by hand.
    """

    name: str
    source: str
    path: str
    gives: str
    read: Callable[[Path, ImportOptions], Recording]
    section: str = ""
