"""What of a model holds experts and is not watched: refused by name where it matters, else named in the run."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from torch import nn

from compressor.families import Refusal, left_out_reason, refusal_of
from compressor.families.routers import ROUTER_NAMES
from moescope.errors import ModelError
from profiler.capture.stacks import Stack, stack_name


def holds(outer: str, inner: str) -> bool:
    """Whether the module of one path is that of another, or stands in it."""
    return inner == outer or inner.startswith(f"{outer}.")


def find_unwatchable(modules: Mapping[str, nn.Module], adapters: Collection[str]) -> dict[str, Refusal]:
    """What holds experts and cannot be watched, by its path; ``adapters`` are the paths of what can."""
    refused: dict[str, Refusal] = {}
    for name, module in modules.items():
        refusal = refusal_of(module)
        if refusal is None and name not in adapters and _looks_like_experts(name, module, modules):
            refusal = Refusal(
                type(module).__name__,
                "it holds experts, but not as transformers 5 fuses them",
                "write an adapter (docs/adapters.md)",
            )
        if refusal is not None and not any(holds(outer, name) for outer in adapters):
            refused[name] = refusal
    return refused


def refuse(unwatchable: Mapping[str, Refusal], stack: str | None) -> None:
    """Stop at the first module of a stack that cannot be watched; of any stack if None.

    Raises:
        ModelError: there is one; the message says why and what to do.
    """
    for name, refusal in unwatchable.items():
        if stack in (None, stack_name(name)):
            raise ModelError(
                f"{_place(name)} ({refusal.experts_class}) cannot be watched: {refusal.reason}; {refusal.remedy}"
            )


def left_out(
    modules: Mapping[str, nn.Module], stacks: Sequence[Stack], chosen: Stack, unwatchable: Mapping[str, Refusal]
) -> list[str]:
    """What holds experts and is not in this run, each in one sentence."""
    sentences = [
        f"stack {stack.name} ({stack.path}) has experts in {len(stack.experts)} modules: not recorded in this run"
        for stack in stacks
        if stack is not chosen
    ]
    reasons = Counter(reason for module in modules.values() if (reason := left_out_reason(module)))
    sentences += [f"{count} modules hold {reason}: not recorded" for reason, count in reasons.items()]
    return sentences + [f"{name} ({refusal.experts_class}): not recorded" for name, refusal in unwatchable.items()]


def _looks_like_experts(name: str, module: nn.Module, modules: Mapping[str, nn.Module]) -> bool:
    """Several equal feed-forward modules, or stacked 3-D weights, beside something that can choose among them."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        kinds = {type(child) for child in module.children()}
        alike = len(module) > 1 and len(kinds) == 1 and next(iter(kinds)) is not nn.Linear
        return alike and "expert" in name.rpartition(".")[2].lower()
    stacked = [tensor for tensor in module.parameters(recurse=False) if tensor.ndim == 3 and tensor.shape[0] > 1]
    if len(stacked) < 2 or len({tensor.shape[0] for tensor in stacked}) != 1:
        return False
    siblings = modules[name.rpartition(".")[0]].named_children() if name else ()
    return any(child in ROUTER_NAMES for child, _ in siblings)


def _place(name: str) -> str:
    match = re.search(r"\.(\d+)\.", f".{name}.")
    return f"layer {match[1]}, {name}" if match else name or "the model"
