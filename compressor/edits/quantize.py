"""Weights on grids of few values, group by group: what every other backend is held against.

No calibration and no dependency. Scales are rounded to 16 bits before weights are, as they are stored.

Sources: round to nearest and 1 bit as MC-MoE's code (arXiv 2410.06270, ICLR 2025), ternary as MoTE (arXiv 2506.14435),
nested widths as D2MoE (arXiv 2504.15299), with scales that minimise the weights' own error instead of the outputs'.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from compressor.plan import PARTS, Bits, ExpertBits, QuantizeStep
from compressor.weights import ExpertWeights

CLIPS = tuple(1 - 0.05 * count for count in range(10))
"""Parts of the range that are tried where scales are clipped."""

_SMALLEST = 2.0**-24  # what float16 can hold


@dataclass(frozen=True)
class Grid:
    """A matrix (R, C) on a grid; C is cut into G groups.

    Attributes:
        bits: width.
        codes: (R, C) int16; unsigned with zero points, else signed.
        scales: (R, G) float32, each one that 16 bits hold.
        zeros: (R, G) int16 codes that stand for 0; None on symmetric grids.
        residuals: further bits: signs (R, C) int8 and their magnitudes (R, G).
    """

    bits: Bits
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    residuals: tuple[tuple[Tensor, Tensor], ...] = field(default=())

    def values(self) -> Tensor:
        """(R, C) float32."""
        rows, groups = self.scales.shape
        codes = self.codes.reshape(rows, groups, -1).float()
        if self.zeros is not None:
            codes = codes - self.zeros[..., None].float()
        values = codes * self.scales[..., None]
        for signs, scales in self.residuals:
            values = values + signs.reshape(rows, groups, -1).float() * scales[..., None]
        return values.reshape(self.codes.shape)


def to_grid(weight: Tensor, bits: Bits, step: QuantizeStep) -> Grid:
    """A matrix on the grid that a step asks for.

    Args:
        weight: (R, C), rows are outputs.
        bits: width.
        step: group size, symmetry, how scales are found, and the base of nested widths.
    """
    group = step.group_size or weight.shape[1]
    grouped = weight.detach().float().reshape(weight.shape[0], -1, group)
    if bits in (1, "ternary"):
        scales = _stored(grouped.abs().mean(-1))
        codes = grouped.sign() if bits == 1 else (grouped / scales[..., None]).round().clamp(-1, 1)
        if bits == 1:
            codes[codes == 0] = 1
        return Grid(bits, codes.reshape(weight.shape).to(torch.int16), scales)
    width = int(bits)
    if step.nested is None or width <= step.nested:
        return _uniform(grouped, width, step, weight.shape)
    grid = _uniform(grouped, step.nested, step, weight.shape)
    residuals: list[tuple[Tensor, Tensor]] = []
    for _ in range(width - step.nested):
        left = grouped - Grid(bits, grid.codes, grid.scales, grid.zeros, tuple(residuals)).values().reshape_as(grouped)
        signs = torch.where(left < 0, -1, 1).to(torch.int8)
        residuals.append((signs.reshape(weight.shape), _stored(left.abs().mean(-1))))
    return Grid(bits, grid.codes, grid.scales, grid.zeros, tuple(residuals))


def quantized(weights: ExpertWeights, bits: ExpertBits, step: QuantizeStep) -> ExpertWeights:
    """An expert whose projections have the values of their grids, in their own types; biases stay."""
    parts = dict(weights.parts())
    for part in PARTS:
        width = bits.of(part)
        if width is not None and part in parts:
            parts[part] = to_grid(parts[part], width, step).values().to(parts[part].dtype)
    return ExpertWeights(**parts)


def _uniform(grouped: Tensor, bits: int, step: QuantizeStep, shape: torch.Size) -> Grid:
    clips = CLIPS if step.scales == "clipped" else (1.0,)
    best: tuple[Tensor, Tensor, Tensor | None] | None = None
    least: Tensor | None = None
    for clip in clips:
        codes, scales, zeros = _symmetric(grouped, bits, clip) if step.symmetric else _asymmetric(grouped, bits, clip)
        moved = codes if zeros is None else codes - zeros[..., None]
        error = (moved * scales[..., None] - grouped).square_().sum(-1)
        if best is None or least is None:
            best, least = (codes, scales, zeros), error
            continue
        better = error < least
        least = torch.where(better, error, least)
        best = (
            torch.where(better[..., None], codes, best[0]),
            torch.where(better, scales, best[1]),
            None if zeros is None or best[2] is None else torch.where(better, zeros, best[2]),
        )
    assert best is not None
    codes, scales, zeros = best
    return Grid(
        bits,  # type: ignore[arg-type]
        codes.reshape(shape).to(torch.int16),
        scales,
        None if zeros is None else zeros.to(torch.int16),
    )


def _symmetric(grouped: Tensor, bits: int, clip: float) -> tuple[Tensor, Tensor, None]:
    half = 2 ** (bits - 1)
    scales = _stored(grouped.abs().amax(-1) * (clip / (half - 0.5)))
    return (grouped / scales[..., None]).round_().clamp_(-half, half - 1), scales, None


def _asymmetric(grouped: Tensor, bits: int, clip: float) -> tuple[Tensor, Tensor, Tensor]:
    most = 2**bits - 1
    low, high = grouped.amin(-1).clamp_max(0) * clip, grouped.amax(-1).clamp_min(0) * clip
    scales = _stored((high - low) / most)
    zeros = (-low / scales).round_().clamp_(0, most)
    return (grouped / scales[..., None]).round_().add_(zeros[..., None]).clamp_(0, most), scales, zeros


def _stored(scales: Tensor) -> Tensor:
    """The scales as 16 bits hold them."""
    return scales.clamp(_SMALLEST, 65504.0).half().float()
