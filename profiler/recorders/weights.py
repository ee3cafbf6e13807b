"""Norms of the experts' weights per neuron, and the router's rows: tables ``expert_weight`` and ``router_row``."""

from __future__ import annotations

from typing import Any

import polars as pl
import torch
from torch import Tensor

from profiler.capture.batch import LayerKey
from profiler.capture.discovery import MoELayer
from profiler.recorders.base import float_lists

_BIASES = ("e_score_correction_bias", "expert_bias", "balancing_biases")


class WeightRecorder:
    """Reads each layer's weights once, when its experts first run: then they are where they can be read."""

    def __init__(self) -> None:
        self._seen: set[LayerKey] = set()
        self._frames: dict[str, list[pl.DataFrame]] = {}

    def update(self, layer: MoELayer) -> None:
        """Read a layer that has not been read yet; weights that are not in memory are left out."""
        if layer.key in self._seen:
            return
        self._seen.add(layer.key)
        with torch.no_grad():
            for table, frame in (("expert_weight", _expert_norms(layer)), ("router_row", _router_rows(layer))):
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


def _router_rows(layer: MoELayer) -> pl.DataFrame | None:
    if layer.router is None:
        return None
    wide = [
        tensor
        for tensor in layer.router.parameters()
        if tensor.ndim == 2 and tensor.shape[0] >= layer.num_experts and not tensor.is_meta
    ]
    if not wide:
        return None
    columns: dict[str, Any] = {"weights": float_lists(wide[-1][: layer.num_experts])}
    bias = _vector(dict(layer.router.named_parameters()), ("bias",), layer.num_experts)
    around = {**dict(layer.experts.named_buffers(recurse=False)), **dict(layer.router.named_parameters())}
    around |= dict(layer.router.named_buffers())
    chosen_by = _vector(around, _BIASES, layer.num_experts)
    for name, values in (("bias", bias), ("selection_bias", chosen_by)):
        if values is not None:
            columns[name] = values.double().cpu().numpy()
    return pl.DataFrame({"expert": range(layer.num_experts), **columns})


def _vector(tensors: dict[str, Tensor], endings: tuple[str, ...], experts: int) -> Tensor | None:
    """(experts,) the first tensor of that name and length."""
    for name, tensor in tensors.items():
        if name.endswith(endings) and tensor.numel() >= experts and not tensor.is_meta:
            return tensor.detach().reshape(-1)[:experts]
    return None
