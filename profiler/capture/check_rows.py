"""Rows of table ``check``: name, layer, status, what was measured, what was allowed, and one sentence."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import polars as pl

from profiler.capture.discovery import MoELayer

Status = Literal["pass", "warning", "fail", "skipped"]

SCHEMA: dict[str, type[pl.DataType]] = {
    "name": pl.String,
    "layer": pl.Int32,
    "step": pl.Int32,
    "status": pl.String,
    "value": pl.Float64,
    "tolerance": pl.Float64,
    "detail": pl.String,
}


@dataclass(frozen=True)
class CheckRow:
    """One row: ``value`` is what was measured, ``tolerance`` the largest value that is sound."""

    name: str
    status: Status
    value: float | None
    tolerance: float | None
    detail: str
    layer: MoELayer | None = None

    def as_dict(self) -> dict[str, object]:
        """The row by columns of table ``check``."""
        layer = self.layer
        return {
            "name": self.name,
            "layer": layer.layer if layer else None,
            "step": layer.step if layer else None,
            "status": self.status,
            "value": None if self.value is None else float(self.value),
            "tolerance": None if self.tolerance is None else float(self.tolerance),
            "detail": f"{_place(layer)}: {self.detail}" if layer else self.detail,
        }


def _place(layer: MoELayer) -> str:
    return f"layer {layer.layer}, step {layer.step}" if layer.step else f"layer {layer.layer}"


def measured(
    name: str,
    value: float | None,
    tolerance: float,
    detail: str,
    *,
    layer: MoELayer | None = None,
    otherwise: Status = "fail",
) -> CheckRow:
    """A row that passes if the value is within the tolerance, and is skipped if nothing was measured."""
    status: Status = "skipped"
    if value is not None:
        status = "pass" if value <= tolerance else otherwise  # NaN is within no tolerance
    return CheckRow(name, status, value, tolerance, detail, layer)


FINDINGS: dict[str, tuple[str, Status, str]] = {
    "mask unknown": (
        "mask known",
        "warning",
        "forwards had an attention mask that is not 2-D: padding could not be told from text and was counted; pass a"
        " 2-D mask, or session.label(mask=...)",
    ),
    "cached prefix": (
        "whole sequences",
        "warning",
        "sequences began with a cache that was filled before: their prefix was not seen",
    ),
    "rows changed": (
        "whole sequences",
        "warning",
        "batches changed their number of rows under one cache (beam search?): they were taken for new sequences",
    ),
    "rejected": (
        "tokens kept",
        "warning",
        "tokens were recorded and then taken back from the cache (speculative decoding): they are counted",
    ),
    "fed again": (
        "text fed once",
        "warning",
        "forwards fed the text of the one before again with one token more (generation without a cache?): what they"
        " repeat is counted each time",
    ),
    "went on after the end": (
        "end of sequence",
        "warning",
        "rows went on after their end token: the step of the end token itself is not counted",
    ),
    "failed forward": ("forwards completed", "pass", "forwards ended with an exception and are not counted"),
    "outside a forward": (
        "calls inside a forward",
        "pass",
        "calls of experts outside a forward of the watched model (gradient checkpointing?) are not counted",
    ),
    "rows unlike tokens": (
        "rows match tokens",
        "fail",
        "calls of experts had another number of rows than the forward has tokens: they could not be attributed and are"
        " not counted",
    ),
    "graph capture": (
        "forwards run by Python",
        "fail",
        "forwards were captured into a CUDA graph: its replays run no hook, so that nothing of them is recorded; run"
        " without CUDA graphs (vLLM: enforce_eager; torch.compile: another mode than reduce-overhead)",
    ),
}
"""What may happen while watching: the check that it turns, how badly, and what it means."""


def finding_rows(findings: Counter[str]) -> list[CheckRow]:
    """The rows of what happened, and one that says that all masks could be read."""
    rows = []
    for finding, (name, status, detail) in FINDINGS.items():
        count = findings[finding]
        if count:
            rows.append(CheckRow(name, status, count, 0, f"{count} {detail}"))
        elif finding == "mask unknown":
            rows.append(CheckRow(name, "pass", 0, 0, "every forward said which tokens are padding, or had none"))
    return rows
