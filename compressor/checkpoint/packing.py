"""Experts whose matrices are stored packed: what is computed of one, and the tensors that it becomes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from compressor.checkpoint.files import Checkpoint, Reader
from compressor.checkpoint.headers import FLOATS, size_of
from compressor.checkpoint.layers import Decoder, Tensor
from compressor.checkpoint.outputs import Made, Output
from compressor.families.checkpoint import TensorName
from compressor.packed.parts import part_shapes, parts_of
from compressor.packed.settings import write_settings
from compressor.plan import PARTS, ExpertBits, Plan, QuantizeStep, Role
from moescope.errors import PlanError

if TYPE_CHECKING:
    import torch

    from compressor.edits.layer import LayerEdit
    from compressor.weights import ExpertWeights

_ADVICE = "use form dense"


@dataclass(frozen=True)
class StoredExpert:
    """An expert as it is written.

    Attributes:
        weights: what is stored as it is, biases included.
        packed: projection -> suffix -> tensor, of those that are packed.
    """

    weights: ExpertWeights
    packed: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)

    def part(self, part: str, suffix: str) -> torch.Tensor:
        """One tensor of a packed projection."""
        return self.packed[part][suffix]


def packed_widths(edit: LayerEdit, expert: int, role: Role) -> ExpertBits | None:
    """The widths of an expert of the source whose matrices are stored packed; None of all others."""
    return edit.bits.get((expert, role)) if edit.grids is not None and edit.grids.form == "packed" else None


def is_packed(name: TensorName, bits: ExpertBits | None) -> bool:
    """Whether the matrix of this name becomes packed tensors."""
    return bits is not None and name.what == "weight" and name.part in PARTS and bits.of(name.part) is not None


def pack_expert(weights: ExpertWeights, bits: ExpertBits, step: QuantizeStep) -> StoredExpert:
    """An expert with the matrices that have a width packed."""
    from compressor.edits.quantize import to_grid

    packed = {}
    for part, weight in weights.parts():
        width = bits.of(part) if part in PARTS else None
        if width is not None:
            packed[part] = parts_of(to_grid(weight, width, step))
    return StoredExpert(weights, packed)


def packed_outputs(
    name: str,
    part: str,
    shape: tuple[int, ...],
    bits: ExpertBits,
    step: QuantizeStep,
    unit: Hashable,
    make: Callable[[Reader], StoredExpert],
) -> Iterator[Output]:
    """The tensors that one matrix becomes.

    Args:
        name: of the matrix in the result.
        part: which projection it is.
        shape: (rows, columns).
        bits: widths of its expert.
        step: the step that quantizes.
        unit: what is computed together.
        make: computes the expert.
    """
    rows, columns = shape
    width, module = int(bits.of(part) or 0), name.removesuffix(".weight")
    for suffix, (dtype, own) in part_shapes(rows, columns, width, step).items():
        made = Made(unit, make, partial(StoredExpert.part, part=part, suffix=suffix), size_of(dtype, own))
        packs = width if suffix == "weight_packed" else None
        yield Output(f"{module}.{suffix}", dtype, own, (made,), edited=True, bits=packs)


def check_packable(plan: Plan, checkpoint: Checkpoint, decoder: Decoder) -> QuantizeStep | None:
    """The step whose weights are stored packed; None where there is none.

    Raises:
        PlanError: this checkpoint stores its experts in a way that packed matrices do not fit into.
    """
    step = next((step for step in plan.steps if isinstance(step, QuantizeStep) and step.form == "packed"), None)
    if step is None:
        return None
    if checkpoint.config.get("quantization_config"):
        raise PlanError("the checkpoint is quantized already (quantization_config): dequantize it first")
    for layer in step.layers:
        stored = decoder.layers.get(layer.layer)
        roles = {expert.role for expert in layer.experts}
        for role, tensors in (("routed", stored.experts), ("shared", stored.shared)) if stored else ():
            if role in roles and (wrong := next(filter(_in_one, tensors), None)):
                raise PlanError(
                    f"the checkpoint stores several matrices in one ({wrong[0].name} {list(wrong[1].shape)}), and form"
                    f" packed stores them one by one: {_ADVICE}"
                )
    return step


def _in_one(tensor: Tensor) -> bool:
    """Experts in one tensor, gate and up in one, or shared experts kept apart."""
    name, entry = tensor
    if name.what not in ("weight", "bias") or entry.dtype not in FLOATS:
        return True
    return name.part == "gate_up" or (name.kind == "expert" and name.expert is None) or len(entry.shape) > 2


def result_settings(step: QuantizeStep, outputs: list[Output]) -> dict[str, object]:
    """``quantization_config`` of a result that holds these tensors."""
    packed = {output.name.removesuffix(".weight_packed"): output.bits for output in outputs if output.bits}
    plain = [
        output.name.removesuffix(".weight")
        for output in outputs
        if output.name.endswith(".weight") and len(output.shape) == 2 and output.dtype in FLOATS
    ]
    return write_settings(step, packed, plain)
