"""Findings against the figures behind them, on the Overview and in the terminal."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import synthetic
from visiting import visited

import store
from app import exhibits
from app.cli import main
from app.findings.finding import Evidence, beyond
from app.findings.findings import SCHEMA, SUBJECTS, findings, headlines
from app.markdown import plain
from app.views import PAGES


def test_findings_agree_with_the_tables(run: store.Run) -> None:
    by_subject = {one.subject: one for one in findings(run)}
    load = run.table("expert_load").filter(pl.col("kind") == "routed")
    used = load.group_by("layer", "expert").agg(pl.col("tokens").sum())
    dead = len(synthetic.LAYERS) * synthetic.EXPERTS - len(used)
    assert by_subject["Dead experts"].sentence.startswith(f"{dead} experts were never used")
    assert by_subject["Dead experts"].evidence[0].value == dead
    worst = max(
        counts.max() / (counts.sum() / synthetic.EXPERTS) - 1
        for counts in (used.filter(pl.col("layer") == layer)["tokens"].to_numpy() for layer in synthetic.LAYERS)
    )
    assert by_subject["Balance"].evidence[0].value == pytest.approx(worst, rel=1e-12)
    assert str(synthetic.SUPER_EXPERT) in by_subject["Super experts"].sentence
    assert by_subject["Super experts"].tone == "attention"
    entropies = [(2.0 - 0.2 * depth) / np.log(synthetic.EXPERTS) for depth in range(len(synthetic.LAYERS))]
    assert by_subject["Confidence"].evidence[0].value == pytest.approx(np.mean(entropies), rel=1e-9)
    assert by_subject["Plans"].tone == "unknown"
    named = {proof.exhibit for one in by_subject.values() for proof in one.evidence} - {""}
    assert named <= set(exhibits.entries())
    assert {one.page for one in by_subject.values()} - {""} <= {page.title for page in PAGES}


def test_findings_lead_to_what_they_speak_of(run: store.Run) -> None:
    by_subject = {one.subject: one for one in findings(run)}
    outlier = by_subject["Super experts"]
    assert outlier.answer == f"1 super expert, as (layer, expert): {synthetic.SUPER_EXPERT}"
    assert (outlier.layer, outlier.expert) == (str(synthetic.SUPER_EXPERT[0]), synthetic.SUPER_EXPERT[1])
    assert outlier.evidence[0].value == 820
    effective = []
    worst: tuple[float, str, int] = (0.0, "", 0)
    for layer in synthetic.LAYERS:
        ids = run.selections(layers=[layer]).ids
        counts = np.bincount(ids[ids >= 0], minlength=synthetic.EXPERTS)
        share = counts[counts > 0] / counts.sum()
        effective.append(np.exp(-(share * np.log(share)).sum()) / synthetic.EXPERTS)
        worst = max(worst, (counts.max() / counts.mean(), str(layer), int(counts.argmax())))
    load = by_subject["Balance"]
    assert f"{np.median(effective):.0%} of its experts" in load.answer
    assert (load.layer, load.expert) == worst[1:]
    assert by_subject["Local consistency"].evidence[0].shown == "53.0%"


def test_the_answer_is_no_where_nothing_lies_above_its_control(run: store.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run.metrics

    def as_by_chance(metric: str | None = None) -> pl.DataFrame:
        """Every control as large as what it stands beside."""
        found = whole(metric)
        return found.with_columns(pl.when(pl.col("control") == "observed").then("value").otherwise(1e9).alias("value"))

    monkeypatch.setattr(run, "metrics", as_by_chance)
    by_subject = {one.subject: one for one in findings(run)}
    for subject in ("Local consistency", "Cache"):
        assert by_subject[subject].answer.startswith("No "), subject
    assert beyond(2.0, None, 1.0) and not beyond(2.0, 0.9, 1.0)


def test_headlines_leave_out_what_the_run_cannot_say(run: store.Run, tmp_path: Path) -> None:
    subjects = [subject.name for subject in SUBJECTS if subject.headline]
    shown = [one.subject for one in headlines(run)]
    assert shown == [name for name in subjects if name in shown] and {"Super experts", "Balance"} <= set(shown)
    with store.open_run(synthetic.finished(tmp_path, metrics=False, activations=False)) as little:
        shown = [one.subject for one in headlines(little)]
    assert "Super experts" not in shown and "Balance" in shown
    synthetic.live(tmp_path, shards=0)
    with store.open_run(tmp_path / "growing.live") as growing:
        assert headlines(growing) == []


def test_the_overview_shows_headlines_that_lead_to_their_expert(
    monkeypatch: pytest.MonkeyPatch, finished_path: Path
) -> None:
    def queries(**focus: str) -> set[str]:
        app = visited(monkeypatch, finished_path.parent, **focus)
        return {link.proto.query_string for link in app.get("page_link") if link.proto.label == "Super experts"}

    assert queries() == {"layer=2&expert=5", ""}  # of the finding, and of what to look at next
    assert queries(layer="2", expert="5") == {""}  # what is in the address already is not given twice
    words = " ".join(one.value for one in visited(monkeypatch, finished_path.parent).markdown)
    with store.open_run(finished_path) as run:
        for one in headlines(run):
            assert plain(one.answer, 200) in words and plain(one.evidence[0].line, 300) in words


def test_findings_in_the_terminal(finished_path: Path, run: store.Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(finished_path), "findings", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["finding"] for row in rows] == [one.answer for one in findings(run)]
    assert list(rows[0]) == list(SCHEMA)
    assert main(["show", str(finished_path), "findings"]) == 0
    assert "1 super expert" in capsys.readouterr().out


def test_intervals_and_controls_are_written_alike() -> None:
    one = Evidence("hit rate", 0.4908, 0.4873, 0.4942, 0.257, "shuffled", "share")
    assert (one.shown, one.interval, one.beside) == ("49.1%", "48.7% to 49.4%", "25.7% (shuffled)")
    assert Evidence("none", None).shown == "–" and Evidence("word", "yes").shown == "yes"
    assert one.line == "hit rate: 49.1% (48.7%–49.4%); shuffled: 25.7%"
