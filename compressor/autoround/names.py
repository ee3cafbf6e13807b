"""The matrices of a loaded model by the names that its experts have when they are modules of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compressor.exporters.exported import units
from compressor.exporters.targets import name_of
from compressor.families.module_names import module_names
from compressor.plan import Plan
from compressor.plan.result import source_after

if TYPE_CHECKING:
    from torch import Tensor, nn


def weights_by_name(model: nn.Module, plan: str) -> dict[str, Tensor]:
    """Module name -> (rows, channels) matrix of every routed expert.

    Args:
        model: the source of a quantization, after the cuts of the plan.
        plan: the whole plan, as text.

    Raises:
        PlanError, ModelError: the plan is for another model.
    """
    from compressor.sites import find_decoder

    read = Plan.parse(plan)
    names, sites = module_names(read.source.model_type), find_decoder(model, source_after(read)).sites
    result = {}
    for unit in units(read):
        if unit.role == "routed":
            weights = sites[unit.layer, unit.source[0][1]].read(unit.expert)
            result[name_of(names, unit)] = getattr(weights, unit.part)
    return result
