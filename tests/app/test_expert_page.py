"""The page Expert, its frames and ``moescope show RUN expert``, against counting in the trace."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import synthetic
from streamlit.testing.v1 import AppTest
from visiting import open_section, visited

import store
from app.cli import main
from app.figures import expert as figures
from app.frames import expert as frames
from app.frames import expert_cache, expert_tokens, expert_trace
from profiler.headline import compute_and_store
from profiler.importers.job import import_run
from profiler.importers.recording import ImportOptions
from sample_data import RUN

LAYER, EXPERT = "2", 5
AXIS = synthetic.LAYERS.index(int(LAYER))
WHERE: dict[str, Any] = {"label": LAYER, "expert": EXPERT}


@pytest.fixture(scope="module")
def counted(run: store.Run) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Whether each token uses the expert, its gate weight and its id, (sequences, tokens) each; domains."""
    trace = run.selections(layers=[int(LAYER)])
    hit = trace.ids[0] == EXPERT
    texts = [run.sequence_text(int(number)) for number in trace.sequences]
    ids = np.array([text.token_ids for text in texts if text is not None])
    return hit.any(axis=-1), (trace.weights[0] * hit).sum(axis=-1), ids, trace.domains


def visit(monkeypatch: pytest.MonkeyPatch, directory: Path, page: str = "expert", **parameters: str) -> AppTest:
    return visited(monkeypatch, directory, page, **parameters)


def words(app: AppTest) -> str:
    kinds = (app.markdown, app.info, app.warning, app.error, app.caption, app.subheader, app.code)
    return "\n".join(str(element.value) for kind in kinds for element in kind)


def plain(app: AppTest) -> str:
    return words(app).replace("\\", "")


def test_domains_are_those_of_the_trace(run: store.Run, counted: Any) -> None:
    hit, _, _, domains = counted
    frame = frames.domain_load(run, **WHERE)
    assert frame["share"].is_sorted(descending=True)
    for row in frame.iter_rows(named=True):
        mine = hit[[index for index, name in enumerate(domains) if name == row["domain"]]]
        counts, size = mine.sum(axis=1), mine.shape[1]
        assert (row["selections"], row["tokens"], row["sequences"]) == (mine.sum(), mine.size, len(mine))
        assert row["share"] == pytest.approx(mine.mean())
        error = (counts / size).std(ddof=1) / np.sqrt(len(mine))  # sequences of one length: the error of a plain mean
        assert row["high"] - row["share"] == pytest.approx(1.96 * error)
        assert row["ratio"] == pytest.approx(mine.mean() / hit.mean())
    assert frame["even"][0] == synthetic.TOP_K / synthetic.EXPERTS


@pytest.mark.parametrize("kind", ["input", "next"])
@pytest.mark.parametrize("by", ["count", "lift"])
def test_top_tokens_are_counted(run: store.Run, counted: Any, kind: Any, by: Any) -> None:
    hit, _, ids, _ = counted
    if kind == "next":
        hit, ids = hit[:, :-1], ids[:, 1:]
    frame = expert_tokens.top_tokens(run, **WHERE, tokens=kind, by=by)
    for row in frame.iter_rows(named=True):
        mine = ids == row["token_id"]
        assert row["occurrences"] == mine.sum()
        assert row["selections"] == (mine & hit).sum()
        assert row["lift"] == pytest.approx(hit[mine].mean() / hit.mean())
        assert row["low"] < row["share"] < row["high"]
    assert frame["low" if by == "lift" else "selections"].is_sorted(descending=True)
    if by == "lift":
        assert (frame["occurrences"] >= expert_tokens.MIN_OCCURRENCES).all()
    else:
        assert len(frame) == len(np.unique(ids[hit]))


def test_wilson_interval_by_hand() -> None:
    low, high = expert_tokens._wilson(np.array([8.0]), np.array([10.0]))
    assert (low[0], high[0]) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # Wilson 1927, z = 1.96


def test_contexts_stand_where_the_expert_does(run: store.Run, counted: Any) -> None:
    hit, weights, ids, domains = counted
    frame = expert_tokens.contexts(run, **WHERE)
    assert frame["weight"][0] == pytest.approx(weights.max())
    assert frame["sequence"].is_unique().all()
    assert frame["weight"].to_list() == pytest.approx(sorted(weights.max(axis=1), reverse=True)[: len(frame)])
    drawn = expert_tokens.contexts(run, **WHERE, by="random", count=40)
    assert len(drawn) == 40
    for row in [*frame.iter_rows(named=True), *drawn.iter_rows(named=True)]:
        sequence, position = row["sequence"], row["position"]
        assert hit[sequence, position] and domains[sequence] == row["domain"]
        text = run.sequence_text(sequence)
        assert text is not None
        assert row["text"] == expert_tokens.shown(text.pieces[position])
        after = b"".join(text.pieces[position + 1 : position + 1 + expert_tokens.AFTER])
        assert row["after"] == after.decode(errors="replace").replace("\n", "⏎") or "�" in row["after"] + "…"


