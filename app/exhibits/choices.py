"""What can be chosen of an exhibit, read from its signature, and checked against the run."""

from __future__ import annotations

import inspect
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal

import store
from app.exhibits.exhibit import Entry
from app.frames.axes import layer_labels, phases
from moescope.errors import InputError

_GIVEN = ("run", "frames", "theme")


@dataclass(frozen=True)
class Choice:
    """One choice of an exhibit: its name, type, default, and the values that it allows (None = any of the type)."""

    name: str
    type: type
    default: Any
    options: tuple[str, ...] | None = None


def choices_of(entry: Entry) -> dict[str, Choice]:
    """The choices of an exhibit by name."""
    hints = typing.get_type_hints(entry.make)
    parameters = inspect.signature(entry.make).parameters
    return {
        name: _choice(name, hints[name], parameter.default)
        for name, parameter in parameters.items()
        if name not in _GIVEN
    }


def _choice(name: str, hint: Any, default: Any) -> Choice:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is Literal:
        return Choice(name, str, default, tuple(typing.get_args(hint)))
    return Choice(name, hint, default)


def checked(entry: Entry, run: store.Run, given: dict[str, Any]) -> dict[str, Any]:
    """The given choices in their types.

    Raises:
        InputError: a choice that the exhibit lacks, or a value that it or the run does not allow.
    """
    known = choices_of(entry)
    return {name: _value(entry, run, known.get(name), name, value) for name, value in given.items()}


def _value(entry: Entry, run: store.Run, choice: Choice | None, name: str, value: Any) -> Any:
    if choice is None:
        there = ", ".join(choices_of(entry)) or "nothing"
        raise InputError(f"figure {entry.name} has no choice {name!r}; it can be told {there}")
    options = choice.options or _of_run(run, name)
    if options is not None and str(value) not in options:
        shown = ", ".join(options[:40]) + (", ..." if len(options) > 40 else "")
        raise InputError(f"{name} {value!r} of figure {entry.name} is none of {shown}")
    try:
        if choice.type is bool and isinstance(value, str):
            return {"yes": True, "true": True, "no": False, "false": False}[value.lower()]
        return choice.type(value)
    except (ValueError, KeyError):
        raise InputError(f"{name} {value!r} of figure {entry.name} is no {choice.type.__name__}") from None


def _of_run(run: store.Run, name: str) -> tuple[str, ...] | None:
    """The values that a run allows for the choices that mean the same everywhere."""
    if name == "domain":
        return tuple(run.domains)
    if name == "layer":
        return tuple(layer_labels(run))
    return tuple(phases(run)) if name == "phase" else None
