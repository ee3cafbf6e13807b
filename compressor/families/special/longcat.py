"""LongCat-Flash: the last experts have no weights and give back their input, so that easy tokens cost less."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from compressor.families.layout import ExpertKind, ExpertsLayout, stacked_layout

_read = stacked_layout("gate_up_proj")


def longcat_layout(module: Any) -> ExpertsLayout:
    """The layout of ``LongcatFlashExperts``; ``gate_up_proj`` has rows for the copies too, which nothing uses."""
    layout = _read(module)
    kind: ExpertKind = "copy"
    copies = (kind,) * int(module.zero_expert_num)
    return replace(layout, num_experts=layout.num_experts + len(copies), weightless=copies)
