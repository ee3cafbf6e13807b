"""``moescope recommend --vram``: how to run a model on a machine whose device does not hold all of it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from app.commands.machines import asked_of, machine_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import store
    from planner.serving import Serving

ROWS = 12
"""Offers on the screen; --json prints all that are kept."""


def wanted(options: argparse.Namespace) -> bool:
    """Whether a machine was named, rather than a size of the weights."""
    return any(getattr(options, name) is not None for name in ("machine", "vram", "ram", "link", "disk"))


def refuse(options: argparse.Namespace) -> None:
    """Options that speak of weights alone.

    Raises:
        InputError: one was given.
    """
    from moescope.errors import InputError

    for name in ("memory", "data", "search", "finalists", "calibration", "engine"):
        if getattr(options, name):
            raise InputError(
                f"--{name} is about the size of weights, and a machine (--vram, --machine, ...) about where they lie:"
                " ask for one of both; apply the plan and measure it with moescope evaluate"
            )
    if options.curve or options.quick:
        raise InputError("--curve and --quick are about the size of weights: leave them out with a machine")
    if options.output is not None and not options.output.absolute().parent.is_dir():
        raise InputError(f"-o {options.output}: there is no folder {options.output.absolute().parent}")


def refuse_alone(options: argparse.Namespace) -> None:
    """Options that speak of a machine, where none was named.

    Raises:
        InputError: one was given.
    """
    from moescope.errors import InputError

    for name in ("context", "batch", "chunk", "phase", "keep_widths"):
        if getattr(options, name):
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} is about serving on a machine: give --vram or --machine too, or leave it out")


def run(opened: store.Run, options: argparse.Namespace, domains: list[str] | None) -> int:
    """Try, print and keep."""
    from app.sample import remarks
    from app.telling import Telling
    from planner.serving import serving

    machine, asked = machine_of(options), asked_of(options)
    if options.other_weights is None and options.model is not None:
        from app.whole_model import whole_model

        asked["other_weights"], stored = whole_model(opened, options.model)
        opened.info.settings["stored_dtype"] = stored
    with Telling() as tell:
        found = serving(
            opened, machine, domains=domains, guard=not options.no_guard, allow_invalid=options.allow_invalid,
            keep_widths=options.keep_widths, tell=tell,
            **({} if options.quality is None else {"quality": options.quality}), **asked,
        )  # fmt: skip
    paths = _keep(opened, found, options)
    if options.json:
        print(json.dumps({**found.content(), "paths": {key: str(at) for key, at in paths.items()}}))
    else:
        print(words(found, paths=paths, remarks=remarks(opened)))
    return 0


def words(found: Serving, *, paths: dict[str, Path], remarks: Sequence[str] = ()) -> str:
    """The advice on one screen: where the memory goes, why, offers, and what was assumed."""
    from app.frames.serving import told
    from app.text import size, table

    uses = [f"{size(found.memory[name])} {title}" for name, title in (
        ("other", "weights beside experts"), ("kv", "keys and values"), ("activations", "activations"),
        ("experts", "left for experts"))]  # fmt: skip
    parts = [f"{found.word}: {found.machine[1]}, {size(found.memory['total'])}: {', '.join(uses)}"]
    parts.append("\n".join(found.reasons))
    if found.offers:
        title = (
            "ms per token with a 95 % interval; KL divergence is predicted, nats per token;"
            " * = none is both faster and cheaper"
        )
        if any("elsewhere" in one.widths for one in found.offers):
            title += "\n4 + 2 bits: 4 on the device, 2 elsewhere"
        parts.append(f"{title}\n{table(told(found), rows=ROWS)}")
    parts.append("\n".join(f"note: {note}" for note in (*found.notes, *remarks)))
    if found.refused:
        parts.append(f"{len(found.refused)} combinations do not go; --json says why.")
    parts.append("\n".join(f"{what} is written to {path}" for what, path in paths.items()))
    if found.offers:
        narrower = any(step.step == "quantize" for step in found[0].steps)
        first = "moescope apply PLAN MODEL -o FOLDER writes the narrower experts; " if narrower else ""
        parts.append(f"{first}for an engine: moescope export PLAN --to llama.cpp (--list names others)")
    return "\n\n".join(part for part in parts if part)


def _keep(run: store.Run, found: Serving, options: argparse.Namespace) -> dict[str, Path]:
    import store

    paths = {"the advice": store.write_plan(run.path, json.dumps(found.content()), kind="serving")}
    if found.offers:
        plan = found[0]
        paths["the best plan"] = store.write_plan(run.path, plan.text())
        if options.output is not None:
            plan.save(options.output)
            paths["a copy of it"] = options.output
    return paths
