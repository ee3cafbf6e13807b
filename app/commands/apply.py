"""``moescope apply``: a plan and a checkpoint become a smaller checkpoint."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.commands.inputs import add_corpus
from app.commands.options import add_config, add_json, add_store, positive

if TYPE_CHECKING:
    import store
    from app.moments import Moments
    from app.progress import ByteProgress
    from compressor.apply import Receipt
    from compressor.autoround import Report
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
    parser.add_argument(
        "--no-check-models", action="store_true", help="do not load source and result to hold them against each other"
    )
    _add_backend(parser)
    add_corpus(parser)
    add_store(parser)
    add_config(parser)
    add_json(parser)


def _add_backend(parser: argparse.ArgumentParser) -> None:
    backend = parser.add_argument_group("backend")
    backend.add_argument(
        "--backend", choices=("own", "autoround"), default="own",
        help="who quantizes: own (default), or AutoRound, which tunes the rounding on --data",
    )  # fmt: skip
    backend.add_argument(
        "--iters",
        type=int,
        default=200,
        metavar="N",
        help="autoround: steps per layer (default 200); 0 = round to nearest",
    )
    backend.add_argument(
        "--samples", type=positive, default=128, metavar="N", help="autoround: sequences to tune on (default 128)"
    )
    backend.add_argument("--device", default="cpu", help="autoround: where it runs (default cpu)")
    backend.add_argument("--python", default=sys.executable, metavar="PATH", help="autoround: a Python that has it")


def run(options: argparse.Namespace) -> int:
    """Follow the plan; what came of it is printed."""
    from app.progress import ByteProgress, Stoppable
    from compressor.plan import Plan
    from moescope.errors import InputError, RunError

    if options.output is None:
        raise InputError("where to? give -o DIR, a folder that does not exist yet")
    plan = Plan.load(options.plan)
    progress = ByteProgress("checking" if options.dry_run else "writing", file=options.progress_file)
    with Stoppable(), _moments(options, plan) as moments:
        try:
            with progress:
                receipt, report = _apply(options, plan, moments, progress)
        except KeyboardInterrupt:
            resumes = not options.dry_run and options.backend == "own"
            words = "stopped; the same command goes on where it stopped" if resumes else "stopped"
            print(f"moescope: {words}", file=sys.stderr)
            return 130
        checked = None if options.dry_run else _check(options, plan, receipt, report, moments)
    content = _content(receipt, plan)
    if not options.dry_run:
        _keep(options, plan, content, "receipt")
    if checked is not None:
        _keep(options, plan, {"plan": plan.digest, **checked}, "check")
        content["check"] = checked
    _print(options, receipt, content)
    if checked is not None and checked["failure"]:
        raise RunError(f"{receipt.destination} is not what the plan says: {checked['failure']}")
    return 0


def _apply(
    options: argparse.Namespace, plan: Plan, moments: Moments | None, progress: ByteProgress
) -> tuple[Receipt, Report | None]:
    if options.backend == "autoround":
        return _autoround(options, plan, moments)
    from compressor.apply import apply

    receipt = apply(
        plan,
        source=options.model,
        destination=options.output,
        moments=moments,
        dry_run=options.dry_run,
        progress=progress,
    )
    return receipt, None


def _autoround(options: argparse.Namespace, plan: Plan, moments: Moments | None) -> tuple[Receipt, Report]:
    from app.commands.inputs import open_text
    from compressor.autoround import Tuning, apply
    from moescope.errors import InputError

    if options.dry_run:
        raise InputError("--dry-run is for the own backend: AutoRound cannot be asked without running")
    tokens: list[list[int]] = []
    if options.data:
        from profiler import load_tokenizer

        for batch in open_text(options, load_tokenizer(options.model)).batches():
            rows = zip(batch.input_ids, batch.attention_mask, strict=True)
            tokens += [ids[mask == 1].tolist() for ids, mask in rows]
    tuning = Tuning(
        iters=options.iters, samples=options.samples, length=options.sequence_length, batch=options.batch_size,
        device=options.device, seed=options.seed,
    )  # fmt: skip
    return apply(
        plan, source=options.model, destination=options.output, tokens=tokens, tuning=tuning, moments=moments,
        python=options.python, tell=lambda line: print(line, file=sys.stderr),
    )  # fmt: skip


def _check(
    options: argparse.Namespace, plan: Plan, receipt: Receipt, report: Report | None, moments: Moments | None
) -> dict[str, Any] | None:
    from app.model_check import check, unchecked

    try:
        return check(
            plan, source=options.model, destination=receipt.destination, source_bytes=receipt.bytes_before,
            report=report, moments=moments, skip=options.no_check_models,
        )  # fmt: skip
    except KeyboardInterrupt:  # the result is there, and whole
        return unchecked("stopped")


@contextmanager
def _moments(options: argparse.Namespace, plan: Plan) -> Iterator[Moments | None]:
    """Second moments of the plan's run, where its method needs them."""
    if not _needs_moments(plan):
        yield None
        return
    from app.moments import Moments

    with closing(_run_of(options, plan)) as opened:
        yield Moments(opened, plan)


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


def _keep(options: argparse.Namespace, plan: Plan, content: dict[str, Any], kind: str) -> None:
    """A document beside the plan's run, where that is in the store."""
    import store
    from moescope.errors import StoreError

    with suppress(StoreError):
        path = store.Catalog(options.store).resolve(plan.provenance.run)
        store.write_plan(path, json.dumps(content, indent=1) + "\n", kind=kind, name=plan.digest[:12])


def _print(options: argparse.Namespace, receipt: Receipt, content: dict[str, Any]) -> None:
    from app.model_check import words
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
        *([words(content["check"])] if content.get("check") else []),
        f"dry run: nothing was written, {duration(receipt.seconds)}"
        if receipt.dry_run
        else f"took {duration(receipt.seconds)}",
    ]
    print("\n".join(lines))


def _content(receipt: Receipt, plan: Plan) -> dict[str, Any]:
    return {"plan": plan.digest, **asdict(receipt), "destination": str(receipt.destination)}
