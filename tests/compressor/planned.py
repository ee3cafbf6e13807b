"""Small plans by hand, for tests of the contract."""

from __future__ import annotations

from typing import Any

from compressor.plan import Estimate, Evidence, LayerShape, Plan, Protected, Provenance, Source, Step, Target

EXPERTS, TOP_K, WIDTH = 8, 2, 12


def source(**changes: Any) -> Source:
    """Four decoder layers, the first dense; eight experts of twelve neurons each."""
    shape = {"num_experts": EXPERTS, "top_k": TOP_K, "width": WIDTH, "shared_width": 6}
    shape |= {name: changes.pop(name) for name in ("groups", "chosen_groups", "top_k") if name in changes}
    known: dict[str, Any] = {
        "model": "toy", "model_type": "toy_moe", "hidden_size": 16, "expert_size": 16, "num_layers": 4,
        "layers": tuple(LayerShape(layer=layer, **shape) for layer in (1, 2, 3)),
    }  # fmt: skip
    return Source(**{**known, **changes})


def plan(*steps: Step, protected: tuple[Protected, ...] = (), **changes: Any) -> Plan:
    """An unchecked plan of some steps."""
    return Plan(
        provenance=Provenance(run="run", tokens=100, domains=("code", "日本語"), badge="valid", tool_version="0"),
        source=source(**changes),
        target=Target(share=0.25, preset="reap"),
        steps=steps,
        estimate=Estimate(
            expert_parameters=100, expert_parameters_after=75, active_parameters=20, active_parameters_after=20,
            bytes_saved=50, kept_mass=0.9,
        ),
        evidence=(Evidence(score="reap", protected=protected, notes=("Ü",)),),
    )  # fmt: skip
