"""ESFT's choice of experts, and the file as its published code reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import planner.importance as importance
import store
from moescope.errors import PlanError
from planner.esft import PUBLISHED, esft, save
from tests.planner.collected import sample


@pytest.fixture(scope="module")
def run() -> Iterator[store.Run]:
    with sample() as opened:
        yield opened


@pytest.mark.parametrize("score", ["token", "gate"])
@pytest.mark.parametrize("share", [None, 0.5, 1.0])
def test_as_few_experts_as_reach_the_share(run: store.Run, score: str, share: float | None) -> None:
    found = esft(run, domain="python", score=score, share=share)  # type: ignore[arg-type]
    assert list(found) == ["experts", "shared_experts", "non_expert_modules"]
    frame = importance.score(run, f"esft_{score}", domain="python")
    wanted = PUBLISHED[score] if share is None else share
    assert list(found["experts"]) == [str(layer.layer) for layer in run.layers]
    for layer, experts in found["experts"].items():
        values = frame.filter(layer=int(layer)).sort("expert")["value"].to_numpy()
        picked = values[experts]
        assert list(picked) == sorted(picked, reverse=True)
        assert picked.sum() >= wanted * (1 - 1e-9) and picked[:-1].sum() < wanted
        assert experts[0] == int(values.argmax())


def test_the_file_is_that_of_the_code(run: store.Run, tmp_path: Path) -> None:
    found = esft(run, shared_experts=True)
    save(found, tmp_path / "expert_cfg.json")
    read = json.loads((tmp_path / "expert_cfg.json").read_text())
    assert read == found and read["shared_experts"] is True and read["non_expert_modules"] is False
    assert all(isinstance(one, int) for experts in read["experts"].values() for one in experts)


def test_what_it_cannot_choose_is_refused(run: store.Run, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="score 'loss' is not known to ESFT: use token or gate"):
        esft(run, score="loss")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"share 0 is outside \(0, 1\]"):
        esft(run, share=0)
    with pytest.raises(PlanError, match="has no domain 'law'"):
        esft(run, domain="law")
    with pytest.raises(PlanError, match="cannot be written"):
        save({}, tmp_path / "nowhere" / "expert_cfg.json")
