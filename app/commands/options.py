"""Options that several commands share, and options from a file."""

from __future__ import annotations

import argparse
import os
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

from app import line
from moescope.errors import InputError

_LARGE = 32 << 20
"""Bytes that take more than a moment to fetch."""


def add_store(parser: argparse.ArgumentParser) -> None:
    """``--store DIR``: where the runs are, a directory or a URL such as ``s3://bucket/prefix``."""
    parser.add_argument(
        "--store",
        metavar="DIR",
        type=store_location,
        default=os.environ.get("MOESCOPE_STORE", "runs"),
        help="directory of runs, or a URL such as s3://bucket/prefix (default: ./runs)",
    )


def add_stores(parser: argparse.ArgumentParser) -> None:
    """``--store DIR...``: as :func:`add_store`, of a command that shows several at once."""
    parser.add_argument(
        "--store",
        metavar="DIR",
        nargs="+",
        type=store_location,
        help="directories of runs, or URLs such as s3://bucket/prefix (default: ./runs)",
    )


def store_location(text: str) -> Path:
    """The directory of a store: itself, or the mirror of a URL."""
    if "://" not in text:
        return Path(text)
    from moescope.errors import MoescopeError
    from store.remote import located, tell_by

    tell_by(_fetching)
    try:
        return located(text)
    except MoescopeError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _fetching(name: str, done: int, total: int) -> None:
    """How far a fetch of more than a moment is, on a terminal."""
    from moescope.sizes import size

    if total < _LARGE or not sys.stderr.isatty():
        return
    if done < total:
        line.over(f"fetching {name}: {done / total:.0%} of {size(total)}")
    else:
        line.clear()


def add_json(parser: argparse.ArgumentParser) -> None:
    """``--json``: an answer for machines."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def add_config(parser: argparse.ArgumentParser) -> None:
    """``--config FILE``: any option from a TOML file; what the command line says wins."""
    parser.add_argument("--config", metavar="FILE", type=Path, help="TOML file of options, such as tokens = 100000")


def add_memory_limit(parser: argparse.ArgumentParser) -> None:
    """``--memory-limit SIZE``: what the command may hold; for ``moescope.memory.limited``."""
    parser.add_argument(
        "--memory-limit", metavar="SIZE", type=memory, help="what this process may hold at most, such as 4GiB"
    )


def memory(text: str) -> int:
    """Bytes of ``3GiB``, ``500MB``, ``12g`` or a plain number."""
    from moescope.memory import size_of

    try:
        return size_of(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def positive(text: str) -> int:
    """A whole number above zero; also ``100k`` and ``1.5M``."""
    factors = {"k": 1_000, "m": 1_000_000, "g": 1_000_000_000}
    factor = factors.get(text[-1:].lower(), 1)
    try:
        number = float(text[:-1] if factor > 1 else text) * factor
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number; write 100000 or 100k") from None
    if number < 1 or number != int(number):
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number above zero")
    return int(number)


def apply_config(
    parser: argparse.ArgumentParser, options: argparse.Namespace, given: Sequence[str]
) -> argparse.Namespace:
    """Parse again with the defaults that ``--config FILE`` gives, if it was given.

    Raises:
        InputError: the file cannot be read, is not TOML, or names an option that the command has not.
    """
    file: Path | None = getattr(options, "config", None)
    if file is None:
        return options
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"--config {file}: {error}") from error
    command: argparse.ArgumentParser = options.parser
    actions = {action.dest: action for action in command._actions if action.option_strings}
    words: list[str] = []
    for name, value in content.items():
        action = actions.get(name.replace("-", "_"))
        if action is None or action.dest in ("help", "config"):
            raise InputError(f"--config {file}: {options.command} has no option {name!r}; it has {_names(actions)}")
        words += _as_words(action, value)
    # The file's options come first, so that what the command line says wins; --config behind them ends their last list.
    place = list(given).index(options.command) + 1
    words = [*_not_given(words, given), "--config", str(file)]
    return parser.parse_args([*given[:place], *words, *given[place:]])


def _as_words(action: argparse.Action, value: object) -> list[str]:
    flag = next(text for text in action.option_strings if text.startswith("--"))
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        if isinstance(action, argparse.BooleanOptionalAction) and value is False:
            return [f"--no-{flag[2:]}"]
        return [flag] if value else []
    values = value if isinstance(value, list) else [value]
    if action.nargs in ("+", "*"):
        return [flag, *map(str, values)]
    return [word for item in values for word in (flag, str(item))]


def _not_given(words: list[str], given: Sequence[str]) -> list[str]:
    """Leave out list options of the file that the command line gives too: lists replace, they do not add up."""
    kept: list[str] = []
    skipping = False
    for word in words:
        if word.startswith("--"):
            skipping = word in given or any(text.startswith(f"{word}=") for text in given)
        if not skipping:
            kept.append(word)
    return kept


def _names(actions: dict[str, argparse.Action]) -> str:
    return ", ".join(name.replace("_", "-") for name in actions if name not in ("help", "config"))
