"""Find the MoE layers of a model: by the library's fused-experts contract and by the recorders which models declare."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from compressor.families import (
    ExpertsLayout,
    Refusal,
    RouterTraits,
    SharedExperts,
    adapter_of,
    describe_experts,
    find_shared_experts,
    is_fused_experts,
    refusal_of,
    router_traits,
)
from compressor.families.routers import ROUTER_NAMES
from moescope.errors import ModelError

_COUNT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOP_K_FIELDS = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")
_OTHER_STACKS = ("vision", "visual", "audio", "talker", "code2wav", "mtp")


@dataclass(frozen=True, eq=False)
class MoELayer:
    """One experts module of a model and what stands around it.

    Attributes:
        layer: index of its decoder layer, dense layers counted.
        step: 0, or 1, 2, ... for further experts modules in the same decoder layer.
        name: path of the experts module in the model.
        experts: the experts module itself.
        layout: how its weights are kept; None where they are packed (level routing only).
        router: the module that chooses, None where the block does it itself.
        router_name: its path, empty without router.
        logits_index: place of the logits in what the router returns.
        traits: what the router's output means.
        num_experts: E, routed experts.
        top_k: k as configured; a call may show another.
        expert_width: neurons per routed expert, 0 where unknown.
        shared: the shared experts beside them, None where there are none.
    """

    layer: int
    step: int
    name: str
    experts: nn.Module = field(repr=False)
    layout: ExpertsLayout | None = field(repr=False)
    router: nn.Module | None = field(repr=False)
    router_name: str
    logits_index: int
    traits: RouterTraits
    num_experts: int
    top_k: int
    expert_width: int
    shared: SharedExperts | None = field(repr=False)

    @property
    def num_shared(self) -> int:
        """Shared experts beside the routed ones, as the configuration counts them."""
        return self.shared.count if self.shared else 0

    @property
    def key(self) -> tuple[int, int]:
        """(layer, step), by which tables name the layer."""
        return self.layer, self.step


@dataclass(frozen=True, eq=False)
class MoEModel:
    """What discovery found: the layers, and the modules that hooks need.

    Attributes:
        layers: the MoE layers in the order of the decoder layers.
        owner: the sub-model that owns the decoder layers; its inputs are what the layers see.
        stack: the decoder layers, dense ones included.
        config: the configuration of the text model.
    """

    layers: list[MoELayer]
    owner: nn.Module = field(repr=False)
    stack: nn.ModuleList = field(repr=False)
    config: Any = field(repr=False)


def find_moe_layers(model: nn.Module) -> list[MoELayer]:
    """The MoE layers of a model, in the order of its decoder layers.

    Raises:
        ModelError: the model has none, or one that cannot be watched; the message names layer and class.
    """
    return inspect_model(model).layers


def inspect_model(model: nn.Module) -> MoEModel:
    """The MoE layers of a model and the modules around them.

    Raises:
        ModelError: the model has no MoE layer, one that cannot be watched, or several stacks of them.
    """
    modules = dict(model.named_modules())
    found = {name: module for name, module in modules.items() if is_fused_experts(module) or adapter_of(module)}
    _refuse_unwatchable(modules, found)
    if not found:
        raise ModelError(_without_layers(model))
    stack_name = _choose_stack(found, modules)
    owner = modules[stack_name.rpartition(".")[0]]
    config = getattr(owner, "config", None) or _text_config(model)
    declared = _declared_routers(owner)
    places: dict[int, int] = defaultdict(int)
    layers = []
    for name, experts in found.items():
        if not name.startswith(f"{stack_name}."):
            continue
        index = int(name.removeprefix(f"{stack_name}.").split(".")[0])
        layers.append(_describe(modules, name, experts, index, places[index], stack_name, declared, config))
        places[index] += 1
    layers.sort(key=lambda layer: layer.key)
    stack = modules[stack_name]
    assert isinstance(stack, nn.ModuleList)
    return MoEModel(layers, owner, stack, config)


def _describe(
    modules: dict[str, nn.Module],
    name: str,
    experts: nn.Module,
    index: int,
    step: int,
    stack_name: str,
    declared: dict[type, int],
    config: Any,
) -> MoELayer:
    if getattr(experts, "_is_expert_parallel", False):
        raise ModelError(
            f"{name} ({type(experts).__name__}) runs expert-parallel: each process sees only its own experts."
            " Load the model in one process"
        )
    layer_name = f"{stack_name}.{index}"
    router_name, router = _find_router(modules, name, layer_name, declared)
    adapter = adapter_of(experts)
    layout = adapter(experts) if adapter else describe_experts(experts)
    num_experts = layout.num_experts if layout else _number(experts, ("num_experts",))
    num_experts = num_experts or _number(config, _COUNT_FIELDS)
    own_config = getattr(experts, "config", config)
    top_k = _number(router, ("top_k", "num_experts_per_tok")) or _number(own_config, _TOP_K_FIELDS)
    shared = None
    for block in _ancestors(name, layer_name):
        shared = shared or find_shared_experts(modules[block], own_config)
    router_class = type(router).__name__ if router is not None else ""
    return MoELayer(
        layer=index,
        step=step,
        name=name,
        experts=experts,
        layout=layout,
        router=router,
        router_name=router_name,
        logits_index=_index_of(router, declared),
        traits=router_traits(router_class=router_class, experts_class=type(experts).__name__, config=own_config),
        num_experts=num_experts,
        top_k=top_k or 1,
        expert_width=layout.width if layout else 0,
        shared=shared,
    )


def _find_router(
    modules: dict[str, nn.Module], name: str, layer_name: str, declared: dict[type, int]
) -> tuple[str, nn.Module | None]:
    """The router nearest to an experts module: one that the model declares, else one that stands under a usual name."""
    for block in _ancestors(name, layer_name):
        inside = {path: module for path, module in modules.items() if path.startswith(f"{block}.")}
        for path, module in inside.items():
            if isinstance(module, tuple(declared)) and not _holds(path, name):
                return path, module
        for router_name in ROUTER_NAMES:
            candidate = modules.get(f"{block}.{router_name}")
            if candidate is not None and type(candidate) is not nn.Linear:
                return f"{block}.{router_name}", candidate
    return "", None


def _holds(outer: str, inner: str) -> bool:
    return inner == outer or inner.startswith(f"{outer}.")


def _ancestors(name: str, last: str) -> list[str]:
    """Paths of the modules around ``name``, from the nearest up to ``last``."""
    paths = []
    while name != last and "." in name:
        name = name.rpartition(".")[0]
        paths.append(name)
    return paths


def _declared_routers(owner: nn.Module) -> dict[type, int]:
    """Router classes that the owning model declares to the library's recorders, each with the place of its logits."""
    declared: dict[type, int] = {}
    for module in owner.modules():
        entries = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits", [])
        for entry in entries if isinstance(entries, (list, tuple)) else [entries]:
            target = getattr(entry, "target_class", entry)
            if isinstance(target, type):
                declared.setdefault(target, int(getattr(entry, "index", 0)))
    return declared


