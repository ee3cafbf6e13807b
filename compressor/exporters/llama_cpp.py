"""llama.cpp: arguments that say which layers' experts stay in host memory.

llama.cpp keeps one projection of all experts of a layer in one tensor, so whole layers are moved and no single expert.
``-ncmoe N`` keeps the experts of the blocks 0 to N - 1 in host memory, dense blocks counted; any other choice takes
``-ot PATTERN=BUFFER``: rules are split at commas, each at its first ``=``, and the first pattern that is found in a
tensor's name wins (common/arg.cpp, common/common.h, src/llama-model-loader.cpp). The one rule written here names the
layers that stay in host memory, so that it needs no name of a device and holds for any number of them.
"""

from __future__ import annotations

from compressor.exporters.exported import Exported
from compressor.exporters.serving import Served, cache_step, served, unsaid_cache, unsaid_others
from compressor.exporters.whole_layers import whole_layers
from compressor.families.module_names import module_names
from compressor.plan import CacheStep, LayerKey, Plan

ENGINE = "llama.cpp"


def export(plan: Plan) -> Exported:
    """The plan as arguments for ``llama-server`` and ``llama-cli``, on one line.

    Raises:
        PlanError: no cache step, a family whose names are not known, or a checkpoint that cannot be converted.
    """
    step, where = cache_step(plan)
    module_names(plan.source.model_type)  # what llama.cpp converts is named alike; others are refused
    known = served(plan, ENGINE)
    kept, exact = whole_layers(plan, step, known)
    left_out = unsaid_others(plan, CacheStep)
    left_out += unsaid_cache(
        step, where, ENGINE, policies=("static",), misses=("cpu",),
        disk="no expert is given a tier; with mmap on, the system pages what does not fit into memory",
    )  # fmt: skip
    if not exact:
        left_out += _partly(step, where, known, kept)
    arguments = _arguments([known.layers[key] for key in kept], list(known.layers.values()))
    return Exported(f"{arguments}\n", tuple(left_out), _notes(step, arguments, exact))


def _arguments(kept: list[int], layers: list[int]) -> str:
    """For the numbers of the layers whose experts are on the device, among those of all MoE layers."""
    held = [layer for layer in layers if layer not in kept]
    if not held:
        return "-ngl 999"
    if held == layers[: len(held)]:
        return f"-ngl 999 -ncmoe {held[-1] + 1}"
    numbers = "|".join(map(str, held))
    return rf'-ngl 999 -ot "blk\.({numbers})\.ffn_(up|down|gate|gate_up)_(ch|)exps=CPU"'


def _partly(step: CacheStep, where: str, known: Served, kept: list[LayerKey]) -> list[str]:
    many = f"{len(kept)} layer{'' if len(kept) == 1 else 's'}"
    result = [
        f"{where}: slots for {step.slots} experts; llama.cpp moves whole layers: all {known.num_experts} experts of"
        f" {many} are on the device"
    ]
    for layer in step.layers:
        key = (layer.layer, layer.step)
        if key in known.layers and layer.slots != (len(known.experts[key]) if key in kept else 0):
            lies = "on the device" if key in kept else "in host memory"
            result.append(f"layer {layer.layer} (slots for {layer.slots} experts): all of them lie {lies}")
    return result


def _notes(step: CacheStep, arguments: str, exact: bool) -> tuple[str, ...]:
    result = []
    if not exact:
        result.append(
            "a token reads its experts in every layer, so no trace picks layers: the plan's bytes say how many,"
            " and the last ones are taken"
        )
    if arguments != "-ngl 999":
        result.append("tensor overrides, which -ncmoe and -ot both are, turn pipeline parallelism of several GPUs off")
        if not any(layer.disk for layer in step.layers):
            result.append("--no-mmap (in newer versions --load-mode none) reads experts in host memory faster")
    return tuple(result)
