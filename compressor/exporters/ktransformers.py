"""KTransformers before it became a part of SGLang: rules of an optimization file, which move whole layers.

Format: the ``optimize_rules`` of kvcache-ai/ktransformers, archived: a list of ``match`` and ``replace``, of which the
first that matches a module's name counts. Written from its documentation, not verified.
"""

from __future__ import annotations

import json
from typing import Any

from compressor.exporters.exported import Exported, require_some
from compressor.exporters.serving import cache_step, served, unsaid_cache, unsaid_others, unsaid_slots
from compressor.exporters.whole_layers import whole_layers
from compressor.plan import CacheStep, Plan
from moescope.errors import PlanError

ENGINE = "KTransformers"
FAMILIES = ("deepseek_v2", "deepseek_v3", "qwen2_moe", "qwen3_moe")
"""Whose experts are called ``model.layers.N.mlp.experts`` in the models that it knows."""

_ON_GPU = {"generate_device": "cuda:0", "generate_op": "KExpertsMarlin"}
_ON_CPU = {"generate_device": "cpu", "generate_op": "KExpertsCPU", "out_device": "cuda:0"}


def export(plan: Plan) -> Exported:
    """The plan as two rules: layers whose experts are on the GPU, and all others.

    Raises:
        PlanError: no cache step, a family of other names, or no layer that fits as a whole.
    """
    step, where = cache_step(plan)
    family = plan.source.model_type
    if family not in FAMILIES:
        raise PlanError(f"rules for {ENGINE} are for {', '.join(FAMILIES)}; {family} may have other names there")
    known = served(plan, ENGINE)
    kept, exact = whole_layers(plan, step, known)
    require_some(kept, ENGINE, ["it moves whole layers, and the plan's slots hold the experts of none"])
    numbers = "|".join(str(known.layers[key]) for key in kept)
    text = _rule(rf"^model\.layers\.({numbers})\.mlp\.experts$", _ON_GPU)
    text += _rule(r"^model\.layers\..*\.mlp\.experts$", _ON_CPU)
    left_out = unsaid_others(plan, CacheStep)
    left_out += unsaid_cache(step, where, ENGINE, policies=("static",), misses=("cpu",))
    if not exact:
        left_out += unsaid_slots(
            step, where, f"it moves whole layers; layers {numbers.replace('|', ', ')} are on the GPU"
        )
    notes = (
        "put these rules in front of those for experts in the model's optimization file; experts on the GPU exclude"
        " CUDA graphs",
        "for KTransformers as it was, whose YAML is archived: newer versions take --to sglang-kt",
    )
    return Exported(text, tuple(left_out), notes)


def _rule(name: str, arguments: dict[str, Any]) -> str:
    lines = [
        "- match:", f"    name: {json.dumps(name)}", "  replace:",
        "    class: ktransformers.operators.experts.KTransformersExperts", "    kwargs:",
        *(f"      {key}: {json.dumps(value)}" for key, value in arguments.items()), "  recursive: False",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"
