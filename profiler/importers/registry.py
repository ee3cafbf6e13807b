"""The formats that can be imported, in the order of lists. A new one is a file here and a line below."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import cast

from moescope.errors import InputError
from profiler.importers.recording import ImportOptions, Recording


@dataclass(frozen=True)
class Format:
    """One format: its name, where it comes from, what PATH is, what a run of it can say, and the reader's module."""

    name: str
    source: str
    path: str
    gives: str
    module: str
    extra: str = ""

    @property
    def read(self) -> Callable[[Path, ImportOptions], Recording]:
        """The reader: opens a path lazily; raises ImportFileError where it is not of this format."""
        return cast("Callable[[Path, ImportOptions], Recording]", import_module(self.module).read)


FORMATS: tuple[Format, ...] = (
    Format("npz", "any tool", "FILE.npz", "trace, weights, labels", "profiler.importers.npz"),
    Format("csv", "any tool", "FILE.csv[.gz]", "trace (token,layer,slot,expert,weight) or counts (layer,expert)",
           "profiler.importers.csv"),
    Format("megatron", "Megatron Core", "router_trace_rank0.jsonl", "counts per step", "profiler.importers.megatron"),
)  # fmt: skip


def format_named(name: str) -> Format:
    """The format called ``name``.

    Raises:
        InputError: there is none; the message lists those that are.
    """
    for one in FORMATS:
        if one.name == name:
            return one
    raise InputError(f"no import format {name!r}; there are {', '.join(one.name for one in FORMATS)}")
