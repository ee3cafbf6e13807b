"""``quantization_config`` of compressed-tensors: what it says of a module, and how ours is written."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from compressor.plan import QuantizeStep
from moescope.errors import ModelError

METHOD, FORMAT = "compressed-tensors", "pack-quantized"

_WIDTHS = range(1, 9)
_STRATEGIES = ("group", "channel", "tensor")


@dataclass(frozen=True)
class Group:
    """What modules that a group names have in common.

    Attributes:
        name: of the group.
        targets: names of modules, regular expressions behind ``re:``, or ``Linear``.
        bits: width.
        symmetric: without zero points.
        strategy: what shares a scale: ``group`` of input channels, ``channel`` (a row), or the whole ``tensor``.
        group_size: input channels that share a scale; 0 with the other strategies.
    """

    name: str
    targets: tuple[str, ...]
    bits: int
    symmetric: bool
    strategy: str
    group_size: int


def stated_settings(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """``quantization_config`` of a configuration, where its method is compressed-tensors."""
    found = config.get("quantization_config")
    return found if isinstance(found, dict) and found.get("quant_method") == METHOD else None


def read_groups(settings: Mapping[str, Any]) -> tuple[Group, ...]:
    """The groups of a configuration all of whose weights are packed whole numbers.

    Raises:
        ModelError: with what is not supported, by its name.
    """
    _refuse_beside(settings)
    stated = settings.get("config_groups")
    if not isinstance(stated, dict) or not stated:
        raise ModelError("quantization_config has no config_groups")
    return tuple(_group(name, group, settings.get("format")) for name, group in stated.items())


def _refuse_beside(settings: Mapping[str, Any]) -> None:
    """What changes activations, or weights once more."""
    for name, what in (
        ("kv_cache_scheme", "quantizes keys and values"),
        ("transform_config", "rotates weights and activations"),
        ("sparsity_config", "stores sparse weights"),
    ):
        found = settings.get(name)
        dense = isinstance(found, dict) and found.get("format") == "dense"
        if found and not dense:
            raise ModelError(f"quantization_config {what} ({name}), which is not supported")


def _group(name: str, group: Any, default: Any) -> Group:
    if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
        raise ModelError(f"{name} of quantization_config does not say how weights are stored")
    form = group.get("format") or default
    weights = group["weights"]
    if form != FORMAT:
        raise ModelError(f"{name} of quantization_config has format {form}: only {FORMAT} is supported")
    if weights.get("type", "int") != "int":
        raise ModelError(f"{name} of quantization_config has weights of type {weights['type']}: only int is supported")
    if group.get("input_activations") or group.get("output_activations"):
        raise ModelError(f"{name} of quantization_config quantizes activations, which is not supported")
    bits, size, targets = weights.get("num_bits"), weights.get("group_size"), group.get("targets")
    if not isinstance(bits, int) or bits not in _WIDTHS:
        raise ModelError(f"{name} of quantization_config has weights of {bits} bits: 1 to 8 are supported")
    known = isinstance(size, int) or size is None
    strategy = weights.get("strategy") or {None: "tensor", -1: "channel"}.get(size if known else 0, "group")
    if strategy not in _STRATEGIES or (strategy == "group" and not (isinstance(size, int) and size > 0)):
        raise ModelError(f"{name} of quantization_config has scales by {strategy} of {size}, which is not supported")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise ModelError(f"{name} of quantization_config names no targets")
    for target in targets:
        try:
            re.compile(target.removeprefix("re:"))
        except re.error as error:
            raise ModelError(f"{name} of quantization_config has a target that cannot be read: {target}") from error
    return Group(
        name=name,
        targets=tuple(targets),
        bits=bits,
        symmetric=bool(weights.get("symmetric", True)),
        strategy=strategy,
        group_size=int(size) if strategy == "group" and size else 0,
    )


def group_of(groups: Iterable[Group], names: Iterable[str]) -> Group | None:
    """The first group that names a module: by its full name, else by a regular expression, else as a ``Linear``.

    Args:
        groups: in the order of the configuration.
        names: of the module, its own first, then others that it may go by.
    """
    known, every = list(names), list(groups)
    for name in known:
        for group in every:
            if name in group.targets:
                return group
    for name in known:
        for group in every:
            if any(re.match(target[3:], name) for target in group.targets if target.startswith("re:")):
                return group
    return next((group for group in every if "Linear" in group.targets), None)


def write_settings(step: QuantizeStep, packed: Mapping[str, int], plain: Iterable[str]) -> dict[str, Any]:
    """``quantization_config`` of a result.

    Args:
        step: the step that quantized it.
        packed: module -> its width.
        plain: modules whose matrices are not quantized.
    """
    others = list(plain)
    every = _Places([*packed, *others])
    groups = {}
    for number, bits in enumerate(sorted(set(packed.values()))):
        groups[f"group_{number}"] = {
            "targets": list(every.patterns(module for module, width in packed.items() if width == bits)),
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": step.symmetric,
                "strategy": "group" if step.group_size else "channel",
                "group_size": step.group_size or -1,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
            "format": FORMAT,
        }
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "config_groups": groups,
        "ignore": list(every.patterns(others)),
    }


_PLACE = re.compile(r"^(?P<stack>.+?)\.(?P<layer>\d+)\.(?P<block>.+?\.)(?:(?P<expert>\d+)\.)?(?P<projection>\w+)$")


class _Places:
    """All modules of a checkpoint, so that patterns can say "all of them"."""

    def __init__(self, modules: Iterable[str]) -> None:
        self._experts: dict[tuple[str, str, str], dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
        for module in modules:
            if found := _PLACE.match(module):
                kind = found["stack"], found["block"], found["projection"]
                self._experts[kind][int(found["layer"])].add(int(found["expert"] or -1))

    def patterns(self, modules: Iterable[str]) -> Iterator[str]:
        """Anchored regular expressions that match these modules and no others; names, for those outside of layers."""
        chosen: dict[tuple[str, str, str], dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
        for module in modules:
            if found := _PLACE.match(module):
                kind = found["stack"], found["block"], found["projection"]
                chosen[kind][int(found["layer"])].add(int(found["expert"] or -1))
            else:
                yield module
        alike: dict[tuple[str, str, str, str], list[str]] = defaultdict(list)
        for kind, layers in chosen.items():
            for experts, numbers in self._by_experts(kind, layers).items():
                stack, block, projection = kind
                which = r"\d+" if numbers == set(self._experts[kind]) else _any_of(numbers)
                alike[stack, which, block, experts].append(projection)
        for (stack, which, block, experts), projections in alike.items():
            last = projections[0] if len(projections) == 1 else f"({'|'.join(projections)})"
            yield rf"re:^{re.escape(stack)}\.{which}\.{re.escape(block)}{experts}{last}$"

    def _by_experts(self, kind: tuple[str, str, str], layers: Mapping[int, set[int]]) -> dict[str, set[int]]:
        """What stands for the experts of a layer -> the layers in which it does."""
        result: dict[str, set[int]] = defaultdict(set)
        for layer, experts in layers.items():
            text = r"\d+" if experts == self._experts[kind][layer] else _any_of(experts)
            result["" if experts == {-1} else rf"{text}\."].add(layer)
        return result


def _any_of(numbers: Iterable[int]) -> str:
    known = [str(number) for number in sorted(numbers)]
    return known[0] if len(known) == 1 else f"({'|'.join(known)})"