def test_tokens_show_what_is_in_them() -> None:
    assert expert_tokens.shown(b" a b\n") == "␣a b⏎"
    assert expert_tokens.shown("本".encode()[:2]) == "E6 9C"
    assert expert_tokens.shown(None) == ""


def test_long_traces_are_read_in_part(run: store.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_trace, "STRETCH_TOKENS", 2 * synthetic.TOKENS)
    whole = frames.domain_load(run, **WHERE)
    monkeypatch.setattr(expert_trace, "MAX_STRETCHES", 2)
    part = frames.domain_load(run, **WHERE)
    assert whole["tokens"].sum() == 9 * synthetic.TOKENS
    assert part["tokens"].sum() == 3 * synthetic.TOKENS  # the first two sequences, and the last one


def test_partners_are_counted_in_the_trace(run: store.Run) -> None:
    ids = run.selections(layers=[int(LAYER)]).ids[0].reshape(-1, synthetic.TOP_K)
    mine = (ids == EXPERT).any(axis=1)
    frame = frames.partners(run, **WHERE)
    others = np.array([(ids == other).sum() for other in range(synthetic.EXPERTS)])
    for row in frame.iter_rows(named=True):
        joint = (ids[mine] == row["other"]).any(axis=1).sum()
        assert row["joint_tokens"] == joint
        assert row["given"] == pytest.approx(joint / mine.sum())
        if others[row["other"]]:
            expected = others[row["other"]] / (others.sum() - others[EXPERT])  # k - 1 = 1
            assert row["lift"] == pytest.approx(joint / mine.sum() / expected)
    assert EXPERT not in frame["other"].to_list()
    assert frame["given"].sum() == pytest.approx(1.0)
    assert "router_row" in frame.columns


def test_importance_outliers_and_figures(run: store.Run) -> None:
    importance = frames.importance_of(run, **WHERE)
    load = run.table("expert_load").filter((pl.col("layer") == 2) & (pl.col("kind") == "routed"))
    tokens = load.group_by("expert").agg(pl.col("tokens").sum()).sort("tokens", descending=True)
    frequency = importance.filter(pl.col("score") == "frequency").row(0, named=True)
    assert frequency["rank"] == tokens["expert"].to_list().index(EXPERT) + 1
    assert frequency["of"] == synthetic.EXPERTS
    assert {"reap", "output_max"} <= set(importance["score"])
    outlier = frames.outliers(run, label="2", expert=synthetic.SUPER_EXPERT[1]).row(0, named=True)
    assert (outlier["rank"], outlier["layer_rank"], outlier["paper"]) == (1, 1, True)
    found = frames.figures(run, **WHERE)
    share = found.filter(pl.col("figure") == "share of tokens").row(0, named=True)
    mine = tokens.filter(pl.col("expert") == EXPERT)["tokens"][0]
    assert share["value"] == pytest.approx(mine / share["tokens"])
    assert share["chance"] == pytest.approx(share["beside"]) == synthetic.TOP_K / synthetic.EXPERTS
    assert "SRP at segments of 16" in found["figure"].to_list()


def test_specialization_stands_among_the_figures(tmp_path: Path) -> None:
    path = synthetic.finished(tmp_path, metrics=False, sequences=24)
    compute_and_store(path)
    with store.open_run(path) as run:
        found = {row["figure"]: row for row in frames.figures(run, **WHERE).iter_rows(named=True)}
    variation = found["variation over domains"]
    assert variation["low"] < variation["value"] < variation["high"]
    assert variation["chance"] < variation["beside"]  # the domains of the synthetic run differ


def titles(app: AppTest) -> list[str]:
    return [json.loads(chart.proto.spec)["layout"]["title"]["text"] for chart in app.get("plotly_chart")]


