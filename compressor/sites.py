"""Where the experts of a loaded model are: the layers that a plan speaks of, and the modules around them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from compressor.families import (
    Adapter,
    ExpertsLayout,
    SharedExperts,
    adapter_of,
    find_shared_experts,
    refusal_of,
)
from compressor.families.routers import ROUTER_NAMES
from compressor.plan import LayerKey, Source
from compressor.weights import ExpertWeights
from moescope.errors import ModelError, PlanError

_OTHER_STACKS = ("vision", "visual", "image", "vit", "audio", "speech", "talker", "code2wav", "mtp", "encoder")
"""Words in the path of a module that stands in no language decoder."""

PROJECTIONS = (
    *("weight", "proj.weight", "wg.weight", "gate.weight", "layer.weight", "classifier.weight"),
    "router_mlp.out_proj.weight",
)
"""Where a router keeps one row per expert, whose product with the hidden state is the logit."""

PER_EXPERT = (
    *("e_score_correction_bias", "expert_bias", "balancing_biases", "per_expert_scale"),
    "moe_statics.e_score_correction_bias",
)
"""What a router, or a block around it, may keep per expert beside those rows and their bias."""


@dataclass(frozen=True, eq=False)
class Site:
    """One experts module and what stands around it.

    Attributes:
        name: path of the experts module in the model.
        experts: the module.
        adapter: how it is called.
        layout: how its weights are kept; None where they are packed.
        router: the module that chooses; None where none was found.
        projection: path in the router of the tensor with one row per expert.
        blocks: the modules around the experts, from the nearest to the decoder layer.
        shared: the shared experts beside them; None without.
    """

    name: str
    experts: nn.Module = field(repr=False)
    adapter: Adapter = field(repr=False)
    layout: ExpertsLayout | None = field(repr=False)
    router: nn.Module | None = field(repr=False)
    projection: str
    blocks: tuple[nn.Module, ...] = field(repr=False)
    shared: SharedExperts | None = field(repr=False)

    def read(self, expert: int) -> ExpertWeights:
        """The weights of one expert, as views where that can be."""
        layout, experts = self.layout, self.experts
        assert layout is not None
        gate, up = layout.first_projections(experts, expert)
        bias = layout.bias(experts, layout.up_name, expert)
        gate_bias, up_bias = layout.split_gate(bias) if bias is not None else (None, None)
        found = {
            "up": up,
            "down": layout.down_weight(experts, expert),
            "gate": gate,
            "up_bias": up_bias,
            "gate_bias": gate_bias,
            "down_bias": layout.bias(experts, layout.down_name, expert),
        }
        return ExpertWeights(**{name: tensor.detach() for name, tensor in found.items() if tensor is not None})


@dataclass(frozen=True, eq=False)
class Decoder:
    """The decoder layers of a model.

    Attributes:
        layers: the list of them.
        config: of the sub-model that owns them.
        sites: (layer, step) -> experts.
    """

    layers: nn.ModuleList = field(repr=False)
    config: Any = field(repr=False)
    sites: dict[LayerKey, Site]


def find_decoder(model: nn.Module, source: Source) -> Decoder:
    """The decoder layers that a plan's source describes.

    Raises:
        ModelError: the model has no MoE layer, or one that cannot be edited.
        PlanError: none of its stacks of layers is the one that the plan is for.
    """
    modules = dict(model.named_modules())
    stacks: dict[tuple[bool, str], dict[LayerKey, str]] = defaultdict(dict)
    for name, module in modules.items():
        if (refusal := refusal_of(module)) is not None:
            raise ModelError(f"{name} ({refusal.experts_class}) cannot be edited: {refusal.reason}")
        if adapter_of(module) is None:
            continue
        path, layer = place_of(name, modules)
        stack = stacks[elsewhere(name), path]
        stack[layer, sum(key[0] == layer for key in stack)] = name
    if not stacks:
        raise ModelError(f"{type(model).__name__} has no MoE layer that could be edited")
    fitting = [key for key, stack in stacks.items() if _fits(modules, key[1], stack, source)]
    chosen = min(fitting, key=lambda key: key[0], default=None)
    if chosen is None:
        raise PlanError(_misfit(modules, next(iter(sorted(stacks.items()))), source))
    layers = modules[chosen[1]]
    assert isinstance(layers, nn.ModuleList)
    sites = {key: _site(modules, name, f"{chosen[1]}.{key[0]}") for key, name in stacks[chosen].items()}
    owner = modules[chosen[1].rpartition(".")[0]]
    return Decoder(layers, getattr(owner, "config", None) or getattr(model, "config", None), sites)


def router_tensors(site: Site) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """(owner, name, tensor) of all that the router of a site, or a block around it, keeps per expert."""
    if site.router is None:
        return
    rows = len(site.router.get_parameter(site.projection))
    yield site.router, site.projection, site.router.get_parameter(site.projection)
    bias = f"{site.projection.removesuffix('weight')}bias"
    seen: set[int] = set()
    for owner in (site.router, *site.blocks):
        for name in (bias, *PER_EXPERT) if owner is site.router else PER_EXPERT:
            tensor = find_tensor(owner, name)
            if tensor is not None and tensor.shape[-1] <= rows and id(tensor) not in seen:
                seen.add(id(tensor))
                yield owner, name, tensor


def find_tensor(module: nn.Module, name: str) -> Tensor | None:
    """The tensor at a dotted path in a module; None without."""
    for part in name.split("."):
        found = getattr(module, part, None)
        if isinstance(found, Tensor):
            return found
        if not isinstance(found, nn.Module):
            return None
        module = found
    return None


def place_of(name: str, modules: dict[str, nn.Module]) -> tuple[str, int]:
    """Path of the list of decoder layers around a module, and its place in it."""
    for match in re.finditer(r"\.(\d+)(?=\.)", name):
        if isinstance(modules[name[: match.start()]], nn.ModuleList):
            return name[: match.start()], int(match[1])
    raise ModelError(f"{name} ({type(modules[name]).__name__}) stands in no list of decoder layers")


def elsewhere(name: str) -> bool:
    """Whether a module of that path stands in no language decoder."""
    return any(part in _OTHER_STACKS for part in re.split(r"[._]", name.lower()))


def _fits(modules: dict[str, nn.Module], path: str, stack: dict[LayerKey, str], source: Source) -> bool:
    layers = modules[path]
    if not isinstance(layers, nn.ModuleList) or len(layers) != source.num_layers:
        return False
    return {(shape.layer, shape.step) for shape in source.layers if not shape.step} <= set(stack)


def _misfit(modules: dict[str, nn.Module], stack: tuple[tuple[bool, str], dict[LayerKey, str]], source: Source) -> str:
    (_, path), found = stack
    count = len(list(modules[path].children()))
    return (
        f"the plan is for {source.model} with {source.num_layers} decoder layers, {len(source.layers)} of them MoE; the"
        f" model has {count} with experts in {len({layer for layer, _ in found})}"
    )


def _site(modules: dict[str, nn.Module], name: str, layer_name: str) -> Site:
    experts = modules[name]
    adapter = adapter_of(experts)
    assert adapter is not None
    paths = []
    inner = name
    while inner != layer_name:
        inner = inner.rpartition(".")[0]
        paths.append(inner)
    layout = adapter.layout(experts)
    router, projection = _find_router(modules, [name, *paths], adapter, layout.num_experts if layout else 0)
    blocks = tuple(modules[path] for path in paths)
    config = getattr(experts, "config", None)
    shared = next((found for block in blocks if (found := find_shared_experts(block, config))), None)
    return Site(name, experts, adapter, layout, router, projection, blocks, shared)


def _find_router(
    modules: dict[str, nn.Module], paths: list[str], adapter: Adapter, num_experts: int
) -> tuple[nn.Module | None, str]:
    """The router nearest to the experts, and where it keeps its rows."""
    for path in paths:
        for name in adapter.routers or ROUTER_NAMES:
            router = modules.get(f"{path}.{name}")
            if router is None:
                continue
            own = dict(router.named_parameters())
            for projection in PROJECTIONS:
                if projection in own and own[projection].ndim == 2 and len(own[projection]) >= num_experts > 0:
                    return router, projection
    return None, ""
