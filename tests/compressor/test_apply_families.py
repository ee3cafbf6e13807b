"""Every family that the library saves and reloads: what comes out of a checkpoint, by edits written here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import compressor
from compressor.families.config_fields import ALIKE_ONLY
from compressor.plan import DropStep
from moescope.errors import PlanError
from profiler.capture.discovery import inspect_model
from tests.compressor.apply_cases import (
    FAMILIES,
    LAYOUTS,
    NOT_EDITED,
    assert_same_output,
    assert_same_state,
    drop,
    plan_of,
    reload,
    saved,
    selected,
    slim,
    source_of,
)
from tests.compressor.edit_plans import unreachable

NO_DROP = {
    "deepseek_v4": "table of token ids",
    "jetmoe": "neither count can change alone",
}
NO_SLIM = {
    "deepseek_v4": "width of the routed ones",
    "hunyuan_v1_moe": "width of the routed ones",
    "inkling_text": "width of the routed ones",
    "jamba": "gives dense layers the width of the experts",
    "llama4_text": "width of the routed ones",
}
NO_DEPTH = {
    "beam": "numbers of the layers",
    "gemma4_text": "one embedding table per layer",
    "inkling2_text": "one entry for each of them",
    "jamba": "every 2th layer",
}
GONE = (1, 6)
"""One of each group, where experts stand in two groups."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """family -> (model, folder), written once."""
    made: dict[str, tuple[nn.Module, Path]] = {}

    def get(family: str) -> tuple[nn.Module, Path]:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            made[family] = saved(family, folder), folder
        return made[family]

    return get


@pytest.mark.parametrize("family", FAMILIES)
def test_dropped_experts(models: Any, tmp_path: Path, family: str) -> None:
    model, folder = models(family)
    plan = drop(model, GONE)
    if family in NO_DROP:
        with pytest.raises(PlanError, match=NO_DROP[family]):
            compressor.apply(plan, source=folder, destination=tmp_path / "out")
        return
    receipt = compressor.apply(plan, source=folder, destination=tmp_path / "out")
    assert receipt.loads_with == "transformers"
    result = reload(family, tmp_path / "out")
    gone = {shape.layer: GONE for shape in plan.source.layers}
    assert_same_state(result, selected(model, gone))
    with unreachable(model, gone) as twin:
        assert_same_output(result, twin)


@pytest.mark.parametrize("family", [*LAYOUTS, *(family for family in ALIKE_ONLY if family not in LAYOUTS)])
def test_layers_that_keep_different_numbers(models: Any, tmp_path: Path, family: str) -> None:
    model, folder = models(family)
    layers = [shape.layer for shape in source_of(model).layers]
    gone = {layer: ((1, 6), (0, 2, 5, 7), (3, 4))[place % 3] for place, layer in enumerate(layers)}
    plan = drop(model, gone, form="per_layer")
    if family in ALIKE_ONLY:
        with pytest.raises(PlanError, match="plan with form uniform"):
            compressor.apply(plan, source=folder, destination=tmp_path / "out")
        return
    receipt = compressor.apply(plan, source=folder, destination=tmp_path / "out")
    assert receipt.loads_with == ("compressor.load" if len(layers) > 1 else "transformers")
    result = compressor.load(tmp_path / "out")
    assert_same_state(result, selected(model, gone))
    with unreachable(model, gone) as twin:
        assert_same_output(result, twin)


@pytest.mark.parametrize("family", FAMILIES)
def test_slimmed_experts(models: Any, tmp_path: Path, family: str) -> None:
    model, folder = models(family)
    plan, masks = slim(model, 20)
    if family in NO_SLIM:
        with pytest.raises(PlanError, match=NO_SLIM[family]):
            compressor.apply(plan, source=folder, destination=tmp_path / "out")
        return
    compressor.apply(plan, source=folder, destination=tmp_path / "out")
    result = reload(family, tmp_path / "out")
    assert [layer.layout.width for layer in inspect_model(result).layers if layer.layout] == [20] * len(
        plan.source.layers
    )
    original = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        silence(model, masks)
        assert_same_output(result, model)
    finally:
        model.load_state_dict(original)


def silence(model: nn.Module, masks: dict[tuple[int, int], torch.Tensor]) -> None:
    """Zero what neurons that go put out: their columns of the down projections."""
    with torch.no_grad():
        for layer in inspect_model(model).layers:
            assert layer.layout is not None
            for expert in range(layer.layout.num_weighted):
                layer.layout.down_weight(layer.experts, expert)[:, ~masks[layer.layer, expert]] = 0


@pytest.mark.parametrize("family", FAMILIES)
def test_dropped_decoder_layer(models: Any, tmp_path: Path, family: str) -> None:
    model, folder = models(family)
    found = inspect_model(model)
    gone = {"longcat_flash": 0, "nemotron_h": 3}.get(family, 2)
    plan = plan_of(model, DropStep(method="test", decoder_layers=(gone,)))
    if family in NO_DEPTH:
        with pytest.raises(PlanError, match=NO_DEPTH[family]):
            compressor.apply(plan, source=folder, destination=tmp_path / "out")
        return
    compressor.apply(plan, source=folder, destination=tmp_path / "out")
    result = reload(family, tmp_path / "out")
    path = next(name for name, module in model.named_modules() if module is found.stack)
    expected = {}
    for name, value in model.state_dict().items():
        if name.startswith(f"{path}."):
            number, _, rest = name[len(path) + 1 :].partition(".")
            if int(number) != gone:
                expected[f"{path}.{int(number) - (int(number) > gone)}.{rest}"] = value
        else:
            expected[name] = value
    assert_same_state(result, expected)
    # Each layer is built as its original: same modules, same window, same kind.
    before = [describe(layer) for place, layer in enumerate(found.stack) if place != gone]
    assert [describe(layer) for layer in inspect_model(result).stack] == before


def describe(layer: nn.Module) -> list[tuple[Any, ...]]:
    """What layers of different kinds differ in."""
    words = ("sliding_window", "attention_type", "layer_type", "use_rope", "is_sliding", "attention_chunk_size")
    return [
        (name, type(module).__name__, *(repr(getattr(module, word, None)) for word in words))
        for name, module in layer.named_modules()
    ]


@pytest.mark.parametrize("family", NOT_EDITED)
def test_families_that_are_refused(models: Any, tmp_path: Path, family: str) -> None:
    model, folder = models(family)
    with pytest.raises(PlanError, match=NOT_EDITED[family]):
        compressor.apply(drop(model, (1,)), source=folder, destination=tmp_path / "out")
    assert not (tmp_path / "out").exists()
