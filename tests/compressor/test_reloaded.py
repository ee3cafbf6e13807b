"""Every operation on every named family: what is written and loaded again equals the edit in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import compressor
from compressor.edits.moments import LayerMoments
from compressor.load import load
from compressor.memory import edited
from compressor.plan import (
    DropLayer,
    DropStep,
    GivenUp,
    LayerShape,
    MergeGroup,
    MergeLayer,
    MergeStep,
    Plan,
    SlimExpert,
    SlimLayer,
    SlimStep,
    Source,
    Step,
)
from moescope.errors import ModelError, PlanError
from tests.compressor.apply_cases import assert_same_output, plan_of, saved, source_of

FAMILIES = (
    "olmoe", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "glm4_moe", "llama4_text",
)  # fmt: skip
"""All have 8 experts; where routers limit themselves to groups, there are two of them."""


def _dropped(form: Any, uneven: bool = False) -> Callable[[Source], Step]:
    def step(source: Source) -> Step:
        layers = []
        for number, shape in enumerate(source.layers):
            gone = (1, 6) if not uneven or number % 2 else (0, 1, 5, 6)
            layers.append(DropLayer(layer=shape.layer, experts=gone))
        return DropStep(method="test", form=form, layers=tuple(layers))

    return step


def _merged(method: Any, form: Any = "uniform", **more: Any) -> Callable[[Source], Step]:
    def step(source: Source) -> Step:
        groups = tuple(
            MergeGroup(lead=lead, members=members, weights=(0.75, 0.25) if len(members) > 1 else (1.0,))
            for lead, members in ((0, (0, 1)), (2, (2,)), (3, (3,)), (4, (4,)), (5, (5, 6)), (7, (7,)))
        )
        layers = tuple(MergeLayer(layer=shape.layer, groups=groups) for shape in source.layers)
        return MergeStep(grouping="test", method=method, form=form, layers=layers, **more)

    return step


def _recombined(source: Source) -> Step:
    groups = tuple(MergeGroup(lead=lead, members=(lead,), weights=(1.0,)) for lead in (0, 2, 3, 4, 5, 7))
    given_up = (GivenUp(expert=1, weight=0.5), GivenUp(expert=6, weight=0.7))
    layers = tuple(MergeLayer(layer=shape.layer, groups=groups, given_up=given_up) for shape in source.layers)
    return MergeStep(grouping="test", method="segments", threshold=0.2, layers=layers)


def _slimmed(form: Any) -> Callable[[Source], Step]:
    def step(source: Source) -> Step:
        layers = tuple(
            SlimLayer(
                layer=shape.layer,
                experts=tuple(_neurons(shape, expert, number if form == "per_layer" else 0) for expert in range(8)),
            )
            for number, shape in enumerate(source.layers)
        )
        width = source.layers[0].width - 8 if form == "uniform" else None
        return SlimStep(method="test", form=form, width=width, layers=layers)

    return step


def _neurons(shape: LayerShape, expert: int, less: int) -> SlimExpert:
    mask = np.ones(shape.width, dtype=bool)
    mask[np.random.default_rng(expert).permutation(shape.width)[: 8 * (1 + less % 2)]] = False
    return SlimExpert.of(expert=expert, mask=mask)


def _layers(source: Source) -> Step:
    return DropStep(method="test", decoder_layers=(source.layers[-1].layer,))


def _blocks(source: Source) -> Step:
    return DropStep(method="test", blocks=(source.layers[0].layer,))


OPERATIONS: dict[str, Callable[[Source], Step]] = {
    "drop, uniform": _dropped("uniform"),
    "drop, per layer": _dropped("per_layer", uneven=True),
    "drop, padded": _dropped("padded", uneven=True),
    "drop, decoder layers": _layers,
    "drop, blocks": _blocks,
    "merge, average": _merged("average", router="mean"),
    "merge, aligned": _merged("aligned"),
    "merge, nearest": _merged("nearest"),
    "merge, subspace": _merged("subspace", rank=12),
    "merge, segments": _recombined,
    "merge, shared": _merged("average", form="shared"),
    "slim, uniform": _slimmed("uniform"),
    "slim, per layer": _slimmed("per_layer"),
    "slim, masked": _slimmed("masked"),
}

BIASED = ("deepseek_v3", "gpt_oss", "glm4_moe")
"""Families whose routers have a bias that keeps fillers from being chosen."""

IMPOSSIBLE = {
    **{(family, "drop, padded"): "without a bias" for family in FAMILIES if family not in BIASED},
    ("llama4_text", "slim, uniform"): "shared",
    ("llama4_text", "slim, per layer"): "shared",
    ("llama4_text", "merge, shared"): "plan with another form than shared",
}
"""What a family's format or mathematics does not allow, and a word of the refusal."""


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    """A family's name, a tiny model of it in memory, and the same on disk."""
    folder = tmp_path_factory.mktemp(request.param) / "source"
    return request.param, saved(request.param, folder), folder


def _moments(plan: Plan) -> dict[tuple[int, int], LayerMoments]:
    generator = torch.Generator().manual_seed(0)
    size = plan.source.expert_size
    moments = {}
    for shape in plan.source.layers:
        rows = torch.randn(3 * size, size, generator=generator)
        squares = torch.rand(shape.num_experts, shape.width, generator=generator)
        moments[shape.key] = LayerMoments(input=rows.T @ rows, activation_square=squares)
    return moments


@pytest.mark.parametrize("operation", OPERATIONS)
def test_reloaded_equals_edited(family: tuple[str, Any, Path], operation: str, tmp_path: Path) -> None:
    name, model, source = family
    if (name, operation) in IMPOSSIBLE:
        with pytest.raises((PlanError, ModelError), match=IMPOSSIBLE[name, operation]):
            plan = plan_of(model, OPERATIONS[operation](source_of(model)))
            compressor.apply(plan, source=source, destination=tmp_path / "result")
        assert not (tmp_path / "result").exists()
        return
    plan = plan_of(model, OPERATIONS[operation](source_of(model)))
    moments = _moments(plan) if operation == "merge, subspace" else None
    receipt = compressor.apply(plan, source=source, destination=tmp_path / "result", moments=moments)
    ours = "per layer" in operation or "shared" in operation
    assert receipt.loads_with == ("compressor.load" if ours else "transformers")
    loaded = load(tmp_path / "result", dtype="float32")
    with edited(model, plan, moments=moments):
        assert_same_output(loaded, model)
    assert type(loaded) is type(model)
