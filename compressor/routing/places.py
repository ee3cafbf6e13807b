"""Where in a loaded model choices pass from routers to experts, by (layer, step)."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from compressor.families import Adapter, adapter_of, expert_map_of, refusal_of, router_traits, takes_expert_map
from compressor.families.routers import ROUTER_NAMES
from compressor.routing.gates import Known
from compressor.sites import PER_EXPERT, elsewhere, find_tensor, place_of
from moescope.errors import ModelError

_GROUPS = ("n_group", "num_group", "n_groups", "num_expert_group", "num_expert_groups")
_CHOSEN_GROUPS = ("topk_group", "topk_groups", "num_limited_groups")


@dataclass(frozen=True, eq=False)
class Place:
    """An experts module, and the router or routers before it.

    Attributes:
        key: (layer, step) of its first call in a forward.
        stride: its next calls have steps so far apart.
        name: path in the model.
        experts: the module.
        layer: the decoder layer around it.
        routers: what chooses; one for each call where there are several; empty where none was found.
        logits_index: place of the logits in what they return.
        holds_probabilities: in the place of the logits stand probabilities.
        known: of the gate, before it is tried.
    """

    key: tuple[int, int]
    stride: int
    name: str
    experts: nn.Module = field(repr=False)
    layer: nn.Module = field(repr=False)
    routers: tuple[nn.Module, ...] = field(repr=False)
    logits_index: int
    holds_probabilities: bool
    known: Known = field(repr=False)

    @property
    def words(self) -> str:
        """The layer and its experts, for a message."""
        step = f", step {self.key[1]}" if self.key[1] else ""
        return f"layer {self.key[0]}{step} ({type(self.experts).__name__})"


def find_places(model: nn.Module) -> dict[tuple[int, int], Place]:
    """The places in the language decoder of a model, by the (layer, step) that runs and plans use.

    Raises:
        ModelError: the model has none, or experts that are called in a way in which no choice can be exchanged.
    """
    modules = dict(model.named_modules())
    stacks: dict[tuple[bool, str], dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, module in modules.items():
        if (refusal := refusal_of(module)) is not None and not elsewhere(name):
            raise ModelError(f"{name} ({refusal.experts_class}) cannot be rerouted: {refusal.reason}")
        if adapter_of(module) is not None:
            path, layer = place_of(name, modules)
            stacks[elsewhere(name), path][layer].append(name)
    if not stacks:
        raise ModelError(f"{type(model).__name__} has no MoE layer whose choice could be changed")
    chosen = min(stacks, key=lambda stack: (stack[0], -len(stacks[stack])))
    path = chosen[1]
    declared = declared_routers(modules[path.rpartition(".")[0]])
    places = {}
    for layer, names in sorted(stacks[chosen].items()):
        for step, name in enumerate(names):
            places[layer, step] = _place(modules, name, f"{path}.{layer}", (layer, step), len(names), declared)
    return places


def declared_routers(owner: nn.Module) -> dict[type, int]:
    """Router classes that a model declares to the library's recorders, each with the place of its logits."""
    declared: dict[type, int] = {}
    for module in owner.modules():
        entries = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits", [])
        for entry in entries if isinstance(entries, (list, tuple)) else [entries]:
            target = getattr(entry, "target_class", entry)
            if isinstance(target, type):
                declared.setdefault(target, int(getattr(entry, "index", 0)))
    return declared


def find_routers(
    modules: dict[str, nn.Module], name: str, layer_name: str, declared: dict[type, int], adapter: Adapter
) -> tuple[str, list[nn.Module]]:
    """The router nearest to an experts module: one that the model declares, else one that stands under a usual name.

    Several only where they stand in a list of their own, one for each call of the experts.
    """
    for block in [name, *ancestors(name, layer_name)]:
        inside = {path: module for path, module in modules.items() if path.startswith(f"{block}.")}
        for path, module in inside.items():
            around = name == path or name.startswith(f"{path}.")
            if not adapter.routers and isinstance(module, tuple(declared)) and not around:
                return path, [module]
        for router_name in adapter.routers or ROUTER_NAMES:
            candidate = modules.get(f"{block}.{router_name}")
            if isinstance(candidate, nn.ModuleList):
                return f"{block}.{router_name}", list(candidate)
            if candidate is not None and (adapter.routers or type(candidate) is not nn.Linear):
                return f"{block}.{router_name}", [candidate]
    return "", []


def ancestors(name: str, last: str) -> list[str]:
    """Paths of the modules around ``name``, from the nearest up to ``last``."""
    paths = []
    while name != last and "." in name:
        name = name.rpartition(".")[0]
        paths.append(name)
    return paths


def _place(
    modules: dict[str, nn.Module],
    name: str,
    layer_name: str,
    key: tuple[int, int],
    stride: int,
    declared: dict[type, int],
) -> Place:
    experts = modules[name]
    adapter = adapter_of(experts)
    assert adapter is not None
    kind = type(experts).__name__
    if not takes_expert_map(adapter) and not (adapter.packed and adapter.method == "forward"):
        raise ModelError(
            f"{name} ({kind}) is not called with (hidden, ids, weights), so that nothing can be put in the place of its"
            " router's choice"
        )
    if getattr(experts, "_is_expert_parallel", False):
        raise ModelError(f"{name} ({kind}) runs expert-parallel: load the model in one process")
    router_name, routers = find_routers(modules, name, layer_name, declared, adapter)
    router = routers[0] if routers else None
    config = getattr(experts, "config", None)
    traits = router_traits(
        router_class=type(router).__name__ if router is not None else "", experts_class=kind, config=config
    )
    layout = adapter.layout(experts)
    shown = expert_map_of(experts)
    rows = len(shown) + len(layout.weightless) if shown and layout else layout.num_experts if layout else 0
    owners = [*([router] if router is not None else []), *(modules[path] for path in ancestors(name, layer_name))]
    found = [(one, tensor) for owner in owners for one in PER_EXPERT if (tensor := find_tensor(owner, one)) is not None]
    sources = (*owners, config, getattr(router, "config", None))
    return Place(
        key=key,
        stride=stride,
        name=name,
        experts=experts,
        layer=modules[layer_name],
        routers=tuple(routers),
        logits_index=adapter.logits_index if adapter.routers else _index_of(router, declared),
        holds_probabilities=traits.holds_probabilities,
        known=Known(
            experts=rows,
            weightless=len(layout.weightless) if layout else 0,
            score=adapter.score or traits.score,
            groups=_number(sources, _GROUPS) or 1,
            chosen_groups=_number(sources, _CHOSEN_GROUPS) or 1,
            biases=tuple(_unlike(tensor for one, tensor in found if "bias" in one)),
            factors=tuple(_unlike(tensor for one, tensor in found if "scale" in one)),
            table=isinstance(getattr(router, "tid2eid", None), Tensor),
            scales=tuple(_scales(sources)),
        ),
    )


def _unlike(tensors: Any) -> list[Tensor]:
    found: dict[int, Tensor] = {id(tensor): tensor for tensor in tensors}
    return list(found.values())


def _index_of(router: nn.Module | None, declared: dict[type, int]) -> int:
    return next((index for target, index in declared.items() if isinstance(router, target)), 0)


def _scales(sources: Any) -> set[float]:
    attributes = [vars(source) for source in sources if hasattr(source, "__dict__")]
    return {
        float(f"{value:.4g}")
        for own in attributes
        for name, value in own.items()
        if "scal" in name and isinstance(value, float)
    }


def _number(sources: Any, names: tuple[str, ...]) -> int:
    for source in sources:
        for name in names:
            value = getattr(source, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return 0
