"""The matrices of a loaded model by the names that its experts have when they are modules of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compressor.exporters.exported import units
from compressor.exporters.targets import name_of
from compressor.families.module_names import module_names
from compressor.plan import Plan, Source, kept_layers

if TYPE_CHECKING:
    from torch import Tensor, nn


def source_after(plan: Plan) -> Source:
    """What a plan leaves of its source when all cuts are made, as far as finding its experts goes."""
    kept = kept_layers(plan)
    numbers = {layer: number for number, layer in enumerate(kept)}
    layers = tuple(
        shape.model_copy(update={"layer": numbers[shape.layer]})
        for shape in plan.source.layers
        if shape.layer in numbers
    )
    return plan.source.model_copy(update={"num_layers": len(kept), "layers": layers})


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
