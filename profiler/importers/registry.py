"""The formats that can be imported, in the order of lists. A new one is a file here and a line below."""

from __future__ import annotations

from importlib import import_module

from moescope.errors import InputError
from profiler.importers.format import Format

MODULES = (
    "npz",
    "csv",
    "sglang",
    "responses",
    "tensorrt_llm",
    "imatrix",
    "megatron",
)
"""Files beside this one; each says at its end, in ``FORMATS``, what it reads."""

FORMATS: tuple[Format, ...] = tuple(
    one for name in MODULES for one in import_module(f"profiler.importers.{name}").FORMATS
)


def format_named(name: str) -> Format:
    """The format called ``name``.

    Raises:
        InputError: there is none; the message lists those that are.
    """
    for one in FORMATS:
        if one.name == name:
            return one
    raise InputError(f"no import format {name!r}; there are {', '.join(one.name for one in FORMATS)}")


__all__ = ["FORMATS", "MODULES", "Format", "format_named"]
