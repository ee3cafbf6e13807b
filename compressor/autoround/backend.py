"""Plan + checkpoint -> checkpoint by AutoRound: what is asked, prepared, and put in its place when it is whole."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.apply import Receipt
from compressor.apply import apply as cut
from compressor.autoround.process import require_auto_round, run_job
from compressor.card import model_card
from compressor.checkpoint.companions import CARD, PLAN, carry, write_durably
from compressor.checkpoint.destination import check_destination, check_space
from compressor.checkpoint.files import Checkpoint
from compressor.exporters.autoround import layer_config
from compressor.exporters.exported import quantize_step
from compressor.plan import LayerKey, Plan, QuantizeStep
from moescope.errors import InputError, PlanError, RunError

if TYPE_CHECKING:
    from compressor.edits.moments import LayerMoments

MIN_ITERS = 50
"""Fewer steps make the weights worse than rounding to nearest: the step size is one over their number."""

LOOK = 64
"""Tokens whose logits are computed with the loaded result."""

WRONG = {
    "gpt_oss": "AutoRound 0.16 runs its experts with gates and ups in one order and its activation in another",
}
"""Families whose results compute something else although every matrix is right, and why."""

LOADS_WITH = "transformers with auto-round"

_LEFT_BY_CUTS = "apply it first"


@dataclass(frozen=True)
class Tuning:
    """How AutoRound finds the rounding.

    Attributes:
        iters: steps per decoder layer; 0 = round to nearest, without text.
        samples: rows of text at most.
        length: tokens per row.
        batch: rows per step.
        device: where it runs.
        seed: of the order.
    """

    iters: int = 200
    samples: int = 128
    length: int = 512
    batch: int = 8
    device: str = "cpu"
    seed: int = 0


@dataclass(frozen=True)
class Report:
    """What AutoRound's result is when transformers loads it, in the other process.

    Attributes:
        missing: names of weights that the result lacks.
        mismatched: names of weights of another shape.
        errors: module name -> relative error of its matrix to the source's; None where the module is not there.
        widths: module name -> planned width.
        ids: tokens whose logits follow.
        logits: (tokens, vocabulary).
        tuned: the rounding was tuned on text; else rounded to nearest.
    """

    missing: tuple[str, ...]
    mismatched: tuple[str, ...]
    errors: Mapping[str, float | None]
    widths: Mapping[str, int]
    ids: Any
    logits: Any
    tuned: bool = True


def apply(
    plan: Plan,
    *,
    source: str | Path,
    destination: str | Path,
    tokens: Sequence[Sequence[int]] = (),
    tuning: Tuning | None = None,
    moments: Mapping[LayerKey, LayerMoments] | None = None,
    python: str = sys.executable,
    tell: Callable[[str], None] | None = None,
) -> tuple[Receipt, Report]:
    """Do to a checkpoint what a plan says, its widths by AutoRound.

    Steps before the quantize step are done first by :func:`compressor.apply`, into a folder that goes away. AutoRound's
    own grids take the widths, group size and symmetry of the plan; how scales are found is AutoRound's.

    Args:
        plan: with a quantize step that AutoRound can say.
        source: folder of safetensors files, or the id of a model in the hub's cache.
        destination: folder to make.
        tokens: ids of the user's text, a list per document; not needed with ``iters=0``.
        tuning: how the rounding is found.
        moments: second moments, for merges by method ``subspace``.
        python: the Python that does the work.
        tell: called with every line that AutoRound prints.

    Raises:
        PlanError: no quantize step, or one that AutoRound cannot say whole.
        InputError: no auto_round in that Python, too little text, a destination that cannot be used.
        RunError: AutoRound failed, with its last line; nothing is at the destination.
    """
    began = time.monotonic()
    tuning, plan = tuning or Tuning(), plan.checked()
    step, config = quantize_step(plan), _whole_config(plan)
    rows = _rows(tokens, tuning)
    checkpoint = Checkpoint.open(source)
    _require_tokenizer(checkpoint.folder)
    target = check_destination(checkpoint.folder, destination)
    check_space(target, 2 * checkpoint.bytes_on_disk)
    require_auto_round(python)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.autoround-", dir=target.parent))
    try:
        base, notes = _cut(plan, checkpoint, folder, moments)
        job = {
            "source": str(base), "layer_config": config, "rows": rows, "iters": tuning.iters, "batch": tuning.batch,
            "device": tuning.device, "seed": tuning.seed, "look": LOOK, "plan": plan.text(),
            "scheme": {"bits": 4, "group_size": step.group_size or -1, "sym": step.symmetric, "data_type": "int"},
            "root": str(Path(__file__).parents[2]),
        }  # fmt: skip
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        for part in ("quantize", "look"):
            run_job(python, part, folder, tell or (lambda line: None))
        report = _report(folder, config, tuned=tuning.iters > 0)
        receipt = _publish(folder / "result", target, plan, checkpoint, notes, time.monotonic() - began)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return receipt, report


def _whole_config(plan: Plan) -> dict[str, dict[str, Any]]:
    """Every entry for AutoRound.

    Raises:
        PlanError: it would leave something out, or run the family wrongly.
    """
    if plan.source.model_type in WRONG:
        raise PlanError(
            f"{plan.source.model_type} is not for AutoRound: {WRONG[plan.source.model_type]}; use the own backend"
        )
    config, missing = layer_config(plan)
    unsaid = [sentence for sentence in missing if _LEFT_BY_CUTS not in sentence]
    if unsaid:
        more = f", and {len(unsaid) - 1} more" if len(unsaid) > 1 else ""
        raise PlanError(f"AutoRound cannot do all of the plan: {unsaid[0]}{more}; use the own backend")
    return config


def _rows(tokens: Sequence[Sequence[int]], tuning: Tuning) -> list[list[int]]:
    """The text in rows of equal length, documents one behind the other; any ids where none are needed.

    Raises:
        InputError: steps that would do harm, or too little text.
    """
    if tuning.iters and tuning.iters < MIN_ITERS:
        raise InputError(
            f"{tuning.iters} steps make weights worse: give at least {MIN_ITERS}, or 0 to round to nearest"
        )
    stream = [int(token) for document in tokens for token in document]
    if not tuning.iters and not stream:
        stream = list(range(1, LOOK + 1))
    if tuning.iters and len(stream) < tuning.batch * LOOK:
        raise InputError(
            f"tuning needs text, at least {tuning.batch * LOOK} tokens, and got {len(stream)}: give --data PATH, or"
            " round to nearest with --iters 0"
        )
    length = min(tuning.length, max(len(stream) // tuning.batch, LOOK), len(stream))
    count = min(len(stream) // length, tuning.samples)
    return [stream[length * number : length * (number + 1)] for number in range(count)]


def _require_tokenizer(folder: Path) -> None:
    """Refuse a checkpoint that AutoRound would refuse.

    Raises:
        InputError: it has no tokenizer.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise InputError(f"{folder} has no tokenizer, without which AutoRound takes no model: put its files beside it")


