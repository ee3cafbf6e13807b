"""KTransformers in SGLang (sglang-kt): which experts lie on the GPU, as ``.pt`` for ``--init-expert-location``.

Format: kt_ep_wrapper.py of kvcache-ai/sglang at 04653fa. With ``--kt-expert-placement-strategy frequency`` the tensor
``logical_count`` [buffer, decoder layers, experts] is summed over its first axis, and the int(total * ratio) largest
entries over all layers are on the GPU. Ones for chosen experts and zeros elsewhere say any choice, with the ratio
(N + 1/2) / total, which no rounding takes below N.
"""

from __future__ import annotations

import io

from compressor.exporters.exported import Exported, require_some
from compressor.exporters.residents import residents
from compressor.exporters.serving import cache_step, served, unsaid_cache, unsaid_others
from compressor.plan import CacheStep, Plan
from moescope.errors import InputError

ENGINE = "sglang-kt"


def export(plan: Plan) -> Exported:
    """The plan as a mask over all decoder layers.

    Raises:
        PlanError: no cache step, a checkpoint that the engine could not load, or no expert to name.
        InputError: torch is not installed.
    """
    step, where = cache_step(plan)
    known = served(plan, ENGINE)
    first = residents(plan, step)
    mask = [[0] * known.num_experts for _ in range(known.num_layers)]
    for key, experts in first.items():
        for expert in experts:
            mask[known.layers[key]][known.experts[key][expert]] = 1
    number = sum(map(sum, mask))
    require_some(number, ENGINE, ["it pins no expert and holds no counts of how often they are chosen"])
    notes = (
        "serve with --kt-expert-placement-strategy frequency --init-expert-location FILE --kt-gpu-experts-ratio"
        f" {ratio(number, len(known.layers) * known.num_experts)!r}: {number} experts on the GPU",
        "nothing is loaded while tokens are generated: experts that are not on the GPU run on the CPU",
    )
    left_out = unsaid_others(plan, CacheStep)
    left_out += unsaid_cache(step, where, ENGINE, policies=("static",), misses=("cpu",), scopes=("layer", "shared"))
    if number < step.slots:
        left_out.append(f"{where}: {step.slots - number} slots for whatever is needed; {ENGINE} has those named alone")
    return Exported("", tuple(left_out), notes, binary=_saved(mask))


def ratio(number: int, total: int) -> float:
    """The ratio of which int(total * ratio) is the number, 0..total."""
    return min((number + 0.5) / total, 1.0)


def _saved(mask: list[list[int]]) -> bytes:
    try:
        import torch
    except ImportError as error:
        raise InputError("a .pt file for sglang-kt needs torch: pip install torch") from error
    buffer = io.BytesIO()
    torch.save({"logical_count": torch.tensor([mask], dtype=torch.int32)}, buffer)
    return buffer.getvalue()
