"""EPLB's own arrays in one ``.npz``, from which maps for other engines can be made.

Arrays are those that deepseek-ai/EPLB returns, with the layers that they are of: ``phy2log`` int32 [layers, slots],
``log2phy`` int32 [layers, experts, most replicas], padded with -1, ``logcnt`` int32 [layers, experts], ``layer_ids``
int32 [layers], and ``meta``, a JSON text.
"""

from __future__ import annotations

import io
import json

import numpy as np

from compressor.exporters.exported import Exported
from compressor.exporters.serving import placement, unsaid_others
from compressor.plan import PlaceStep, Plan


def export(plan: Plan) -> Exported:
    """The plan as arrays; slots of an expert stand in ``log2phy`` in ascending order.

    Raises:
        PlanError: no place step, or layers that differ.
    """
    step, _, known, slots = placement(plan, "EPLB")
    experts = known.num_experts
    forward = np.array(list(slots.values()), dtype=np.int32)  # shape: (layers, slots)
    replicas = np.stack([np.bincount(row, minlength=experts) for row in forward]).astype(np.int32)
    back = np.full((len(forward), experts, int(replicas.max())), -1, dtype=np.int32)
    for layer, row in enumerate(forward):
        for expert in range(experts):
            where = np.flatnonzero(row == expert)
            back[layer, expert, : len(where)] = where
    meta = {
        "format": "moescope eplb 1", "model": plan.source.model, "revision": plan.source.revision,
        "run": plan.provenance.run, "method": step.method, "devices": step.devices, "nodes": step.nodes,
        "slots": step.slots, "experts": experts,
    }  # fmt: skip
    buffer = io.BytesIO()
    np.savez(
        buffer, phy2log=forward, log2phy=back, logcnt=replicas,
        layer_ids=np.array(list(slots), dtype=np.int32), meta=np.array(json.dumps(meta, sort_keys=True)),
    )  # fmt: skip
    notes = ("device d of D has the slots d * P / D to (d + 1) * P / D - 1 of the P columns of phy2log",)
    return Exported("", tuple(unsaid_others(plan, PlaceStep)), notes, binary=buffer.getvalue())
