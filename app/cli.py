"""The ``moescope`` command: picks the subcommand, and turns errors into one line and an exit code.

Nothing heavy is imported here: each subcommand imports what it needs when it runs, so ``moescope --help`` is quick.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from app import line
from app.commands import COMMANDS
from app.commands.options import apply_config
from app.terminal import guarded_output
from moescope import __version__
from moescope.errors import InputError, MoescopeError

_EXTRAS = {
    "torch": "torch",
    "transformers": "torch",
    "tokenizers": "torch",
    "streamlit": "app",
    "plotly": "app",
    "kaleido": "images",
}


class _Command(argparse.ArgumentParser):
    """A subcommand's parser: options may stand between its positional arguments (``show RUN --store DIR VIEW``)."""

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        """As the base, with positional arguments gathered from anywhere."""
        if self._inside:
            return super().parse_known_args(args, namespace)
        self._inside = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._inside = False

    _inside = False


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    top = argparse.ArgumentParser(
        prog="moescope",
        description="Profile a Mixture-of-Experts model: where it routes, which experts matter, whether caching pays.",
        epilog="Exit codes: 0 done, 1 the work failed, 2 the input was wrong. Try: moescope demo",
    )
    top.add_argument("--version", action="version", version=f"moescope {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Command)
    for command in COMMANDS:
        sub = commands.add_parser(command.NAME, help=command.SUMMARY, description=command.SUMMARY)
        command.add_arguments(sub)
        sub.set_defaults(run=command.run, parser=sub)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0 done, 1 failed, 2 wrong input, 130 interrupted)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(given)
    try:
        options = apply_config(parser(), options, given)
        with guarded_output():
            return int(options.run(options))
    except MoescopeError as error:
        return _complain(str(error), error.exit_code)
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        return _complain(f"{error.name} is not installed: pip install 'moescope[{extra}]'", InputError.exit_code)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    except BrokenPipeError:
        # The reader of a pipe (head, less) went away; leave without a second complaint at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _complain(message: str, code: int) -> int:
    from app.text import shown_in_terminal

    line.end()
    print(f"moescope: {shown_in_terminal(message)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
