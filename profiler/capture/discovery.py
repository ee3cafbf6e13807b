"""Find the MoE layers of a model: by the library's fused-experts contract and by the recorders which models declare."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from compressor.families import (
    FUSED,
    Adapter,
    ExpertsLayout,
    RouterTraits,
    SharedExperts,
    adapter_of,
    find_shared_experts,
    router_traits,
)
from compressor.families.special.packed import packed_width
from compressor.routing import reroute_of
from compressor.routing.places import ancestors, declared_routers, find_routers
from moescope.errors import ModelError
from profiler.capture.stacks import DECODER, Stack, choose_stack, find_stacks, stack_name
from profiler.capture.unwatchable import find_unwatchable, left_out, refuse

_COUNT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOP_K_FIELDS = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")


@dataclass(frozen=True, eq=False)
class MoELayer:
    """One experts module of a model and what stands around it; of several calls in one forward, one of them.

    Attributes:
        layer: index of its decoder layer, dense layers counted.
        step: 0, or 1, 2, ... for further experts modules in the same decoder layer, and for further calls of one.
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
        block: the module that holds the experts; some families keep the selection bias there.
        adapter: how their calls are read.
        stack: the stack of layers that they stand in: decoder | encoder | vision | ...
        routers: all routers, where each call of the experts has one of its own; the first is ``router``.
        stride: experts modules in its decoder layer; the steps of one of them are so far apart.
        rerouted: its experts run what a rule makes of the router's choice, and slots of weight 0 hold nobody.
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
    block: nn.Module | None = field(repr=False, default=None)
    adapter: Adapter = field(default=FUSED, repr=False)
    stack: str = DECODER
    routers: tuple[nn.Module, ...] = field(default=(), repr=False)
    stride: int = 1
    rerouted: bool = False

    def called(self, times: int) -> MoELayer:
        """The layer as it is called for the ``times``-th time in a forward, from 0."""
        if times == 0:
            return self
        router = self.routers[min(times, len(self.routers) - 1)] if self.routers else self.router
        return replace(self, step=self.step + times * self.stride, router=router)

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
        config: the configuration of that sub-model.
        name: what the stack is called.
        left_out: what else of the model holds experts and is not watched, each in one sentence.
    """

    layers: list[MoELayer]
    owner: nn.Module = field(repr=False)
    stack: nn.ModuleList = field(repr=False)
    config: Any = field(repr=False)
    name: str = DECODER
    left_out: list[str] = field(default_factory=list)


def find_moe_layers(model: nn.Module, stack: str | None = None) -> list[MoELayer]:
    """The MoE layers of a model, in the order of its decoder layers.

    Args:
        model: the model.
        stack: which stack of layers, where there are several; see :func:`inspect_model`.

    Raises:
        ModelError: the model has none, or one that cannot be watched; the message names layer and class.
        InputError: no stack of that name.
    """
    return inspect_model(model, stack).layers


def inspect_model(model: nn.Module, stack: str | None = None) -> MoEModel:
    """The MoE layers of one stack of a model and the modules around them.

    Args:
        model: the model.
        stack: name or path of the stack, where there are several: encoder, decoder, vision, talker, ...; by default
            the language decoder.

    Raises:
        ModelError: the model has no MoE layer, one that cannot be watched, or several stacks that it may be.
        InputError: no stack of that name; the message lists those that there are.
    """
    modules = dict(model.named_modules())
    adapters = {name: adapter for name, module in modules.items() if (adapter := adapter_of(module))}
    unwatchable = find_unwatchable(modules, adapters)
    refuse(unwatchable, stack_name(stack or "") if adapters else None)
    if not adapters:
        raise ModelError(_without_layers(model))
    stacks = find_stacks(list(adapters), modules)
    chosen = choose_stack(stacks, stack)
    refuse(unwatchable, stack_name(chosen.experts[0]))
    owner = modules[chosen.path.rpartition(".")[0]]
    config = getattr(owner, "config", None) or _text_config(model)
    layers = _describe_all(modules, adapters, chosen, declared_routers(owner), config)
    whole = modules[chosen.path]
    assert isinstance(whole, nn.ModuleList)
    return MoEModel(layers, owner, whole, config, chosen.name, left_out(modules, stacks, chosen, unwatchable))


def _describe_all(
    modules: dict[str, nn.Module],
    adapters: dict[str, Adapter],
    stack: Stack,
    declared: dict[type, int],
    config: Any,
) -> list[MoELayer]:
    by_index: dict[int, list[str]] = defaultdict(list)
    for name in stack.experts:
        by_index[int(name.removeprefix(f"{stack.path}.").split(".")[0])].append(name)
    layers = []
    for index, names in sorted(by_index.items()):
        for step, name in enumerate(names):
            layer = _describe(modules, name, index, step, stack.path, declared, config, adapters[name])
            layers.append(replace(layer, stack=stack.name, stride=len(names)))
    return layers


def _describe(
    modules: dict[str, nn.Module],
    name: str,
    index: int,
    step: int,
    stack_path: str,
    declared: dict[type, int],
    config: Any,
    adapter: Adapter,
) -> MoELayer:
    experts = modules[name]
    if getattr(experts, "_is_expert_parallel", False):
        raise ModelError(
            f"{name} ({type(experts).__name__}) runs expert-parallel: each process sees only its own experts."
            " Load the model in one process"
        )
    layer_name = f"{stack_path}.{index}"
    router_name, routers = find_routers(modules, name, layer_name, declared, adapter)
    router = routers[0] if routers else None
    layout = adapter.layout(experts)
    num_experts = layout.num_experts if layout else _number(experts, ("num_experts",))
    num_experts = num_experts or _number(config, _COUNT_FIELDS)
    own_config = getattr(experts, "config", config)
    top_k = _number(router, ("top_k", "num_experts_per_tok")) or _number(own_config, _TOP_K_FIELDS)
    shared = None
    for block in ancestors(name, layer_name):
        shared = shared or find_shared_experts(modules[block], own_config)
    router_class = type(router).__name__ if router is not None else ""
    traits = router_traits(router_class=router_class, experts_class=type(experts).__name__, config=own_config)
    rerouted = reroute_of(experts) is not None
    return MoELayer(
        layer=index,
        step=step,
        name=name,
        experts=experts,
        layout=layout,
        router=router,
        router_name=router_name,
        logits_index=adapter.logits_index if adapter.routers else _index_of(router, declared),
        traits=replace(
            traits,
            score=adapter.score or traits.score,
            may_skip=adapter.may_skip or adapter.zero_weight_is_none or rerouted,
            zero_weight_is_none=adapter.zero_weight_is_none or rerouted,
        ),
        num_experts=num_experts,
        top_k=top_k or 1,
        expert_width=layout.width if layout else packed_width(experts),
        shared=shared,
        block=modules.get(name.rpartition(".")[0]),
        adapter=adapter,
        routers=tuple(routers),
        rerouted=rerouted,
    )


def _index_of(router: nn.Module | None, declared: dict[type, int]) -> int:
    return next((index for target, index in declared.items() if isinstance(router, target)), 0)


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
