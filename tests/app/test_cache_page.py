"""The page Cache: verdict and figures of the study, charts, a token on the clock, plans and files, empty cases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import synthetic
from streamlit.testing.v1 import AppTest
from visiting import visited

import store
from app.frames import caching as frames
from app.frames import caching_token
from compressor.exporters import EXPORTERS
from compressor.plan import CacheStep, Plan, QuantizeStep
from moescope.errors import MoescopeError
from planner.cache.study import Study
from planner.machines import MACHINES, as_json

OTHER = 2.0**20
"""Bytes beside the experts: the synthetic run does not say."""

ASKED: dict[str, Any] = {"context-length": "512", "other-weights": f"{OTHER / 2**30:g}"}
SECTIONS = {
    "Speed": ("Time per token by memory for experts", "Ways to serve with this memory"),
    "Hit rates": ("Hit rate by slots per layer", "What the hit rate with"),
    "Domains": ("Time per token by domain", "Hit rate by domain"),
    "One token": ("Token ",),
    "Published ways": (),
    "Plan and files": (),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one run."""
    folder = tmp_path_factory.mktemp("store")
    synthetic.finished(folder)
    return folder


def visit(monkeypatch: pytest.MonkeyPatch, directory: Path, **parameters: str) -> AppTest:
    return visited(monkeypatch, directory, "cache", **parameters)


def words(app: AppTest) -> str:
    kinds = (app.markdown, app.info, app.warning, app.error, app.caption, app.subheader, app.code)
    return "\n".join(str(element.value) for kind in kinds for element in kind)


def charts(app: AppTest) -> list[dict[str, Any]]:
    return [json.loads(chart.proto.spec) for chart in app.get("plotly_chart")]


def titles(app: AppTest) -> list[str]:
    return [one["layout"]["title"]["text"] for one in charts(app)]


def studied(directory: Path, **changes: Any) -> Study:
    """What the page rests on, where nothing is chosen but the context and the other weights."""
    asked = {"name": "rtx4090", "context": 512, "batch": 1, "other_weights": int(float(f"{OTHER / 2**30:g}") * 2**30)}
    with store.open_run(directory / "synthetic.duckdb") as run:
        vram = frames.half(run, **{name: value for name, value in asked.items() if name != "name"})
        return frames.answer(run, **{**asked, "vram": int(float(f"{vram / 2**30:.4g}") * 2**30), **changes})


def test_the_study_is_shown_whole(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    app, found = visit(monkeypatch, directory, **ASKED), studied(directory)
    assert app.button_group(key="section").options == list(SECTIONS)
    for section, beginnings in SECTIONS.items():
        app.button_group(key="section").set_value(section).run()
        assert not app.exception and not app.error
        drawn = titles(app)
        assert len(drawn) == len(beginnings)
        assert all(title.startswith(beginning) for title, beginning in zip(drawn, beginnings, strict=True))
        assert all(chart.proto.alt for chart in app.get("plotly_chart"))
        assert len(app.caption) >= len(drawn)
    text = words(app).replace("\\", "")  # of the last section: plan and files
    assert found.verdict.sentence[1:] in text
    assert all(reason in text for reason in found.verdict.reasons)
    shown = {one.label: (one.value, one.delta) for one in app.metric}
    assert shown["ms per token"] == (f"{found.best.ms:.3g}", f"{found.best.low:.3g} to {found.best.high:.3g}")
    assert shown["Hit rate"][0] == f"{found.best.hit_rate:.1%}"
    assert shown["Bound, ms"][0] == f"{found.bound_ms:.3g}"
    assert shown["Experts held"][0] == f"{found.slots} of {found.all_slots}"
    assert found.slots == found.all_slots // 2  # what is shown at first
    assert "moescope cache" in text and f"--vram {int(found.memory['total'])}" in text


def test_the_study_is_made_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    synthetic.finished(tmp_path)
    made: list[int] = []
    real = frames.study

    def counted(*args: Any, **more: Any) -> Study:
        made.append(1)
        return real(*args, **more)

    monkeypatch.setattr(frames, "study", counted)
    app = visit(monkeypatch, tmp_path, section="One token", **ASKED)
    app.selectbox(key="way").select("lru").run()
    app.selectbox(key="mark").select("slowest").run()
    assert not app.exception
    assert len(made) == 1
    app.selectbox(key="bits").select("4").run()
    assert not app.exception
    assert len(made) == 2
    app.button_group(key="section").set_value("Plan and files").run()
    assert len(made) == 2
    assert "--preset uniform_bits --bits 16 --set widths=[4]" in words(app)


def test_a_token_is_chosen_by_its_time_or_number(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    app = visit(monkeypatch, directory, section="One token", way="LRU", mark="the slowest", **ASKED)
    found = studied(directory)
    with store.open_run(directory / "synthetic.duckdb") as run:
        clock = caching_token.clocked(
            run, way="lru", name="rtx4090", vram=int(found.memory["total"]), **dict(found.asked)
        )
    seconds = clock.served.clock.pass_seconds
    assert charts(app)[-1]["layout"]["title"]["text"].endswith(f", {1e3 * seconds.max():.3g} ms")
    app.selectbox(key="mark").select("by number").run()
    app.number_input(key="pass").set_value(7).run()
    assert not app.exception
    title = charts(app)[-1]["layout"]["title"]["text"]
    assert title == f"Token 7 of sequence {clock.setting.test.sequences[0]}, {1e3 * seconds[7]:.3g} ms"


def test_plans_and_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = synthetic.finished(tmp_path)
    app = visit(monkeypatch, tmp_path, section="Plan and files", **ASKED)
    app.button(key="keep-cache-plan").click().run()
    assert not app.exception
    plan = Plan.load(store.list_plans(path)[0])
    step = plan.steps[0]
    assert isinstance(step, CacheStep)
    found = studied(tmp_path)
    assert [layer.slots for layer in step.layers] == list(found.best.layer_slots)
    buttons = {one.proto.label.replace("\\", "") for one in app.get("download_button")}
    for engine in (one for one in EXPORTERS if one.step == "cache"):
        try:
            exported, refused = engine.export(plan), ""
        except MoescopeError as error:
            exported, refused = None, str(error)
        assert refused[:60] in words(app).replace("\\", "")
        assert (engine.title in buttons) == (exported is not None)
        for note in () if exported is None else exported.notes:
            assert note[:60] in words(app).replace("\\", "")


def test_the_plan_of_another_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = synthetic.finished(tmp_path)
    app = visit(monkeypatch, tmp_path, section="Plan and files", **ASKED, bits="4")
    app.selectbox(key="plan-of").select("lru").run()
    app.button(key="keep-cache-plan").click().run()
    widths, cache = Plan.load(store.list_plans(path)[0]).steps
    assert widths.step == "quantize" and isinstance(cache, CacheStep)
    assert (cache.policy, cache.misses) == ("lru", "load")
    assert isinstance(widths, QuantizeStep)
    assert {one.up for layer in widths.layers for one in layer.experts} == {4}
    # The study counts with the same widths: 24 KiB in 32 bits are 3 in 4, and scales beside them.
    slot = studied(tmp_path, bits=4).memory["slot"]
    assert 3 * 2**10 < slot < 4 * 2**10


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"vram": "0.001"}, "No answer for this choice: 1.02 MiB are too small"),
        ({"other-weights": "0"}, "give the size of the other weights"),
        ({"context-length": "oops", "machine": "abacus", "link": "rope", "batch": "-3", "bits": "99", "vram": "x"}, ""),
    ],
)
def test_what_cannot_be_answered_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, directory: Path, parameters: dict[str, str], sentence: str
) -> None:
    app = visit(monkeypatch, directory, **{**ASKED, **parameters})
    assert not app.error
    text = words(app).replace("\\", "")
    assert sentence in text
    assert bool(charts(app)) == (not sentence)  # bad values in the address read as the defaults


