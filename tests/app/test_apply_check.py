"""``moescope apply`` of plans that quantize: the verdict on the loaded result, where it is kept, and how it fails."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import store
from app import model_check
from app.cli import main
from sample_data import MODEL, RUN
from tests.compressor.apply_cases import saved
from tests.compressor.bit_plans import quantize
from tests.compressor.edit_plans import plan, source

Made = tuple[Path, Path, Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Store, plan and model: a tiny OLMoE at 8, 4 and 2 bits, said to come from the bundled run."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copyfile(RUN, folder / RUN.name)
    model = saved("olmoe", folder / "model", intermediate_size=64, num_hidden_layers=2)
    shutil.copyfile(MODEL / "tokenizer.json", folder / "model" / "tokenizer.json")
    what = plan(source(model), quantize(source(model), lambda layer, expert, part: (8, 4, 2)[expert % 3], group_size=0))
    run = what.provenance.model_copy(update={"run": RUN.stem})
    what.model_copy(update={"provenance": run}).save(folder / "plan.json")
    return folder, folder / "plan.json", folder / "model"


def words(made: Made, target: Path, *more: str) -> list[str]:
    return ["apply", str(made[1]), str(made[2]), "-o", str(target), "--store", str(made[0]), *more]


def kept(made: Made) -> dict[str, Any]:
    """The newest check beside the run."""
    return store.read_plan_document(store.list_plans(made[0] / RUN.name, "check")[0])


def test_the_loaded_result_is_held_against_the_plan(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(made, tmp_path / "out")) == 0
    out = capsys.readouterr().out
    assert "self-check: " in out and "matrices as wide as planned" in out and "not checked" not in out
    document = kept(made)
    assert document["passed"] and document["failure"] == ""
    assert document["logits"]["relative"] < 1e-3
    assert {row["verdict"] for row in document["weights"]["rows"]} == {"ok"}
    assert document["routing"] and all(0 <= layer["flips"] <= 1 and layer["kl"] >= 0 for layer in document["routing"])
    assert any(layer["flips"] > 0 for layer in document["routing"])


def test_what_is_not_loaded_is_said(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(words(made, tmp_path / "out", "--no-check-models", "--json")) == 0
    found = json.loads(capsys.readouterr().out)["check"]
    assert found["not_checked"] == ["loaded models: --no-check-models"] and found["logits"] is None
    monkeypatch.setattr(model_check, "_available", lambda: 1000)
    assert main(words(made, tmp_path / "other")) == 0
    assert "not checked: loaded models: they take" in capsys.readouterr().out


def test_a_wrong_result_ends_in_one_line_and_code_1(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = model_check._load

    def exchanged(folder: str) -> Any:
        model = load(folder)
        if folder.endswith("out"):
            with torch.no_grad():
                down = model.get_parameter("model.layers.1.mlp.experts.down_proj")
                down[[0, 1]] = down[[1, 0]].clone()
        return model

    monkeypatch.setattr(model_check, "_load", exchanged)
    assert main(words(made, tmp_path / "out")) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "is not what the plan says" in last and "the down projection of routed expert 0 of layer 1" in last
    assert not kept(made)["passed"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--backend", "autoround", "--dry-run"], "--dry-run is for the own backend"),
        (["--backend", "autoround"], "tuning needs text"),
        (["--backend", "autoround", "--iters", "3"], "3 steps make weights worse"),
        (["--backend", "autoround", "--iters", "0", "--python", "/nowhere/python"], "/nowhere/python is no Python"),
    ],
)
def test_mistakes_end_in_one_line_and_code_2(
    made: Made, tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(made, tmp_path / "out", *more)) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
