"""Flow on the page Routing: its frames, figures and section, and what runs that lack it say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import synthetic
from numpy.typing import NDArray
from streamlit.testing.v1 import AppTest
from visiting import visited

import store
from app.commands.show import view
from app.figures import flow as figures
from app.frames import flow as frames
from app.frames import stretches
from profiler.headline import compute_and_store
from profiler.importers.job import import_run
from profiler.importers.recording import ImportOptions

SEQUENCES, EXPERTS, TOP_K, TOKENS = 12, synthetic.EXPERTS, synthetic.TOP_K, synthetic.TOKENS
AXIS = {str(layer): axis for axis, layer in enumerate(synthetic.LAYERS)}


def lookahead_table() -> pl.DataFrame:
    """Layers 2 and 3 from one and two before; half of the choices at first, all with eight more experts."""
    rows = []
    for layer, distance, source in ((2, 1, "router"), (2, 1, "residual"), (3, 1, "router"), (3, 2, "router")):
        for domain, first, share in (("code", False, 0.5), ("deutsch", False, 0.7), ("code", True, 0.0)):
            hits = [int(200 * min(1.0, share + extra / 10)) for extra in range(9)]
            rows.append(
                {"layer": layer, "step": 0, "distance": distance, "input": source, "domain": domain, "phase": "prompt",
                 "first": first, "tokens": 100, "selections": 200, "hits": hits,
                 "exact": [hit // 4 for hit in hits], "first_hits": 60, "cosine_sum": 80.0}
            )  # fmt: skip
    return pl.DataFrame(rows)


def write(folder: Path, *, leave_out: tuple[str, ...] = (), metrics: bool = True, **more: pl.DataFrame) -> Path:
    writer = store.RunWriter.create(folder, "flow", synthetic.info(sequences=SEQUENCES))
    shard = {**synthetic.tables(SEQUENCES), "lookahead": lookahead_table(), **more}
    writer.write_shard({name: frame for name, frame in shard.items() if name not in leave_out})
    path = writer.finish()
    if metrics:
        compute_and_store(path)
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its own metrics. Do not change it."""
    return write(tmp_path_factory.mktemp("flow"))


@pytest.fixture(scope="module")
def flow(path: Path) -> Iterator[store.Run]:
    with store.open_run(path) as opened:
        yield opened


def used(label: str, domain: str | None = None) -> NDArray[np.int64]:
    """(tokens, experts) 0/1 of one layer, of one domain or of all text."""
    ids = synthetic.selections(SEQUENCES)[0][AXIS[label]]
    mine = [domain in (None, synthetic.DOMAINS[number % 3]) for number in range(SEQUENCES)]
    return np.eye(EXPERTS, dtype=np.int64)[ids[mine].reshape(-1, TOP_K)].sum(axis=1)


def as_matrix(frame: pl.DataFrame, name: str) -> NDArray[np.float64]:
    matrix = np.full((EXPERTS, EXPERTS), np.nan)
    matrix[frame["expert"], frame["other"]] = frame[name].cast(pl.Float64).fill_null(np.nan)
    return matrix


@pytest.mark.parametrize("domain", [None, "deutsch"])
def test_pairs_are_those_of_the_trace(flow: store.Run, domain: str | None) -> None:
    frame = frames.pairs(flow, label="3", domain=domain)
    hot = used("3", domain)
    expected = (hot.T @ hot).astype(float)
    load = np.diag(expected).copy()
    np.fill_diagonal(expected, np.nan)
    np.testing.assert_array_equal(as_matrix(frame, "joint_tokens"), expected)
    with np.errstate(invalid="ignore", divide="ignore"):
        given, lift = expected / load[:, None], expected * len(hot) / np.outer(load, load)
        np.testing.assert_allclose(as_matrix(frame, "co_activation"), given)
        np.testing.assert_allclose(as_matrix(frame, "lift"), lift)
        np.testing.assert_allclose(as_matrix(frame, "jaccard"), expected / (load[:, None] + load - expected))
        np.testing.assert_allclose(as_matrix(frame, "pointwise_information"), np.log2(lift))
    assert set(frame["tokens"]) == {len(hot)}
    assert sorted(frame.unique("expert")["place"]) == list(range(EXPERTS))
    assert frame.select("expert", "place").unique().height == EXPERTS


