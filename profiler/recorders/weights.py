"""Norms of the experts' weights per neuron, and the router's rows: tables ``expert_weight`` and ``router_row``."""

from __future__ import annotations

from typing import Any

import polars as pl
import torch
from torch import Tensor

from profiler.capture.batch import LayerKey
from profiler.capture.discovery import MoELayer
from profiler.recorders.base import float_lists

_SELECTION_BIASES = ("e_score_correction_bias", "expert_bias", "balancing_biases")


class WeightRecorder:
    """Reads each layer's weights once, when its experts first run: then they are where they can be read.

    Attributes:
        wanted: whether to read at all.
    """

    def __init__(self) -> None:
        self.wanted = True
        self._seen: set[LayerKey] = set()
        self._frames: dict[str, list[pl.DataFrame]] = {}

    def update(self, layer: MoELayer) -> None:
        """Read a layer that has not been read yet; weights that are not in memory are left out."""
        if layer.key in self._seen or not self.wanted:
            return
        self._seen.add(layer.key)
        with torch.no_grad():
            found = (
                ("expert_weight", _expert_norms(layer)),
                ("expert_weight", _shared_norms(layer)),
                ("router_row", _router_rows(layer)),
            )
            for table, frame in found:
                if frame is not None:
                    named = frame.with_columns(layer=pl.lit(layer.layer), step=pl.lit(layer.step))
                    self._frames.setdefault(table, []).append(named)

    def drain(self) -> dict[str, pl.DataFrame]:
        """Both tables, for the layers that were read since the last drain."""
        frames, self._frames = self._frames, {}
        return {table: pl.concat(parts, how="diagonal_relaxed") for table, parts in frames.items()}


def _expert_norms(layer: MoELayer) -> pl.DataFrame | None:
    if layer.layout is None or any(tensor.is_meta for tensor in layer.experts.parameters()):
        return None
    norms: dict[str, list[Tensor]] = {"gate_norm": [], "up_norm": [], "down_norm": []}
    for expert in range(layer.layout.num_weighted):
        first = layer.layout.up_weight(layer.experts, expert)
        gate, up = layer.layout.split_gate(first)
        norms["up_norm"].append(torch.linalg.vector_norm(up.float(), dim=1))
        if gate is not None:
            norms["gate_norm"].append(torch.linalg.vector_norm(gate.float(), dim=1))
        down = layer.layout.down_weight(layer.experts, expert)
        norms["down_norm"].append(torch.linalg.vector_norm(down.float(), dim=0))
    columns = {name: float_lists(torch.stack(parts)) for name, parts in norms.items() if parts}
    return pl.DataFrame({"expert": range(layer.layout.num_weighted), **columns}).with_columns(kind=pl.lit("routed"))


def _shared_norms(layer: MoELayer) -> pl.DataFrame | None:
    """The shared experts of a layer, merged in one module as they are, count as its expert 0."""
    if layer.shared is None:
        return None
    weights = {"down_norm": layer.shared.down, **_first_projections(layer.shared.module)}
    columns = {}
    for name, module in weights.items():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 2 and not weight.is_meta:
            norm = torch.linalg.vector_norm(weight.float(), dim=0 if name == "down_norm" else 1)
            columns[name] = float_lists(norm[None])
    return pl.DataFrame({"expert": [0], **columns}).with_columns(kind=pl.lit("shared")) if columns else None


def _first_projections(module: Any) -> dict[str, Any]:
    children = dict(module.named_children())
    return {"gate_norm": children.get("gate_proj"), "up_norm": children.get("up_proj")}


def _router_rows(layer: MoELayer) -> pl.DataFrame | None:
    if layer.router is None:
        return None
    parameters = dict(layer.router.named_parameters())
    wide = [
        name
        for name, tensor in parameters.items()
        if tensor.ndim == 2 and tensor.shape[0] >= layer.num_experts and not tensor.is_meta
    ]
    if not wide:
        return None
    columns: dict[str, Any] = {"weights": float_lists(parameters[wide[-1]][: layer.num_experts])}
    biases = {
        "bias": parameters.get(wide[-1].removesuffix("weight") + "bias"),
        "selection_bias": _selection_bias(layer),
    }
    for name, tensor in biases.items():
        if tensor is not None and tensor.numel() >= layer.num_experts and not tensor.is_meta:
            columns[name] = tensor.detach().reshape(-1)[: layer.num_experts].double().cpu().numpy()
    return pl.DataFrame({"expert": range(layer.num_experts), **columns})


def _selection_bias(layer: MoELayer) -> Tensor | None:
    """The bias that counts for choosing only: a parameter or buffer of the router, the experts or the block."""
    assert layer.router is not None
    around = [*layer.router.named_parameters(), *layer.router.named_buffers()]
    for module in (layer.experts, layer.block):
        if module is not None:
            around += [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return next((tensor for name, tensor in around if name.rpartition(".")[2] in _SELECTION_BIASES), None)