def _cut(
    plan: Plan, checkpoint: Checkpoint, folder: Path, moments: Mapping[LayerKey, LayerMoments] | None
) -> tuple[Path, tuple[str, ...]]:
    """The checkpoint that AutoRound gets, and notes of the job that made it."""
    steps = tuple(step for step in plan.steps if not isinstance(step, QuantizeStep))
    if not steps:
        return checkpoint.folder, ()
    before = plan.model_copy(update={"steps": steps})
    place = folder / "cut"
    receipt = cut(before, source=checkpoint.folder, destination=place, moments=moments, dry_run=True)
    if receipt.loads_with != "transformers":
        raise PlanError(
            f"AutoRound reads what transformers loads, and the plan's cuts load with {receipt.loads_with}: use another"
            " form, or the own backend"
        )
    receipt = cut(before, source=checkpoint.folder, destination=place, moments=moments)
    return place, receipt.notes


def _report(folder: Path, config: Mapping[str, Mapping[str, Any]], *, tuned: bool) -> Report:
    """What the other process saw.

    Raises:
        RunError: it wrote nothing that can be read.
    """
    import torch

    try:
        seen = json.loads((folder / "seen.json").read_text(encoding="utf-8"))
        looked = torch.load(folder / "logits.pt", weights_only=True)
        return Report(
            missing=tuple(seen["missing_keys"]),
            mismatched=tuple(seen["mismatched_keys"]),
            errors=seen["errors"],
            widths={name: entry["bits"] for name, entry in config.items() if entry["bits"] < 16},
            ids=looked["ids"],
            logits=looked["logits"],
            tuned=tuned,
        )
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"AutoRound's process left no account of its result: {error}") from error


def _publish(
    result: Path, target: Path, plan: Plan, checkpoint: Checkpoint, notes: tuple[str, ...], seconds: float
) -> Receipt:
    """Put plan, card and companions beside AutoRound's files, and the folder in its place.

    Raises:
        RunError: it cannot be written.
    """
    try:
        written = {path.name: path.read_bytes() for path in result.glob("*.json")}
        carry(checkpoint.folder, result)
        for name, content in written.items():  # AutoRound's own settings win over the source's
            (result / name).write_bytes(content)
        after = Checkpoint.open(result)
        notes = (*notes, "loading it needs auto-round: pip install 'moescope[quantize]'")
        sizes = (checkpoint.bytes_on_disk, after.bytes_on_disk)
        write_durably(result / PLAN, plan.text())
        card = model_card(plan, checkpoint.folder, name=target.name, loads_with=LOADS_WITH, notes=notes, sizes=sizes)
        write_durably(result / CARD, card)
        same = sum(
            name in checkpoint.entries and entry.shape == checkpoint.entries[name].shape
            for name, entry in after.entries.items()
        )
        if target.exists():
            target.rmdir()
        result.rename(target)
    except OSError as error:
        raise RunError(f"{target} cannot be written: {error.strerror or error}") from error
    return Receipt(
        destination=target,
        bytes_before=sizes[0],
        bytes_after=sizes[1],
        tensors_copied=same,
        tensors_edited=len(after.entries) - same,
        tensors_removed=sum(name not in after.entries for name in checkpoint.entries),
        loads_with=LOADS_WITH,
        notes=notes,
        seconds=seconds,
    )