def test_an_invalid_run_is_answered_only_on_demand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    synthetic.finished(tmp_path)
    failed = store.Badge("invalid", "counts differ")
    monkeypatch.setattr(store.Run, "badge", failed)
    app = visit(monkeypatch, tmp_path, **ASKED)
    assert not charts(app)
    assert "may be wrong" in words(app)
    app.toggle(key="allow-invalid").set_value(True).run()
    assert not app.exception
    assert len(charts(app)) == len(SECTIONS["Speed"])
    app.button_group(key="section").set_value("Plan and files").run()
    assert "--allow-invalid" in words(app)


def test_published_ways_are_replayed_on_demand(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    def columns(app: AppTest) -> list[str]:
        return [name for frame in app.dataframe for name in frame.value.columns]

    assert not {"policy", "sequences"} & set(columns(visit(monkeypatch, directory, section="Published ways", **ASKED)))
    app = visit(monkeypatch, directory, section="Published ways", **ASKED, replayed="true")
    shown = {name: frame.value for frame in app.dataframe for name in frame.value.columns}
    assert "Least recently used" in set(shown["policy"]["policy"])
    assert set(shown["sequences"]["sequences"]) >= {"in order of arrival", "the same, then swapped while it helps"}


def test_the_machine_and_the_phase_can_be_told_in_full(
    monkeypatch: pytest.MonkeyPatch, directory: Path, tmp_path: Path
) -> None:
    app = visit(monkeypatch, directory, section="Plan and files", **ASKED, chunk="4", disk="sata")
    command = next(one.value for one in app.code if "moescope cache" in one.value)
    assert "--disk sata" in command and "--chunk 4" in command and "--ram" not in command
    assert "disk sata, context 512 tokens, prompts in chunks of 4 tokens" in words(app)
    app.number_input(key="host-memory").set_value(8.0).run()
    assert f"--ram {8 * 2**30}" in next(one.value for one in app.code if "moescope cache" in one.value)
    file = tmp_path / "mine.json"
    file.write_text(as_json(MACHINES["rtx3090"]), encoding="utf-8")
    app.text_input(key="machine-file").input(str(file)).run()
    assert not app.exception
    assert f"--machine {file}" in next(one.value for one in app.code if "moescope cache" in one.value)
    app.text_input(key="machine-file").input(str(tmp_path / "none.json")).run()
    assert "no machine file" in words(app) and not charts(app)


def test_kept_studies_are_listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = synthetic.finished(tmp_path)
    found = studied(tmp_path)
    store.write_plan(path, json.dumps(found.content()), kind="caching")
    store.write_plan(path, '{"kind": "caching"}', kind="caching", name="damaged")
    app = visit(monkeypatch, tmp_path, section="Plan and files", **ASKED)
    (table,) = [frame.value for frame in app.dataframe if "answer" in frame.value.columns]
    assert table["answer"].to_list() == [found.verdict.sentence]
    assert table["ms"].to_list() == [found.best.ms]
