"""The subcommands of ``moescope``, in the order in which ``--help`` lists them.

A command is a module with ``NAME``, ``SUMMARY``, ``add_arguments(parser)`` and ``run(options) -> exit code``. To add
one, write the module and list it here.
"""

from __future__ import annotations

from types import ModuleType

from app.commands import (
    ablate,
    apply,
    cache,
    collect,
    compare,
    dashboard,
    demo,
    evaluate,
    export,
    figure,
    import_,
    inspect,
    measure_device,
    place,
    plan,
    query,
    rank,
    recommend,
    report,
    route,
    runs,
    show,
    sweep,
)

COMMANDS: tuple[ModuleType, ...] = (
    demo,
    inspect,
    collect,
    import_,
    runs,
    show,
    query,
    figure,
    report,
    compare,
    ablate,
    sweep,
    plan,
    rank,
    recommend,
    cache,
    place,
    route,
    apply,
    export,
    evaluate,
    measure_device,
    dashboard,
)
