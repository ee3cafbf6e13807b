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
    assert "reap" in scores.columns and "heapr" not in scores.columns  # of neurons, and not recorded
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


def test_bounds_are_those_of_random_rankings(run: store.Run) -> None:
    frame = agreement(run)
    # Spearman's rho of random rankings of n has variance 1 / (n - 1): 15 for a layer, 4 x 15 for their mean.
    for rows, freedom in ((frame.filter(pl.col("layer") == 2), 15), (frame.filter(pl.col("layer").is_null()), 60)):
        assert rows["low"][0] == pytest.approx(-1.96 / freedom**0.5, abs=0.07)
        assert rows["high"][0] == pytest.approx(1.96 / freedom**0.5, abs=0.07)
    same = frame.filter(pl.col("first").is_in(["dern", "gate_mass"]) & (pl.col("second") == "esft_gate"))
    assert same["spearman"].to_list() == pytest.approx([1.0] * len(same))  # both divide gate weights by a constant


def test_one_domain_and_what_is_not_a_number(run: store.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not agreement(run, domain="code").equals(agreement(run))
    broken = expert_scores(run).with_columns(
        gate_mass=pl.when((pl.col("layer") == 2) & (pl.col("expert") == 3)).then(float("nan")).otherwise("gate_mass")
    )
    monkeypatch.setattr("planner.importance.agreement.expert_scores", lambda run, domain: broken)
    frame = agreement(run).filter((pl.col("first") == "frequency") & (pl.col("second") == "gate_mass"))
    values = dict(frame.select("layer", "spearman").iter_rows())
    assert values[2] is None and frame.filter(pl.col("layer") == 2)["overlap_25"].to_list() == [None]
    assert values[None] == pytest.approx((values[1] + values[3] + values[5]) / 3)


def test_one_score_alone_has_nothing_to_agree_with(run: store.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    only = expert_scores(run).select("layer", "step", "expert", "frequency")
    monkeypatch.setattr("planner.importance.agreement.expert_scores", lambda run, domain: only)
    assert agreement(run).is_empty()
