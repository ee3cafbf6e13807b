"""``--memory-limit`` put into effect: a command works within it, and says at its end how much it took."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

Command = Callable[[argparse.Namespace], int]


def within(options: argparse.Namespace, command: Command) -> int:
    """Run a command within ``--memory-limit``; where one was given, its peak of memory is told on stderr.

    Raises:
        InputError: the limit is below what any command takes.
    """
    if options.memory_limit is None:
        return command(options)
    from moescope import memory

    with memory.limited(options.memory_limit):
        code = command(options)
        print(memory.summary(), file=sys.stderr)
    return code