def test_the_page_shows_one_expert_section_by_section(monkeypatch: pytest.MonkeyPatch, finished_path: Path) -> None:
    app = visit(monkeypatch, finished_path.parent, layer=LAYER, expert=str(EXPERT))
    strip = "Experts of layer 2, by their load"
    assert titles(app) == [strip, "Share of each domain's tokens, layer 2, expert 5"]
    assert "a super expert by the paper's rule" in words(app)
    assert "720 tokens, 9 sequences" in words(app)
    shown = {
        "Tokens": [],
        "Neighbours": [],
        "Importance": ["Place in the layer by every score of importance, layer 2, expert 5"],
        "Fewer bits": [],
        "Cache": [
            "Hits in an LRU cache of layer 2, expert 5",
            "How soon it is used again, layer 2, expert 5",
            "Local consistency (SRP), layer 2, expert 5",
        ],
    }
    for name, charts in shown.items():
        open_section(app, name)
        assert titles(app) == [strip, *charts], name
        if name == "Tokens":
            assert "level `predictions`" in words(app)
            app.session_state["expert"] = str(synthetic.EXPERTS - 1)  # never used
            app.run()
            assert "No token id occurs often enough" in words(app)
            app.session_state["expert"] = str(EXPERT)
        if name == "Fewer bits":
            assert "What narrower weights do to each expert needs the level errors" in plain(app)
        if name == "Cache":
            assert "tokens in a row" in words(app)


def test_any_expert_is_near(monkeypatch: pytest.MonkeyPatch, finished_path: Path, run: store.Run) -> None:
    app = visit(monkeypatch, finished_path.parent, layer=LAYER, expert="0")
    app.button(key="pick-previous").click().run()
    assert app.session_state["expert"] == str(synthetic.EXPERTS - 1)
    app.button(key="pick-next").click().run()
    assert app.session_state["expert"] == "0"
    load = run.table("expert_load").filter((pl.col("layer") == 2) & (pl.col("kind") == "routed"))
    top = load.group_by("expert").agg(pl.col("tokens").sum()).sort("tokens").row(-1)[0]
    app.button(key="pick-most-used").click().run()
    assert (app.session_state["layer"], app.session_state["expert"]) == (LAYER, str(top))
    app.button(key="pick-super-expert").click().run()
    assert app.session_state["expert"] == str(synthetic.SUPER_EXPERT[1])
    assert "a super expert by the paper's rule" in words(app)
    bars = json.loads(app.get("plotly_chart")[0].proto.spec)
    assert bars["layout"]["meta"]["pick"] == {"layer": "=2", "expert": "x"}
    assert [button.key for button in app.button if "important" in button.key]  # by a score that the run has


@pytest.mark.parametrize("expert", ["16", "-1", "1e3", "<b>"])
def test_an_expert_that_is_none_falls_back(monkeypatch: pytest.MonkeyPatch, finished_path: Path, expert: str) -> None:
    app = visit(monkeypatch, finished_path.parent, expert=expert, layer="77")
    assert titles(app)[1] == "Share of each domain's tokens, layer 1, expert 0"


def test_without_text_the_tokens_are_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    synthetic.finished(tmp_path, text=False, activations=False)
    app = visit(monkeypatch, tmp_path, section="Tokens")
    assert "Collect without --no-text" in plain(app)
    assert "--level routing,activations" in words(open_section(app, "Importance"))


def test_imported_counts_say_what_cannot_be_computed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines = [f"{layer},{expert}" for layer in range(2) for expert in [0] * 20 + [1] * 15 + [2] * 5]
    (tmp_path / "counts.csv").write_text("layer,expert\n" + "\n".join(lines))
    options = ImportOptions(num_experts=4, top_k=2)
    path = import_run("csv", tmp_path / "counts.csv", directory=tmp_path / "runs", name="counts", options=options)
    app = visit(monkeypatch, tmp_path / "runs")
    reasons = {
        "Summary": "What the expert puts out cannot be computed",
        "Tokens": "The tokens of an expert cannot be computed from what was imported",
        "Neighbours": "Which experts are used together or alike cannot be computed",
        "Cache": "How often a cache holds an expert cannot be computed",
    }
    for name, reason in reasons.items():
        assert reason in words(open_section(app, name)), name
    with store.open_run(path) as run:
        domains = frames.domain_load(run, label="0", expert=0)
        assert domains.select("selections", "tokens", "share", "low").rows() == [(20, 20, 1.0, None)]
        assert frames.figures(run, label="0", expert=0)["figure"].to_list() == ["share of tokens"]


