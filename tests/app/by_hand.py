"""Plans made by hand, without a planner, for a model of two MoE layers with four experts each."""

from __future__ import annotations

from typing import Any

import numpy as np

from compressor.plan import (
    DropLayer,
    DropStep,
    Estimate,
    Evidence,
    GivenUp,
    LayerShape,
    LayerValues,
    MergeGroup,
    MergeLayer,
    MergeStep,
    Plan,
    Protected,
    Provenance,
    SlimExpert,
    SlimLayer,
    SlimStep,
    Source,
    Target,
)

EXPERTS, WIDTH = 4, 8
SCORES = {1: (0.5, 0.1, 9.0, 0.3), 2: (4.0, 3.0, 2.0, 1.0)}


def source(experts: int = EXPERTS, layers: tuple[int, ...] = (1, 2)) -> Source:
    """Decoder layers 0..2, of which these are MoE layers."""
    shapes = tuple(LayerShape(layer=layer, num_experts=experts, top_k=2, width=WIDTH) for layer in layers)
    return Source(model="toy", model_type="toy", hidden_size=4, expert_size=4, num_layers=3, layers=shapes)


def plan(*steps: Any, evidence: tuple[Evidence, ...] = (), **changes: Any) -> Plan:
    """A plan of these steps, with figures that only have to be shown."""
    estimate = Estimate(
        expert_parameters=768, expert_parameters_after=384, active_parameters=384, active_parameters_after=384,
        bytes_saved=1536, kept_mass=0.75, layer_error=0.125,
    )  # fmt: skip
    values: dict[str, Any] = {
        "provenance": Provenance(run="mine", tokens=720, domains=("code",), badge="valid", tool_version="0"),
        "source": source(),
        "target": Target(share=0.25, preset="reap"),
        "estimate": estimate,
        "evidence": evidence,
    }
    return Plan(steps=steps, **(values | changes)).checked()


def scored(*protected: Protected, notes: tuple[str, ...] = ()) -> Evidence:
    """Evidence with :data:`SCORES`."""
    layers = tuple(LayerValues(layer=layer, values=values) for layer, values in SCORES.items())
    return Evidence(score="reap", unit="activation", source="a paper", layers=layers, protected=protected, notes=notes)


def dropping(*, experts: dict[int, tuple[int, ...]] | None = None, **changes: Any) -> Plan:
    """The two lowest of layer 1 go, and by request others of layer 2; expert 2 of layer 1 is protected."""
    gone = experts or {1: (1, 3), 2: (2, 3)}
    step = DropStep(method="reap", layers=tuple(DropLayer(layer=layer, experts=list_) for layer, list_ in gone.items()))
    guard = Protected(layer=1, expert=2, reason="super expert: its outputs reach 820")
    return plan(step, **{"evidence": (scored(guard, notes=("A note.",)),), **changes})


def merging() -> Plan:
    """In both layers 0 takes 1 in, and 2 takes 3."""
    groups = (
        MergeGroup(lead=0, members=(0, 1), weights=(0.75, 0.25)),
        MergeGroup(lead=2, members=(2, 3), weights=(0.5, 0.5)),
    )
    layers = tuple(MergeLayer(layer=layer, groups=groups) for layer in (1, 2))
    return plan(MergeStep(grouping="m_smoe", method="average", layers=layers), evidence=(scored(),))


def giving_up() -> Plan:
    """In both layers experts 1 and 3 are given up to 0 and 2, neuron by neuron."""
    groups = tuple(MergeGroup(lead=lead, members=(lead,), weights=(1.0,)) for lead in (0, 2))
    given = (GivenUp(expert=1, weight=0.1), GivenUp(expert=3, weight=0.3))
    layers = tuple(MergeLayer(layer=layer, groups=groups, given_up=given) for layer in (1, 2))
    return plan(MergeStep(grouping="dern", method="segments", threshold=0.5, layers=layers))


def slimming() -> Plan:
    """Layer 1: expert 0 keeps 2 of 8 neurons, the others 8; layer 2 keeps all."""
    mask = np.array([1, 0, 0, 1, 0, 0, 0, 0], bool)
    layer = SlimLayer(layer=1, experts=(SlimExpert.of(expert=0, mask=mask),))
    return plan(SlimStep(method="camera", form="masked", layers=(layer,)))
