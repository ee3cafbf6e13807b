"""Shared experts: the feed-forward modules that every token passes beside the routed experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MODULE_NAMES = ("shared_expert", "shared_experts", "shared_mlp")
"""Names of the module, in the MoE block or (GraniteMoE) in the decoder layer around it."""

_DOWN_NAMES = ("down_proj", "output_linear", "w2", "linear_fc2")
_COUNT_FIELDS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert")


@dataclass(frozen=True)
class SharedExperts:
    """The shared experts of one MoE layer; families keep them merged in one module, which counts as one expert.

    Attributes:
        name: path below the module they were found in.
        module: the merged module.
        down: its last projection, None where it has no separate one.
        gate: the one-row projection whose sigmoid scales the output (Qwen), None where the output is added as it is.
        count: how many experts the configuration says are merged.
    """

    name: str
    module: Any
    down: Any
    gate: Any
    count: int


def find_shared_experts(block: Any, config: Any = None) -> SharedExperts | None:
    """The shared experts that stand directly in ``block`` (an MoE block or a decoder layer); None where it has none."""
    children = dict(block.named_children())
    for name in MODULE_NAMES:
        module = children.get(name)
        if module is None:
            continue
        inner = dict(module.named_children())
        down = next((inner[candidate] for candidate in _DOWN_NAMES if candidate in inner), None)
        return SharedExperts(name, module, down, children.get("shared_expert_gate"), _count(config))
    return None


def _count(config: Any) -> int:
    for name in _COUNT_FIELDS:
        value = getattr(config, name, None)
        if isinstance(value, (list, tuple)):
            value = max((entry for entry in value if isinstance(entry, int)), default=0)
        if isinstance(value, int) and value > 0:
            return value
    return 1
