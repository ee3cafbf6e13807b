"""The answer of an inspection, and its text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any


@dataclass(frozen=True)
class LayerInspection:
    """One MoE layer; ``levels`` are those that can be recorded here."""

    layer: int
    step: int
    module: str
    experts_class: str
    router_class: str
    num_experts: int
    top_k: int
    expert_width: int
    num_shared: int
    levels: list[str]


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect_model` found. Sizes are GiB; time, memory and disk are estimates."""

    model: str
    model_class: str
    model_type: str
    num_layers: int  # decoder layers, dense ones included
    hidden_size: int
    moe_layers: list[LayerInspection]
    dense_layers: list[int]
    parameters: int
    active_parameters: int  # used per token: all but the routed experts that are not selected
    expert_parameters: int  # of the routed experts
    dtype: str
    checkpoint_gib: float | None  # weights in the folder; None for a hub id or a folder without weights
    weights_gib: dict[str, float]  # by type of the weights
    expert_weights_gib: dict[str, float]  # of which routed experts
    level: str
    token_budget: int
    sequence_length: int
    batch_size: int
    statistics_gib: dict[str, float]  # by level: memory for the sums, and about their size on disk
    forward_gib: float  # working memory of one batch beside the weights
    recording_gib: float  # peak of what recording takes beside weights and forward: statistics, copies, shards
    memory_gib: float  # weights, one batch, recording
    disk_gib: dict[str, float]  # trace, statistics, text
    flops_per_token: float  # of a forward at this sequence length
    gflops: float  # GFLOP/s of the device
    gflops_measured: bool  # by a matrix product just now; False if it was given
    hours: float
    warnings: list[str]

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return asdict(self)

    def to_text(self) -> str:
        """A summary for a terminal; equal layers share a line."""
        weights = ", ".join(
            f"{_size(size)} as {name} (experts {_size(self.expert_weights_gib[name])})"
            for name, size in self.weights_gib.items()
        )
        statistics = ", ".join(f"{level} {_size(size)}" for level, size in self.statistics_gib.items())
        origin = "a matrix product just now" if self.gflops_measured else "as given"
        lines = [
            f"model       {self.model} ({self.model_class}, {self.num_layers} layers, hidden size {self.hidden_size})",
            *(f"MoE layers  {line}" for line in self._layer_lines()),
            f"dense       {ranges(self.dense_layers) or 'none'}",
            f"parameters  {_billions(self.parameters)}, {_billions(self.active_parameters)} active per token,"
            f" {_billions(self.expert_parameters)} in routed experts",
            f"weights     {weights}",
            f"statistics  {statistics}",
            f"memory      about {_size(self.memory_gib)} as {self.dtype}: weights, {_size(self.forward_gib)} for a"
            f" batch of {self.batch_size} x {self.sequence_length}, at most {_size(self.recording_gib)} for recording",
            f"disk        about {_size(sum(self.disk_gib.values()))} for {self.token_budget:,} tokens"
            f" (trace {_size(self.disk_gib['trace'])}), twice that while the run is finished",
            f"time        about {_duration(self.hours)} (estimate: {self.flops_per_token / 1e9:.3g} GFLOP per token at"
            f" half of {self.gflops:,.0f} GFLOP/s, {origin})",
            *(f"warning     {warning}" for warning in self.warnings),
        ]
        return "\n".join(lines)

    def _layer_lines(self) -> Iterator[str]:
        def kind(layer: LayerInspection) -> dict[str, Any]:
            return {name: value for name, value in asdict(layer).items() if name not in ("layer", "module")}

        for _, group in groupby(self.moe_layers, key=kind):
            same = list(group)
            first = same[0]
            shared = f", {first.num_shared} shared" if first.num_shared else ""
            yield (
                f"{ranges([layer.layer for layer in same])}: {first.experts_class}, {first.num_experts} experts, top"
                f" {first.top_k}, width {first.expert_width}{shared}; {first.router_class or 'no router module'};"
                f" levels {', '.join(first.levels)}"
            )


def ranges(numbers: list[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2, 5``."""
    parts = []
    for _, group in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ", ".join(parts)


def _size(gib: float) -> str:
    if gib < 0.1:
        return f"{gib * 1024:.3g} MiB"
    return f"{gib:,.0f} GiB" if gib >= 100 else f"{gib:.3g} GiB"


def _billions(count: int) -> str:
    return f"{count / 1e9:.3g} billion" if count >= 1e8 else f"{count / 1e6:.3g} million"


def _duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:.1f} hours"
    return f"{hours * 60:.0f} minutes" if hours >= 1 / 30 else f"{hours * 3600:.0f} seconds"
