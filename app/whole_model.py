"""What a checkpoint's headers say of its size: the bytes beside the experts, and the type that these are kept in."""

from __future__ import annotations

from collections import Counter

import store
from compressor.checkpoint.files import Checkpoint
from compressor.families.checkpoint import read_name
from compressor.families.config_fields import find_text_config
from moescope.errors import ModelError
from planner.estimate.parameters import expert_parameters, sizes_before
from planner.source import TYPE_BYTES, source_of

_TYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}  # fmt: skip


def whole_model(run: store.Run, model: str) -> tuple[int, str]:
    """(bytes of the weights beside the experts, type of the experts' weights), such as ``(3046912, "bfloat16")``.

    No weight is read. Biases of experts, and scales of those in 8 bits, count as other weights, as they do in plans.

    Args:
        run: says how many weights the experts have.
        model: folder of its checkpoint, or a hub id whose files are in the hub's cache.

    Raises:
        ModelError: there is no checkpoint, its experts are packed already, or it is smaller than the run's experts.
    """
    checkpoint = Checkpoint.open(model)
    family = find_text_config(checkpoint.config).model_type
    types: Counter[str] = Counter()
    for entry in checkpoint.entries.values():
        name = read_name(entry.name, family)
        if name.kind in ("expert", "shared") and name.what != "bias":
            types[entry.dtype] += entry.size
    if not types:
        raise ModelError(f"{checkpoint.folder} has no experts whose names are known: give --other-weights SIZE")
    most = types.most_common(1)[0][0]
    if most not in _TYPES:
        raise ModelError(
            f"{checkpoint.folder} keeps its experts as {most}, packed already: give the checkpoint that it comes from"
        )
    source = source_of(run)
    experts = expert_parameters(source, sizes_before(source)) * TYPE_BYTES[_TYPES[most]]
    whole = sum(entry.size for entry in checkpoint.entries.values())
    if whole < experts:
        raise ModelError(
            f"{checkpoint.folder} holds {whole:,} bytes, and the experts of run {run.name!r} take {experts:,}: is it"
            " the run's model?"
        )
    return whole - experts, _TYPES[most]