def _index_of(router: nn.Module | None, declared: dict[type, int]) -> int:
    return next((index for target, index in declared.items() if isinstance(router, target)), 0)


def _choose_stack(found: dict[str, nn.Module], modules: dict[str, nn.Module]) -> str:
    """The list of decoder layers that the experts stand in; side stacks (vision, audio, MTP) are left alone."""
    stacks: dict[str, str] = {}
    for name in found:
        match = re.search(r"^(.*?)\.\d+\.", name)
        while match and not isinstance(modules[match[1]], nn.ModuleList):
            match = re.search(rf"^({re.escape(match[0])}.*?)\.\d+\.", name)
        if match is None:
            raise ModelError(f"{name} ({type(found[name]).__name__}) stands in no list of decoder layers")
        stacks.setdefault(match[1], name)
    main = [stack for stack in stacks if not any(word in stack.lower() for word in _OTHER_STACKS)] or list(stacks)
    if len(main) > 1:
        raise ModelError(f"the model has several stacks of MoE layers ({', '.join(main)}): pass one sub-model to watch")
    return main[0]


def _refuse_unwatchable(modules: dict[str, nn.Module], found: dict[str, nn.Module]) -> None:
    for name, module in modules.items():
        refusal = refusal_of(module)
        if refusal is None and name not in found and _looks_like_experts(name, module, modules):
            refusal = Refusal(
                type(module).__name__,
                "it holds experts, but not as transformers 5 fuses them",
                "write an adapter (docs/adapters.md)",
            )
        if refusal is not None and not any(_holds(outer, name) for outer in found):
            raise ModelError(
                f"{_place(name)} ({refusal.experts_class}) cannot be watched: {refusal.reason}; {refusal.remedy}"
            )


def _looks_like_experts(name: str, module: nn.Module, modules: dict[str, nn.Module]) -> bool:
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


def _without_layers(model: nn.Module) -> str:
    count = _number(_text_config(model), _COUNT_FIELDS)
    kind = type(model).__name__
    if count > 1:
        return (
            f"{kind} has no MoE layer that can be watched, though its configuration names {count} experts:"
            " write an adapter (docs/adapters.md)"
        )
    return f"{kind} has no MoE layers: it is a dense model, and there is no routing to profile"


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _number(source: Any, names: tuple[str, ...]) -> int:
    """The first of the named attributes that is a positive integer (the largest entry of a list); 0 without one."""
    for name in names:
        value = getattr(source, name, None)
        if isinstance(value, (list, tuple)):
            value = max((entry for entry in value if isinstance(entry, int)), default=0)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return 0
