"""Whether every quantized matrix of a result has the error that its width makes: read, compared, one expert at a time.

A wrong decode, a matrix that was left out and one that is random all load without a word. Their errors tell: a width
moves a matrix by a share of its norm that hardly depends on the model, random weights by more than all of it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compressor.checkpoint.files import Checkpoint, Reader, reading
from compressor.checkpoint.layers import ExpertReader, read_decoder, read_shared
from compressor.families.config_fields import find_text_config
from compressor.packed.view import dense_view
from compressor.plan import PARTS, Bits, ExpertBits, LayerKey, Plan, QuantizeStep, Role, kept_layers
from moescope.errors import ModelError, PlanError

if TYPE_CHECKING:
    from torch import Tensor

    from compressor.edits.moments import LayerMoments
    from compressor.weights import ExpertWeights

Verdict = Literal["ok", "skipped", "wrong decode", "outside band"]
Read = Callable[[int, int], "ExpertWeights"]
"""(layer, expert) -> its weights."""

ReadShared = Callable[[int], "ExpertWeights"]
"""Layer -> its shared experts, merged in one."""

BAND = (0.5, 1.5)
"""Least and largest error, in multiples of the error that our own grid of that width makes on the same matrix."""

PUBLISHED: dict[Bits, tuple[float, float]] = {8: (1e-4, 0.02), 4: (0.06, 0.2), 3: (0.13, 0.3), 2: (0.28, 0.7)}
"""Bands of other backends, which choose their grids by what comes out: measured on round to nearest, AutoRound and
GPTQ on Gaussian weights. Widths that are not in it are held to our own."""

_NOTHING = 1e-4
"""A relative error below which a matrix is as it was."""


@dataclass(frozen=True)
class WidthRow:
    """One matrix.

    Attributes:
        layer: number of the layer in the source.
        expert: of the source.
        role: routed or shared.
        part: gate, up or down.
        bits: width that was planned.
        expected: ||Q(W) - W|| / ||W|| of our own grid, W as the plan's other steps leave it.
        low: least error that passes.
        high: largest.
        found: the error of what the result holds.
        verdict: ``skipped`` = the matrix is as it was; ``wrong decode`` = it has nothing to do with what it was.
    """

    layer: int
    expert: int
    role: Role
    part: str
    bits: Bits
    expected: float
    low: float
    high: float
    found: float
    verdict: Verdict


@dataclass(frozen=True)
class WidthReport:
    """What was found of all matrices that a plan quantizes.

    Attributes:
        rows: one per matrix, in the order of layers and experts.
        missing: matrices that could not be compared, and why.
        passed: all of them were compared and have the errors that their widths make.
    """

    rows: tuple[WidthRow, ...]
    missing: tuple[str, ...]
    passed: bool

    @staticmethod
    def of(rows: tuple[WidthRow, ...], missing: tuple[str, ...] = ()) -> WidthReport:
        """A report of these rows."""
        return WidthReport(rows, missing, not missing and all(row.verdict == "ok" for row in rows))

    def content(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self)

    @property
    def summary(self) -> str:
        """One sentence."""
        if self.passed:
            return f"{len(self.rows):,} quantized matrices have the errors that their widths make"
        found = Counter(row.verdict for row in self.rows if row.verdict != "ok")
        parts = [f"{count:,} {verdict}" for verdict, count in sorted(found.items())]
        parts += [f"{len(self.missing):,} missing"] if self.missing else []
        return f"of {len(self.rows) + len(self.missing):,} quantized matrices: {', '.join(parts)}; {self._first()}"

    def _first(self) -> str:
        wrong = next((row for row in self.rows if row.verdict != "ok"), None)
        if wrong is None:
            return f"first {self.missing[0]}"
        return (
            f"first the {wrong.part} projection of {wrong.role} expert {wrong.expert} of layer {wrong.layer}, whose"
            f" {wrong.bits} bits would be an error of {wrong.low:.2g} to {wrong.high:.2g}, with {wrong.found:.2g}"
        )


def check_weights(
    plan: Plan,
    source: Read,
    result: Read,
    *,
    source_shared: ReadShared | None = None,
    result_shared: ReadShared | None = None,
    published: bool = False,
    moments: Mapping[LayerKey, LayerMoments] | None = None,
) -> WidthReport:
    """Hold the matrices of a result against those of the source, wherever they are read from.

    Args:
        plan: what was done.
        source: weights of an expert, by its numbers in the source.
        result: weights of an expert, by the number of its layer and its place in the result, given their values.
        source_shared: shared experts of a layer of the source; without, those of the plan are missing.
        result_shared: of the result.
        published: hold them to the bands of other backends instead of multiples of our own error.
        moments: second moments per layer, for merges by method ``subspace``.

    Returns:
        One row per matrix that has a width. Matrices that the plan merges, slims or factors as well are held against
        what those steps make of them.
    """
    from compressor.edits.layer import layer_edits

    rows: list[WidthRow] = []
    missing: list[str] = []
    places = {old: new for new, old in enumerate(kept_layers(plan))}
    for (layer, _), edit in sorted(layer_edits(plan, moments or {}).items()):
        for index, slot in enumerate(edit.slots):
            bits = None if slot is None else edit.bits.get((slot.lead, "routed"))
            if slot is not None and bits is not None and edit.grids is not None:
                wanted = edit.cut(index, lambda number, layer=layer: source(layer, number))  # type: ignore[misc]
                found = result(places[layer], index)
                _compare((layer, slot.lead, "routed"), bits, edit.grids, wanted, found, published, rows, missing)
        bits = edit.bits.get((0, "shared"))
        if bits is None or edit.grids is None:
            continue
        if source_shared is None or result_shared is None:
            missing.append(f"shared experts of layer {layer}: nobody reads them")
            continue
        wanted, found = edit.cut_shared(source_shared(layer)), result_shared(places[layer])
        _compare((layer, 0, "shared"), bits, edit.grids, wanted, found, published, rows, missing)
    return WidthReport.of(tuple(rows), tuple(missing))


def _compare(
    unit: tuple[int, int, Role],
    bits: ExpertBits,
    step: QuantizeStep,
    wanted: ExpertWeights,
    found: ExpertWeights,
    published: bool,
    rows: list[WidthRow],
    missing: list[str],
) -> None:
    """One expert: a row per matrix that has a width."""
    from compressor.edits.quantize import quantized
    from compressor.edits.slim import widen

    if found.width > wanted.width:  # shared experts are filled up where a configuration ties their width
        wanted = widen(wanted, found.width)
    ours, theirs, was = (dict(one.parts()) for one in (quantized(wanted, bits, step), found, wanted))
    for part in PARTS:
        width = bits.of(part)
        if width is None or part not in was:
            continue
        layer, expert, role = unit
        if part not in theirs or theirs[part].shape != was[part].shape:
            shape = list(theirs[part].shape) if part in theirs else "not there"
            missing.append(
                f"{part} projection of {role} expert {expert} of layer {layer}: {shape} instead of"
                f" {list(was[part].shape)}"
            )
            continue
        expected, error = _error(ours[part], was[part]), _error(theirs[part], was[part])
        low, high = _band(width, expected, published)
        verdict: Verdict = "ok"
        if not error <= 1:  # also where it is no number
            verdict = "wrong decode"
        elif error < _NOTHING < low:
            verdict = "skipped"
        elif not low <= error <= high:
            verdict = "outside band"
        rows.append(WidthRow(layer, expert, role, part, width, expected, low, high, error, verdict))


def _band(bits: Bits, expected: float, published: bool) -> tuple[float, float]:
    if expected < _NOTHING:  # the matrix was on such a grid before
        return 0.0, 10 * _NOTHING
    if published and bits in PUBLISHED:
        return PUBLISHED[bits]
    return BAND[0] * expected, BAND[1] * expected


def _error(found: Tensor, wanted: Tensor) -> float:
    """||found - wanted|| / ||wanted||."""
    exact = wanted.double()
    return float((found.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def check_widths(
    folder: str | Path,
    source: str | Path,
    plan: Plan,
    *,
    published: bool = False,
    moments: Mapping[LayerKey, LayerMoments] | None = None,
) -> WidthReport:
    """Hold the files of a result against those of its source: packed by compressed-tensors, or dense.

    Args:
        folder: the result.
        source: what the plan was applied to.
        plan: the plan.
        published: the result is of another backend, see :func:`check_weights`.
        moments: second moments per layer, for merges by method ``subspace``.

    Raises:
        ModelError: one of them is damaged, or packed in another way.
        PlanError: the plan has no widths.
    """
    from compressor.edits.layer import layer_edits

    if not any(isinstance(step, QuantizeStep) for step in plan.steps):
        raise PlanError("the plan has no quantize step, so there are no widths to look at")
    edits = {layer: edit for (layer, _), edit in layer_edits(plan, moments or {}).items()}
    places = {old: new for new, old in enumerate(kept_layers(plan))}
    before, after, hidden = _Files(source), _Files(folder), plan.source.hidden_size
    old = {
        layer: before.experts(layer, edit.shape.num_experts, edit.shape.width, plan) for layer, edit in edits.items()
    }
    new = {places[layer]: after.experts(places[layer], edit.count, edit.width, plan) for layer, edit in edits.items()}
    with reading() as reader:
        return check_weights(
            plan,
            lambda layer, expert: old[layer].read(reader, expert),
            lambda layer, expert: new[layer].read(reader, expert),
            source_shared=lambda layer: before.shared(layer, hidden, reader),
            result_shared=lambda layer: after.shared(layer, hidden, reader),
            published=published,
            moments=moments,
        )


class _Files:
    """The experts that a folder's files hold, with the values of packed ones."""

    def __init__(self, folder: str | Path) -> None:
        checkpoint = dense_view(Checkpoint.open(folder))
        text = find_text_config(checkpoint.config)
        self.folder, self.model_type = checkpoint.folder, text.model_type
        self.layers = read_decoder(checkpoint, model_type=text.model_type, num_layers=text.layers).layers

    def experts(self, layer: int, count: int, width: int, plan: Plan) -> ExpertReader:
        """Reads the experts of a layer."""
        stored = self.layers.get(layer)
        if stored is None:
            raise ModelError(f"{self.folder} has no experts in layer {layer}")
        if stored.quantized:
            raise ModelError(f"{self.folder} keeps experts in a form that is not read: {stored.quantized}")
        return ExpertReader(stored, count, width, plan.source.expert_size, self.model_type)

    def shared(self, layer: int, hidden: int, reader: Reader) -> ExpertWeights:
        """The shared experts of a layer."""
        stored = self.layers[layer]
        for name, entry in stored.shared:
            if name.what == "weight" and name.part == "down":
                return read_shared(stored, math.prod(entry.shape) // hidden, hidden, reader)
        raise ModelError(f"{self.folder} has no shared experts in layer {layer} that are stored as others are")
