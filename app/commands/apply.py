"""``moescope apply``: a plan and a checkpoint become a smaller checkpoint."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.commands.options import add_config, add_json, add_store

if TYPE_CHECKING:
    import store
    from app.progress import ByteProgress
    from compressor.apply import Receipt
    from compressor.plan import Plan

NAME = "apply"
SUMMARY = "follow a plan: read a checkpoint, write the smaller one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("plan", metavar="PLAN", type=Path, help="a plan, as moescope plan writes it")
    parser.add_argument(
        "model", metavar="MODEL", help="the checkpoint that the plan was made for: a folder, or a hub id in the cache"
    )
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, help="folder of the new checkpoint")
    parser.add_argument(
        "--dry-run", action="store_true", help="check plan and checkpoint against each other; nothing is written"
    )
    parser.add_argument(
        "--progress-file", metavar="FILE", type=Path, help="keep the progress in this JSON file too, for other programs"
    )
    add_store(parser)
    add_config(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Follow the plan; what came of it is printed."""
    from app.progress import ByteProgress, Stoppable
    from compressor.plan import Plan
    from moescope.errors import InputError

    if options.output is None:
        raise InputError("where to? give -o DIR, a folder that does not exist yet")
    plan = Plan.load(options.plan)
    progress = ByteProgress("checking" if options.dry_run else "writing", file=options.progress_file)
    try:
        with Stoppable(), progress:
            receipt = _apply(options, plan, progress)
    except KeyboardInterrupt:
        words = "stopped" if options.dry_run else "stopped; the same command goes on where it stopped"
        print(f"moescope: {words}", file=sys.stderr)
        return 130
    content = _content(receipt, plan)
    if not options.dry_run:
        _keep(options, plan, content)
    _print(options, receipt, content)
    return 0


def _apply(options: argparse.Namespace, plan: Plan, progress: ByteProgress) -> Receipt:
    from compressor.apply import apply

    opened = _run_of(options, plan) if _needs_moments(plan) else None
    try:
        moments = None
        if opened is not None:
            from app.moments import Moments

            moments = Moments(opened, plan)
        return apply(
            plan,
            source=options.model,
            destination=options.output,
            moments=moments,
            dry_run=options.dry_run,
            progress=progress,
        )
    finally:
        if opened is not None:
            opened.close()


def _needs_moments(plan: Plan) -> bool:
    return any(step.step == "merge" and step.method == "subspace" for step in plan.steps)


def _run_of(options: argparse.Namespace, plan: Plan) -> store.Run:
    """The run that a plan comes from, whose second moments method ``subspace`` projects on.

    Raises:
        StoreError: it is not in the store.
    """
    import store
    from moescope.errors import StoreError

    try:
        return store.open_run(store.Catalog(options.store).resolve(plan.provenance.run))
    except StoreError as error:
        raise StoreError(
            f"merging by subspace needs the second moments of the plan's run, and {error}; give its folder with --store"
        ) from error


def _keep(options: argparse.Namespace, plan: Plan, content: dict[str, Any]) -> None:
    """A receipt beside the plan's run, where that is in the store."""
    import store
    from moescope.errors import StoreError

    with suppress(StoreError):
        path = store.Catalog(options.store).resolve(plan.provenance.run)
        store.write_plan(path, json.dumps(content, indent=1) + "\n", kind="receipt", name=plan.digest[:12])


def _print(options: argparse.Namespace, receipt: Receipt, content: dict[str, Any]) -> None:
    from app.text import duration, size

    if options.json:
        print(json.dumps(content))
        return
    before, after = receipt.bytes_before, receipt.bytes_after
    change = f" ({(after - before) / before:+.1%})" if before else ""
    would = "would be " if receipt.dry_run else ""
    lines = [
        f"{receipt.destination}: {size(before)} {would}made {size(after)}{change}",
        f"tensors: {receipt.tensors_copied:,} copied byte for byte, {receipt.tensors_edited:,} edited,"
        f" {receipt.tensors_removed:,} removed",
        f"loads with {receipt.loads_with}",
        *receipt.notes,
        f"dry run: nothing was written, {duration(receipt.seconds)}"
        if receipt.dry_run
        else f"took {duration(receipt.seconds)}",
    ]
    print("\n".join(lines))


def _content(receipt: Receipt, plan: Plan) -> dict[str, Any]:
    return {"plan": plan.digest, **asdict(receipt), "destination": str(receipt.destination)}
