"""Plan + checkpoint -> smaller checkpoint, file by file; the source is only read, and the result appears at once."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compressor.card import model_card
from compressor.checkpoint.blueprint import Blueprint, draw
from compressor.checkpoint.companions import CARD, PLAN, carry, write_durably
from compressor.checkpoint.destination import Partial, check_destination, check_space
from compressor.checkpoint.files import INDEX, Checkpoint, reading
from compressor.checkpoint.verification import compare, index_text, verify
from compressor.checkpoint.widths import WidthReport, check_widths
from compressor.checkpoint.writing import write_file
from compressor.plan import LayerKey, MergeStep, Plan, QuantizeStep
from compressor.plan.smooth_rules import require_stored
from moescope.errors import ModelError, PlanError, RunError

if TYPE_CHECKING:
    from compressor.edits.moments import LayerMoments

Progress = Callable[[int, int], None]
"""Called with (bytes written, bytes to write)."""


@dataclass(frozen=True)
class Receipt:
    """What a job did; never part of a plan.

    Attributes:
        destination: folder of the result.
        bytes_before: size of the source's weight files.
        bytes_after: size of the result's.
        tensors_copied: tensors of the result whose bytes are those of the source.
        tensors_edited: tensors that were computed or put together anew.
        tensors_removed: tensors of the source that are no more.
        loads_with: ``transformers``, or ``compressor.load`` where layers differ, weights are packed, or a route step
            changes what routers choose.
        notes: sentences for the reader.
        widths: what was found of the quantized matrices in the files of the result; None where none is, or nothing was
            written.
        seconds: it took.
        dry_run: nothing was written.
    """

    destination: Path
    bytes_before: int
    bytes_after: int
    tensors_copied: int
    tensors_edited: int
    tensors_removed: int
    loads_with: str
    notes: tuple[str, ...]
    seconds: float
    dry_run: bool = False
    widths: WidthReport | None = None


def apply(
    plan: Plan,
    *,
    source: str | Path,
    destination: str | Path,
    moments: Mapping[LayerKey, LayerMoments] | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Receipt:
    """Do to a checkpoint what a plan says.

    The result grows in ``.NAME.partial`` beside the destination and is renamed when it is whole and was looked over. A
    job that was interrupted goes on where it was when the same plan is applied to the same source again. Memory holds
    one expert at a time (with merges, those of a group), never a whole file.

    Args:
        plan: what to do.
        source: folder of safetensors files with ``config.json``, or the id of a model in the hub's cache.
        destination: folder to make; it may exist if it is empty.
        moments: second moments per layer, for merges by method ``subspace``.
        dry_run: check everything and write nothing.
        progress: told of every range that was written.

    Raises:
        PlanError: the plan is for another model, or asks for what this checkpoint cannot hold.
        ModelError: the source is missing, damaged, or of a family whose names are not known.
        InputError: the destination cannot be used, or has too little room.
        RunError: the result could not be written; nothing is at the destination.
    """
    began = time.monotonic()
    plan = plan.checked()
    require_stored(plan)
    _require_edits(plan)
    checkpoint = Checkpoint.open(source)
    target = check_destination(checkpoint.folder, destination)
    blueprint = draw(plan, checkpoint, moments)
    partial = Partial.of(target, _job(plan, checkpoint, moments))
    done = {file.name for file in blueprint.files if partial.finished(file)} if partial.resumable else set()
    check_space(target, sum(file.size for file in blueprint.files if file.name not in done))
    loads_with = "compressor.load" if blueprint.per_layer or blueprint.packed else "transformers"
    widths = None
    if not dry_run:
        with partial.opened() as folder:
            _write_weights(folder, blueprint, done, progress or (lambda written, total: None))
            names = _write_rest(folder, plan, checkpoint, blueprint, name=target.name, loads_with=loads_with)
            _look_over(folder, blueprint)
            widths = _look_at_widths(folder, plan, checkpoint, moments)
            partial.publish(names)
    return Receipt(
        destination=target,
        bytes_before=checkpoint.bytes_on_disk,
        bytes_after=blueprint.bytes_on_disk,
        tensors_copied=blueprint.copied,
        tensors_edited=blueprint.edited,
        tensors_removed=blueprint.removed,
        loads_with=loads_with,
        notes=blueprint.notes if widths is None else (*blueprint.notes, widths.summary),
        widths=widths,
        seconds=time.monotonic() - began,
        dry_run=dry_run,
    )


def _require_edits(plan: Plan) -> None:
    if not plan.for_checkpoint and plan.route is None:
        words = " and ".join(step.step for step in plan.steps)
        raise PlanError(f"the plan's steps ({words}) change no checkpoint: write them for an engine, moescope export")


def _job(plan: Plan, checkpoint: Checkpoint, moments: Mapping[LayerKey, LayerMoments] | None) -> dict[str, str]:
    """What has to be the same for a job to go on."""
    job = {"plan": plan.digest, "source": checkpoint.identity}
    if moments and any(isinstance(step, MergeStep) and step.method == "subspace" for step in plan.steps):
        digest = hashlib.sha256()
        for key in sorted(moments):
            for tensor in (moments[key].input, moments[key].activation_square):
                digest.update(repr((key, tensor.shape)).encode())
                digest.update(tensor.detach().cpu().double().numpy().tobytes())
        job["moments"] = digest.hexdigest()
    return job


def _write_weights(folder: Path, blueprint: Blueprint, done: set[str], progress: Progress) -> None:
    total, written = blueprint.bytes_on_disk, 0

    def tell(count: int) -> None:
        nonlocal written
        written += count
        progress(written, total)

    with reading() as reader:
        for file in blueprint.files:
            if file.name in done:
                tell(file.size)
            else:
                write_file(folder, file, reader, tell)


def _write_rest(
    folder: Path, plan: Plan, checkpoint: Checkpoint, blueprint: Blueprint, *, name: str, loads_with: str
) -> set[str]:
    """Everything beside the weights; the names of all that belongs to the result."""
    texts = {
        "config.json": json.dumps(blueprint.config, indent=2, ensure_ascii=False) + "\n",
        PLAN: plan.text(),
        CARD: model_card(
            plan,
            checkpoint.folder,
            name=name,
            loads_with=loads_with,
            notes=blueprint.notes,
            sizes=(checkpoint.bytes_on_disk, blueprint.bytes_on_disk),
        ),
    }
    if checkpoint.indexed:
        texts[INDEX] = index_text(blueprint.files)
    try:
        names = set(carry(checkpoint.folder, folder))
        for file, text in texts.items():
            write_durably(folder / file, text)
    except OSError as error:
        raise RunError(f"{folder} cannot be written: {error.strerror or error}") from error
    return names | set(texts) | {file.name for file in blueprint.files}


def _look_over(folder: Path, blueprint: Blueprint) -> None:
    compare(folder, blueprint.files)
    try:
        verify(folder)
    except ModelError as error:
        raise RunError(f"the result is not what it should be: {error}; nothing was put at the destination") from error


def _look_at_widths(
    folder: Path, plan: Plan, checkpoint: Checkpoint, moments: Mapping[LayerKey, LayerMoments] | None
) -> WidthReport | None:
    """Whether quantized matrices have the errors that their widths make; None where nothing is quantized.

    Raises:
        RunError: one has not; the files are removed, so that the next try writes them again.
    """
    if not any(isinstance(step, QuantizeStep) for step in plan.steps):
        return None
    report = check_widths(folder, checkpoint.folder, plan, moments=moments)
    if not report.passed:
        for path in folder.glob("*.safetensors"):
            path.unlink()
        raise RunError(f"the result is not what it should be: {report.summary}; nothing was put at the destination")
    return report