def test_recorded_pairs_count_before_the_trace(tmp_path: Path) -> None:
    recorded = pl.concat(
        pl.DataFrame({"expert": range(EXPERTS), "selections": np.full((EXPERTS, EXPERTS), 7).tolist()}).with_columns(
            layer=pl.lit(layer), step=pl.lit(0), domain=pl.lit(""), phase=pl.lit("prompt")
        )
        for layer in synthetic.LAYERS
    )
    with store.open_run(write(tmp_path, metrics=False, expert_pair=recorded)) as run:
        assert set(frames.pairs(run, label="2")["joint_tokens"]) == {7}
        assert frames.pairs(run, label="2", domain="code")["joint_tokens"].max() != 7


def test_transitions_are_those_of_the_trace(flow: store.Run) -> None:
    frame = frames.transitions(flow, label="5", source="2")
    expected = used("2").T @ used("5")
    np.testing.assert_array_equal(as_matrix(frame, "joint_tokens"), expected)
    shares = as_matrix(frame, "share")
    np.testing.assert_allclose(shares[:-1].sum(axis=1), 1)
    assert np.isnan(shares[-1]).all()  # the last expert is never used
    outer = np.outer(expected.sum(axis=1), expected.sum(axis=0))
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(as_matrix(frame, "lift"), expected * expected.sum() / outer)
    assert (frame["place"] == frame["expert"]).all()
    assert sorted(frame.unique("other")["other_place"]) == list(range(EXPERTS))
    code = frames.transitions(flow, label="5", source="2", domain="code")
    np.testing.assert_array_equal(as_matrix(code, "joint_tokens"), used("2", "code").T @ used("5", "code"))
    assert frames.sources(flow, "5") == ["3", "2", "1"]
    assert frames.sources(flow, "1") == []


def test_of_a_long_trace_some_stretches_are_counted(flow: store.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stretches, "STRETCH_TOKENS", 2 * TOKENS)
    whole = frames.transitions(flow, label="3", source="2")
    np.testing.assert_array_equal(as_matrix(whole, "joint_tokens"), used("2").T @ used("3"))
    monkeypatch.setattr(stretches, "MAX_STRETCHES", 2)
    some = frames.transitions(flow, label="3", source="2")
    assert set(some["tokens"]) == {4 * TOKENS}
    assert some["joint_tokens"].sum() == 4 * TOKENS * TOP_K**2


def test_what_can_be_foreseen_stands_beside_chance(flow: store.Run) -> None:
    frame = frames.predictability(flow)
    row = frame.filter(label="3", predictor="transition", distance=1, control="observed", extra=2).row(0, named=True)
    stored = flow.metrics("transition_recall").filter(layer=3, control="observed", at=2.0, parameters='{"distance": 1}')
    assert row["value"] == stored["value"][0]
    assert (row["fetched"], row["chance"]) == (TOP_K + 2, (TOP_K + 2) / EXPERTS)
    assert row["low"] < row["value"] < row["high"]
    assert (row["tokens"], row["sequences"]) == (SEQUENCES * TOKENS, SEQUENCES)
    whole = frame.filter(label="all", predictor="popularity", extra=0).row(0, named=True)
    assert whole["chance"] == pytest.approx(TOP_K / EXPERTS)
    before = frame.filter(predictor="previous")
    overlap = flow.metrics("mean_overlap").filter(control="observed", at=1.0).sort("layer")
    assert before["value"].to_list() == overlap["value"].to_list()
    assert set(before["extra"]) == {0} and before["label"].to_list() == list(AXIS)
    bits = frames.information(flow).filter(distance=1)
    assert bits.group_by("label").len()["len"].to_list() == [3, 3, 3]
    seen, noise = (bits.filter(control=control)["bits"] for control in ("observed", "shuffled"))
    assert (seen > noise).all()  # domains prefer experts of their own in every layer


def test_co_activation_of_every_layer(flow: store.Run) -> None:
    frame = frames.co_activations(flow)
    assert frame["label"].to_list() == list(AXIS)
    assert frame["pairs"].to_list() == [SEQUENCES * TOKENS] * 4  # one pair a token
    assert (frame["noise_low"] < frame["noise"]).all() and (frame["noise"] < frame["noise_high"]).all()
    row = frame.row(2, named=True)
    pair = frames.pairs(flow, label="3").filter(expert=row["expert"], other=row["other"]).row(0, named=True)
    assert (pair["joint_tokens"], pair["attraction"]) == (row["joint_tokens"], row["attraction"])
    assert pair["expected"] >= 10
    assert row["chance"] == pytest.approx((TOP_K - 1) / (EXPERTS - 1))


