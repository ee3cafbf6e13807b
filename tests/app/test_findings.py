"""Findings against the figures behind them, on the Overview and in the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import synthetic
from visiting import visited

import store
from app import exhibits
from app.cli import main
from app.exhibits import fresh
from app.findings import about_documents, about_experts, about_routing
from app.findings.finding import Evidence, beyond
from app.findings.findings import SCHEMA, SUBJECTS, findings, headlines
from app.frames import confidence as frames_of_confidence
from app.frames import consistency, load
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


def given(frame: pl.DataFrame) -> Any:
    """Frames that are all this one."""

    def frames(maker: Any, of: store.Run, /, **arguments: Any) -> Any:
        return frame

    return frames


def test_words_follow_the_numbers(run: store.Run) -> None:
    even = load.balance(run)

    def said(frame: pl.DataFrame) -> str:
        return about_routing.dead(run, given(frame))[0].sentence

    one = even.with_columns(dead=pl.Series([1, 0, 0, 0]), nearly_dead=pl.Series([1, 0, 0, 0]))
    blamed = said(one.with_columns(expected_dead=pl.lit(0.0)))
    assert blamed.startswith("1 expert was never used on 720 tokens (layer 1), which chance does not explain. ")
    assert blamed.endswith("1 more expert gets less than 5% of the balanced load.")
    explained = said(one.with_columns(expected_dead=pl.lit(7.5)))
    assert "1 expert was never used" in explained and "a balanced one leaves 30 unused by chance" in explained
    none = said(even.with_columns(dead=pl.lit(0), nearly_dead=pl.Series([3, 0, 0, 0]), expected_dead=pl.lit(0.0)))
    assert none.startswith("No expert is dead") and none.endswith("3 experts get less than 5% of the balanced load.")


def test_one_layer_is_no_range_of_layers(run: store.Run) -> None:
    found = frames_of_confidence.confidence(run).filter(pl.col("label") == "1")
    part = found.filter(pl.col("quantity") == "entropy")["mean"][0] / np.log(synthetic.EXPERTS)
    sentence = about_routing.confidence(run, given(found))[0].sentence
    assert f"Its entropy is {part:.0%} of the largest possible." in sentence and "goes from" not in sentence
    assert about_routing.confidence(run, given(found.with_columns(num_experts=1)))[0].tone == "unknown"


def test_foresight_without_an_interval_is_judged_by_its_value(run: store.Run) -> None:
    row = {"layer": None, "extra": 0, "control": "observed", "distance": 1.0, "low": None, "high": None, "chance": 0.1}
    rows = [{**row, "predictor": "transition", "value": 0.6}, {**row, "predictor": "popularity", "value": 0.3}]
    frame = pl.DataFrame(rows, schema_overrides={"layer": pl.Int32, "low": pl.Float64, "high": pl.Float64})
    assert about_routing.foresight(run, given(frame))[0].answer.startswith("One layer's choices foretell 60%")
    flat = frame.with_columns(value=pl.lit(0.3))
    assert about_routing.foresight(run, given(flat))[0].answer.startswith("No foresight")


def test_cuts_by_lot_have_in_common_what_the_layers_size_gives(tmp_path: Path) -> None:
    with store.open_run(synthetic.finished(tmp_path)) as run:
        (found,) = about_experts.importance(run, fresh)
        rng = np.random.default_rng(0)
        cut = synthetic.EXPERTS // 4
        drawn = [len({*rng.permutation(synthetic.EXPERTS)[:cut]} & set(range(cut))) / cut for _ in range(4000)]
        assert found.evidence[0].control == pytest.approx(np.mean(drawn), abs=0.02)


def test_a_cache_of_another_size_is_called_so(run: store.Run) -> None:
    numbers = consistency.key_numbers(run)
    assert numbers["ratio"].to_list() == [None, 2.125, 2.125, 2.125]
    other = numbers.with_columns(ratio=pl.lit(1.25), control=pl.lit(0.0))
    assert about_routing.cache(run, given(other))[0].answer.startswith("A cache of 1.25 times a token's")
    rates = consistency.key_numbers(run, ratio=2.3)
    shared = consistency.hit_rates(run).filter(pl.col("scope") == "shared")["ratio"].unique().to_list()
    assert rates["ratio"][1] == min(shared, key=lambda one: abs(one - 2.3))
    assert f"{rates['ratio'][1]:.3g} ×" in rates["detail"][1]


def test_a_plan_that_is_written_later_is_told_of(tmp_path: Path) -> None:
    known: dict[object, Any] = {}

    def kept(maker: Any, of: store.Run, /, **arguments: Any) -> Any:
        """As a page keeps frames: by the version of the run."""
        key = (maker, of.version, tuple(sorted(arguments.items())))
        return known.setdefault(key, maker(of, **arguments)) if key not in known else known[key]

    with store.open_run(synthetic.finished(tmp_path)) as run:
        assert about_documents.plans(run, kept)[0].tone == "unknown"
        assert main(["plan", str(run.path), "--preset", "frequency", "--share", "0.25"]) == 0
        (told,) = about_documents.plans(run, kept)
        assert "keeps 48 of 64 experts" in told.answer and told.page == "Compress"


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
