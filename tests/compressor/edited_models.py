"""Running tiny models, plans that slim and merge them, and seeing that a model is as it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressor.plan import (
    MergeGroup,
    MergeLayer,
    MergeStep,
    Plan,
    SlimExpert,
    SlimLayer,
    SlimStep,
    Source,
)
from tests.compressor.edit_plans import plan, source
from tests.profiler.capture.tiny import batch, output_of


@torch.no_grad()
def run(model: nn.Module) -> Tensor:
    """Logits of two short texts, one of them padded."""
    inputs = batch(2, 10)
    if "switch" in type(model).__name__.lower():
        inputs["decoder_input_ids"] = inputs["input_ids"]
    return output_of(model(**inputs))


def near(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to rounding, by the size of the logits."""
    assert torch.isfinite(wanted).all()
    scale = float(wanted.abs().max())
    assert float((found - wanted).abs().max()) <= tolerance * scale, float((found - wanted).abs().max()) / scale


def slimming(model: nn.Module, form: str, *, seed: int = 0) -> Plan:
    """Every expert keeps other neurons, and not all as many; shared experts too."""
    draw = np.random.default_rng(seed)
    known = source(model)
    layers = []
    for place, shape in enumerate(known.layers):
        experts = []
        for number in range(shape.num_experts):
            kept = np.zeros(shape.width, dtype=bool)
            kept[draw.permutation(shape.width)[: shape.width - 8 * (place % 3) - 4 * (number % 2)]] = True
            experts.append(SlimExpert.of(expert=number, mask=kept))
        if shape.shared_width:
            experts.append(SlimExpert.of(expert=0, role="shared", mask=draw.random(shape.shared_width) < 0.7))
        layers.append(SlimLayer(layer=shape.layer, experts=tuple(experts)))
    return plan(known, SlimStep(method="test", form=form, layers=tuple(layers)))  # type: ignore[arg-type]


def merging(known: Source, groups: list[tuple[int, ...]], **step: Any) -> Plan:
    """The same groups in every layer, the first member in the lead, equal parts; the others stay alone."""
    layers = []
    for shape in known.layers:
        named = {expert for group in groups for expert in group}
        every = [*groups, *((expert,) for expert in range(shape.num_experts) if expert not in named)]
        entries = [
            MergeGroup(lead=group[0], members=tuple(sorted(group)), weights=(1 / len(group),) * len(group))
            for group in sorted(every, key=lambda group: group[0])
        ]
        layers.append(MergeLayer(layer=shape.layer, groups=tuple(entries)))
    return plan(known, MergeStep(**{"grouping": "test", "method": "average", "layers": tuple(layers), **step}))


class Snapshot:
    """All that a model is made of, to see that it is the same again."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors = {name: (tensor, tensor.clone()) for name, tensor in _tensors(model).items()}
        self.modules = {name: (module, _plain(module)) for name, module in model.named_modules()}
        self.configs = {id(config): (config, dict(vars(config))) for config in _configs(model)}

    def require_same(self, model: nn.Module) -> None:
        """The same objects with the same content."""
        tensors = _tensors(model)
        assert tensors.keys() == self.tensors.keys()
        for name, (before, values) in self.tensors.items():
            assert tensors[name] is before and torch.equal(before, values), name
        modules = dict(model.named_modules())
        assert list(modules) == list(self.modules)
        for name, (module, attributes) in self.modules.items():
            assert modules[name] is module and _plain(module) == attributes, name
        for config, content in self.configs.values():
            assert vars(config) == content


def _tensors(model: nn.Module) -> Mapping[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def _plain(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if isinstance(value, (int, float, str))}


def _configs(model: nn.Module) -> list[Any]:
    found = [getattr(module, "config", None) for module in model.modules()]
    return [config for config in found if hasattr(config, "to_dict")]
