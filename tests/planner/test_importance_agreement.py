"""Agreement of the scores of a run, against scipy on the scores themselves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
from scipy import stats

import store
from planner import importance
from planner.importance.agreement import agreement, expert_scores
from tests.app import synthetic


@pytest.fixture
def run(tmp_path: Path) -> Iterator[store.Run]:
    with store.open_run(synthetic.finished(tmp_path, metrics=False)) as opened:
        yield opened


def test_all_scores_that_the_run_can_give(run: store.Run) -> None:
    scores = expert_scores(run)
    assert {"frequency", "gate_mass"} <= set(scores.columns)
    assert len(scores) == len(synthetic.LAYERS) * synthetic.EXPERTS
    own = importance.score(run, "gate_mass").filter(pl.col("kind") == "routed").sort("layer", "step", "expert")
    assert scores["gate_mass"].to_list() == own["value"].to_list()


def test_pairs_are_those_of_scipy(run: store.Run) -> None:
    frame, scores = agreement(run), expert_scores(run)
    names = scores.columns[3:]
    assert len(frame) == (len(synthetic.LAYERS) + 1) * len(names) * (len(names) - 1) // 2
    row = frame.filter((pl.col("layer") == 2) & (pl.col("first") == names[0]) & (pl.col("second") == names[1]))
    part = scores.filter(pl.col("layer") == 2)
    first, second = part[names[0]].to_numpy(), part[names[1]].to_numpy()
    assert row["spearman"][0] == pytest.approx(stats.spearmanr(first, second).statistic)
    assert row["kendall"][0] == pytest.approx(stats.kendalltau(first, second).statistic)
    of_pair = frame.filter((pl.col("first") == names[0]) & (pl.col("second") == names[1]))
    mean = of_pair.filter(pl.col("layer").is_not_null())["spearman"].mean()
    assert of_pair.filter(pl.col("layer").is_null())["spearman"][0] == pytest.approx(mean)