def test_lookahead_is_kept_by_domain(flow: store.Run) -> None:
    frame = frames.lookaheads(flow)
    row = frame.filter(label="2", distance=1, input="router", extra=0).row(0, named=True)
    assert (row["value"], row["first_choice"], row["cosine"], row["tokens"]) == (0.6, 0.6, 0.8, 200)
    assert row["chance"] == TOP_K / EXPERTS
    code = frames.lookaheads(flow, domain="code").filter(label="3", distance=2, extra=1).row(0, named=True)
    assert (code["value"], code["exact"], code["tokens"]) == (0.6, 0.3, 100)
    assert frame["fetched"].max() == TOP_K + 8


def visit(
    monkeypatch: pytest.MonkeyPatch, directory: Path, section: str = "Next layer", **parameters: str
) -> tuple[AppTest, str]:
    app = visited(monkeypatch, directory, "routing", section=section, **parameters)
    return app, words(app)


def words(app: AppTest) -> str:
    assert not app.exception, app.exception[0].message
    kinds = (app.markdown, app.info, app.caption, app.code, app.error)
    return "\n".join(str(element.value) for kind in kinds for element in kind).replace("\\", "")


def titles(app: AppTest) -> list[str]:
    return [json.loads(chart.proto.spec)["layout"]["title"]["text"] for chart in app.get("plotly_chart")]


