"""Experts fine-tuned for several tasks on one base: the memory that serving them together takes, printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.commands.place_choices import read

if TYPE_CHECKING:
    import store
    from planner.place.adapters import AdapterMaps


def print_memory(run: store.Run, path: Path, *, as_json: bool) -> int:
    """Read adapters for a run's model and print what they take.

    Raises:
        InputError: the file cannot be read.
        PlanError: it is no such file, or does not fit the model.
    """
    import polars as pl

    from app.text import size, table
    from planner.placing import expert_bytes, placeable

    source = placeable(run, allow_invalid=True)
    labels = [str(one.layer) if one.step == 0 else f"{one.layer}.{one.step}" for one in source.layers]
    names, maps = adapters_of(read(path), labels=labels, num_experts=source.layers[0].num_experts)
    each = expert_bytes(run, source)
    used = len(labels) * maps.num_experts + int(maps.tuned.sum())
    padded = len(labels) * maps.num_slots
    rows = [
        {"adapter": name, "experts": int(maps.tuned[:, place].sum()),
         "most in a layer": int(maps.tuned[:, place].max()), "empty slots": float(share)}
        for place, (name, share) in enumerate(zip(names, maps.sparsity(), strict=True))
    ]  # fmt: skip
    if as_json:
        content: dict[str, Any] = {
            "memory_factor": maps.memory_factor, "most": maps.most, "slots": padded, "used": used,
            "expert_bytes": each or None, "adapters": rows,
        }  # fmt: skip
        print(json.dumps(content))
        return 0
    of = f" ({size(padded * each)} against {size(used * each)})" if each else ""
    print(
        f"memory factor {maps.memory_factor:.3f}: {padded:,} slots with an address for {used:,} experts{of}; what is"
        " padded takes memory unless only pages that hold an expert are mapped\n"
    )
    print(table(pl.DataFrame(rows)))
    return 0


def adapters_of(text: str, *, labels: list[str], num_experts: int) -> tuple[list[str], AdapterMaps]:
    """Names and maps from {adapter: {layer: [experts]}}; an ESFT configuration stands for its experts, and layers that
    an adapter does not name stay as they are.

    Raises:
        PlanError: no such object, a layer that the model has not, or experts out of range or named twice.
    """
    from moescope.errors import PlanError
    from planner.place.adapters import adapter_maps

    try:
        content = json.loads(text)
    except ValueError as error:
        raise PlanError(f"adapters are no JSON: {error}") from None
    if not isinstance(content, dict) or not content:
        raise PlanError("adapters are no object: give {adapter: {layer: [experts]}}")
    tuned = []
    for name, layers in content.items():
        layers = layers.get("experts", layers) if isinstance(layers, dict) else layers
        if not isinstance(layers, dict):
            raise PlanError(f"adapter {name!r} is no object: give {{layer: [experts]}}")
        unknown = [layer for layer in layers if layer not in labels]
        if unknown:
            raise PlanError(f"adapter {name!r} names layer {unknown[0]!r}; the MoE layers are {', '.join(labels)}")
        for layer, experts in layers.items():
            if not isinstance(experts, list) or not all(type(one) is int for one in experts):
                raise PlanError(f"adapter {name!r} gives layer {layer} {json.dumps(experts)[:60]}: give a list of ids")
        tuned.append([layers.get(label, []) for label in labels])
    return list(content), adapter_maps(tuned=tuned, num_experts=num_experts)