def test_show_prints_what_the_page_draws(finished_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["show", str(finished_path), "expert", "--layer", LAYER, "--expert", str(EXPERT)]
    assert main([*command, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    with store.open_run(finished_path) as run:
        assert answer["neighbours"] == frames.partners(run, **WHERE).to_dicts()
        assert answer["domains"] == frames.domain_load(run, **WHERE).to_dicts()
    assert {"figures", "tokens, input, most often", "contexts", "importance", "outliers"} <= set(answer)
    assert main(command) == 0
    assert "first choice among its tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layer", "4", "--expert", "0"], "layer 4 is no MoE layer of run 'synthetic': it has 1 to 3, 5"),
        (["--layer", "1", "--expert", "16"], "layer 1 of run 'synthetic' has no expert 16: its experts are 0 to 15"),
        (["--layer", "1", "--expert", "-1"], "its experts are 0 to 15"),
        (["--layer", "1"], "takes --layer L and --expert E"),
        ([], "takes --layer L and --expert E"),
    ],
)
def test_show_names_the_valid_ranges(
    options: list[str], message: str, finished_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", str(finished_path), "expert", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_figures_draw_what_the_frames_hold(theme: Any, run: store.Run) -> None:
    frame = frames.domain_load(run, **WHERE)
    bars = figures.domain_shares(frame, title="x", theme=theme).data[0]
    assert list(bars.x) == frame["share"].to_list()[::-1]
    assert list(bars.error_x.array) == pytest.approx((frame["high"] - frame["share"]).to_list()[::-1])
    importance = frames.importance_of(run, **WHERE)
    dots = figures.importance_ranks(importance, title="x", theme=theme).data[0]
    assert list(dots.x) == importance["rank"].to_list()[::-1]
    assert "Nothing was counted" in figures.domain_shares(frame.clear(), title="x").layout.annotations[0].text
    assert "no score" in figures.importance_ranks(importance.clear(), title="x").layout.annotations[0].text


def test_errors_by_width_and_scores_stand_on_the_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copyfile(RUN, tmp_path / "sample.duckdb")
    app = visit(monkeypatch, tmp_path, layer="2", expert="5", section="Fewer bits")
    assert titles(app)[-1] == "Change of its output by width, layer 2, expert 5"
    table = next(one.value for one in app.dataframe if "median" in one.value.columns)
    assert table["width"].to_list() == ["1", "ternary", "2", "3", "4", "8"]
    open_section(app, "Importance")
    scores = next(one.value for one in app.dataframe if {"title", "rank"} <= set(one.value.columns))
    assert scores["rank"].between(1, 16).all()


def test_reuse_and_bursts_are_counted(run: store.Run, counted: Any) -> None:
    hit = counted[0]
    for row in expert_cache.reuse(run, **WHERE).iter_rows(named=True):
        gap, length = row["tokens"], hit.shape[1]
        uses = [(s, t) for s, t in zip(*np.nonzero(hit), strict=True) if t + gap < length]
        again = [hit[s, t + 1 : t + 1 + gap].any() for s, t in uses]
        assert (row["uses"], row["share"]) == (len(uses), pytest.approx(np.mean(again)))
        assert row["shuffled"] == pytest.approx(1 - (1 - hit.mean()) ** gap)
    found = expert_cache.bursts(run, **WHERE).row(0, named=True)
    runs = [len(part) for line in hit for part in "".join("x" if one else " " for one in line).split()]
    assert (found["bursts"], found["longest"]) == (len(runs), max(runs))
    assert found["mean"] == pytest.approx(np.mean(runs))


def test_the_order_of_a_sequence_is_shuffled_exactly() -> None:
    for uses, length, gap in ((3, 7, 2), (2, 5, 3), (1, 6, 2), (5, 5, 1)):
        orders = list(itertools.combinations(range(length), uses))
        pairs = [(at, order) for order in orders for at in order if at + gap < length]
        share = np.mean([any(at < other <= at + gap for other in order) for at, order in pairs])
        assert expert_cache._again(uses, length, gap) == pytest.approx(share), (uses, length, gap)


def test_hit_rates_are_those_of_a_plain_cache(run: store.Run) -> None:
    ids = run.selections(layers=[int(LAYER)]).ids[0]
    found = expert_cache.hit_rates(expert_cache.depths(run, label=LAYER), expert=EXPERT, experts=synthetic.EXPERTS)
    for slots in (synthetic.TOP_K, 5, synthetic.EXPERTS):
        hits = mine = 0
        for sequence in ids:
            cache: list[int] = []  # the one used longest ago stands first
            for token in sequence.tolist():
                hits += EXPERT in token and EXPERT in cache
                mine += EXPERT in token
                cache = [expert for expert in cache if expert not in token] + token
                cache = cache[-slots:]
        row = found.filter(pl.col("slots") == slots).row(0, named=True)
        assert (row["uses"], row["value"]) == (mine, pytest.approx(hits / mine)), slots
    assert expert_cache.hit_rates(
        expert_cache.depths(run, label=LAYER), expert=synthetic.EXPERTS - 1, experts=synthetic.EXPERTS
    ).is_empty()