def test_the_sections_follow_the_address(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    app, text = visit(monkeypatch, path.parent, "Pairs", layer="3", pairs="Jaccard index")
    assert titles(app) == ["Jaccard index, layer 3", "Pairs of experts beyond popularity"]
    assert "as often as their popularity explains" in text
    app, text = visit(monkeypatch, path.parent, layer="3", **{"from": "1", "fetched": "k + 2 experts"})
    assert titles(app) == [
        "From layer 1 to layer 3",
        "What the experts of the layer before say",
        "Experts foreseen one layer ahead",
        "Layer 3, by experts fetched",
    ]
    assert "Of the next layer's choices, k fetched experts hold" in text
    assert f"{SEQUENCES * TOKENS:,} tokens of {SEQUENCES} sequences; 95 % intervals over sequences" in text
    assert "12.5% by chance" in text
    app.selectbox(key="layer").select("5").run()
    assert "From layer 1 to layer 5" in titles(app)
    app.selectbox(key="layer").select("1").run()
    assert "Layer 1 is the first MoE layer" in words(app)


def test_one_domain_is_counted_alone(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    for section in ("Pairs", "Next layer"):
        _, text = visit(monkeypatch, path.parent, section, domain="deutsch")
        assert f"{SEQUENCES // 3 * TOKENS:,} tokens of deutsch." in text


def test_what_a_run_lacks_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write(tmp_path / "early", leave_out=("lookahead",), metrics=False)
    app, text = visit(monkeypatch, tmp_path / "early")
    assert "needs the level lookahead" in text
    assert "How far experts can be foreseen has not been computed" in text
    assert "From layer 1 to layer 2" in titles(app)  # counted in the trace
    app, text = visit(monkeypatch, tmp_path / "early", "Pairs")
    assert titles(app) == ["Attraction, layer 1"]
    synthetic.live(tmp_path / "live", shards=1)
    app, text = visit(monkeypatch, tmp_path / "live", "Pairs")
    assert titles(app) == ["Attraction, layer 1"]
    app, text = visit(monkeypatch, tmp_path / "live")
    assert "computed from the whole trace when the collection ends" in text


def test_imports_say_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ids = np.argsort(np.random.default_rng(0).random((360, 3, 8)), axis=-1)[..., :2].astype(np.uint8)
    np.savez(tmp_path / "bare.npz", experts=ids, offsets=np.arange(0, 361, 60), num_experts=np.int64(8))
    import_run("npz", tmp_path / "bare.npz", directory=tmp_path / "trace", name="bare")
    app, text = visit(monkeypatch, tmp_path / "trace")
    assert "From layer 0 to layer 1" in titles(app)
    assert "What routers foresee when they are run early cannot be computed from what was imported" in text
    rows = "\n".join(f"{layer},{expert}" for layer in range(3) for expert in range(8))
    (tmp_path / "counts.csv").write_text(f"layer,expert\n{rows}\n")
    options = ImportOptions(num_experts=8, top_k=2)
    import_run("csv", tmp_path / "counts.csv", directory=tmp_path / "counts", name="counts", options=options)
    for section, what in (("Pairs", "Which experts meet"), ("Next layer", "Which experts follow")):
        app, text = visit(monkeypatch, tmp_path / "counts", section)
        assert f"{what} cannot be computed from what was imported" in text
        assert not titles(app)


def test_views_are_the_frames_of_the_page(flow: store.Run) -> None:
    for name, frame in (
        ("co-activation", frames.co_activations),
        ("transitions", frames.information),
        ("predictability", frames.predictability),
        ("lookahead", frames.lookaheads),
    ):
        assert view(flow, name).equals(frame(flow))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_figures_draw_what_the_frames_hold(theme: Any, flow: store.Run) -> None:
    frame = frames.pairs(flow, label="3")
    pair = frame.sort("jaccard", descending=True, nulls_last=True).row(0, named=True)
    heat = figures.pair_map(frame, measure="jaccard", title="x", layer="3", theme=theme).data[0]
    rows, columns = (list(names).index(str(pair[name])) for names, name in ((heat.y, "expert"), (heat.x, "other")))
    assert heat.z[rows][columns] == pytest.approx(100 * pair["jaccard"], rel=1e-5)
    assert np.isnan(np.diag(np.array(heat.z, float))).all()
    lift = figures.pair_map(frame, measure="lift", title="x", layer="3", theme=theme).data[0]
    assert lift.z[rows][columns] == pytest.approx(np.clip(np.log2(pair["lift"]), lift.zmin, lift.zmax), rel=1e-5)
    assert (lift.zmid, lift.zmin) == (0.0, -lift.zmax)
    over = frames.excess(flow)
    assert list(figures.excess_curve(over, theme=theme).data[2].y) == over["excess"].to_list()
    assert over["excess"].to_list() == frames.co_activations(flow)["excess"].to_list()
    bits = figures.information_curve(frames.information(flow), theme=theme)
    assert len([trace for trace in bits.data if trace.name]) == 3
    frame = frames.predictability(flow)
    curves = {trace.name: trace for trace in figures.recall_curves(frame, extra=1, theme=theme).data if trace.name}
    mine = frame.filter(predictor="transition", distance=1, control="observed", extra=1).filter(
        pl.col("label") != "all"
    )
    assert list(curves["earlier layer"].y) == mine["value"].to_list()
    assert set(curves["random experts"].y) == {(TOP_K + 1) / EXPERTS}
    widths = figures.width_curves(frame, label="5", theme=theme)
    assert sum(trace.name.startswith("earlier layer") for trace in widths.data) == 3


def test_figures_of_nothing_say_so(flow: store.Run) -> None:
    nothing = frames.predictability(flow).clear()
    for figure in (
        figures.pair_map(frames.pairs(flow, label="3").clear(), measure="lift", title="x", layer="3"),
        figures.excess_curve(frames.excess(flow).clear()),
        figures.information_curve(frames.information(flow).clear()),
        figures.recall_curves(nothing, extra=0),
        figures.width_curves(nothing, label="3"),
    ):
        assert figure.layout.annotations[0].text and not figure.data


def test_partners_face_each_other() -> None:
    lift = np.array([[0.1, 0.2, 9.0, 1], [5.0, 0.1, 0.3, 1], [0.2, 4.0, 6.0, 1]])
    assert frames._facing(lift).tolist() == [2, 0, 1, 3]
    assert frames._facing(lift.T).tolist() == [1, 2, 0]


def test_values_from_the_address_that_are_none_read_as_the_default(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    app, _ = visit(monkeypatch, path.parent, layer="99", fetched="k + 99 experts", **{"from": "x"})
    assert [app.selectbox(key=key).value for key in ("layer", "from", "fetched")] == [None, "1", "0"]
    app, _ = visit(monkeypatch, path.parent, "Pairs", pairs="<b>")
    assert app.selectbox(key="pairs").value == "attraction"


def test_hostile_domains_stay_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    synthetic.finished(tmp_path, hostile=True)
    app, _ = visit(monkeypatch, tmp_path, "Pairs", domain=synthetic.HOSTILE)
    captions = "\n".join(element.value for element in app.caption)
    assert "tokens of \\<script\\>" in captions and "<script>" not in captions
