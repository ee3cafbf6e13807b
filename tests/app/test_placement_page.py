"""The page Placement: verdict and figures, every choice, files for engines, and every kind of run."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import place_runs
import pytest
import synthetic
from streamlit.testing.v1 import AppTest
from visiting import visited

import store
from app.cli import parser
from app.exhibits import placement as exhibits
from compressor.exporters import EXPORTERS, exporter
from planner.place.verdict import verdict
from planner.placing import place
from sample_data import RUN

SECTIONS = {
    "Balance": (
        "Balancedness by forward pass", "Balancedness per layer, forward passes", "Balancedness by tokens in a pass",
        "Balancedness per layer, windows of text",
    ),
    "Devices": ("Load per device, as experts lie", "Load per device, this placement"),
    "Side by side": ("By domain: balancedness per pass",),
    "Traffic": ("Token-expert pairs that leave their device", "Moves from layer to layer"),
    "Moving": ("What has to be moved, per layer",),
    "Files": (),
}  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the bundled run."""
    folder = tmp_path_factory.mktemp("store")
    for source in RUN.parent.glob("sample*.duckdb"):
        shutil.copyfile(source, folder / source.name)
    return folder


def visit(monkeypatch: pytest.MonkeyPatch, directory: Path, **parameters: str | list[str]) -> AppTest:
    return visited(monkeypatch, directory, "placement", **parameters)


def words(app: AppTest) -> str:
    kinds = (app.markdown, app.info, app.warning, app.error, app.success, app.caption, app.subheader, app.code)
    return "\n".join(str(element.value) for kind in kinds for element in kind).replace("\\", "")


def titles(app: AppTest) -> list[str]:
    return [json.loads(chart.proto.spec)["layout"]["title"]["text"] for chart in app.get("plotly_chart")]


def metrics(app: AppTest) -> dict[str, tuple[str, str]]:
    return {one.label: (one.value, one.delta) for one in app.metric}


def downloads(app: AppTest) -> list[str]:
    return [one.proto.label for one in app.get("download_button")]


def test_the_verdict_stands_there_at_once(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    app = visit(monkeypatch, directory)
    with store.open_run(directory / "sample.duckdb") as run:
        plan = place(run, devices=8)
        told = verdict(run, plan)
    assert told.sentence in words(app) and told.sentence.startswith("No")
    found = metrics(app)
    assert found["Balancedness"] == (
        f"{told.after.mean_balancedness:.3f}", f"{told.before.mean_balancedness:.3f} before"
    )  # fmt: skip
    assert found["Busy, per pass"][0] == f"{told.after.pass_balancedness:.1%}"
    assert found["Pairs that leave"][0] == f"{told.after.remote_share:.1%}"
    assert found["To be sent"][1] == f"{told.copied:,} experts"
    assert "108,000 tokens" in words(app)
    assert app.button_group(key="section").options == list(SECTIONS)
    for section, drawn in SECTIONS.items():
        app.button_group(key="section").set_value(section).run()
        assert not app.exception
        assert titles(app) == list(drawn)
        assert all(chart.proto.alt for chart in app.get("plotly_chart"))


def test_choices_are_in_the_url(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    chosen: dict[str, Any] = {
        "devices": "4",
        "redundant": "4",
        "nodes": "2",
        "requests": "16",
        "domains": ["c", "german"],
    }
    app = visit(monkeypatch, directory, section="Devices", **chosen)
    assert "Slots of each expert" in titles(app)
    app = visit(monkeypatch, directory, section="Files", **chosen)
    with store.open_run(directory / "sample.duckdb") as run:
        asked: dict[str, Any] = {"devices": 4, "redundant": 4, "nodes": 2, "batch": 16, "domains": ["c", "german"]}
        plan = place(run, **asked)
        told = verdict(run, plan, batch=16)
    assert told.sentence in words(app)
    command = app.code[-1].value
    options = parser().parse_args(shlex.split(command)[1:])
    assert (options.devices, options.redundant, options.nodes, options.batch) == (4, 4, 2, 16)
    assert options.domains == "c,german" and options.method == "eplb"


def test_another_method_changes_the_page(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    app = visit(monkeypatch, directory, devices="4", section="Files")
    before = metrics(app)["Devices per token"]
    app.selectbox(key="method").select("affinity").run()
    assert not app.exception
    assert metrics(app)["Devices per token"] != before
    assert not [one for one in app.number_input if one.key == "redundant"]
    app.selectbox(key="method").select("hecate").run()
    assert not app.exception
    assert {"attention", "bandwidth", "free-slots"} <= {one.key for one in app.number_input}
    assert "can be copied to a device while attention runs" in words(app)
    assert "--option attention=0.0005 --option bandwidth=5e+10 --option free_slots=1" in app.code[-1].value


def test_every_file_is_offered_with_what_it_cannot_say(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    app = visit(monkeypatch, directory, devices="4", redundant="4", section="Files")
    engines = [one for one in EXPORTERS if one.step == "place"]
    assert {one.title for one in engines} | {"Plan of moescope"} <= set(downloads(app))
    with store.open_run(directory / "sample.duckdb") as run:
        plan = place(run, devices=4, redundant=4)
    told = exporter("vllm").export(plan)
    assert told.left_out and all(f"left out: {one}" in words(app) for one in told.left_out)
    assert all(note in words(app) for one in engines for note in one.export(plan).notes)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"devices": "32"}, "use at most 16 devices"),
        ({"devices": "5"}, "4 or 8 devices"),
        ({"devices": "4", "redundant": "3"}, "16 or 20 slots would do"),
    ],
)
def test_what_cannot_be_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, directory: Path, chosen: dict[str, str], message: str
) -> None:
    app = visit(monkeypatch, directory, **chosen)
    assert message in app.warning[0].value.replace("\\", "") and not titles(app)
    assert app.number_input(key="devices").value == int(chosen["devices"])


def test_counts_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path, _ = place_runs.counts(tmp_path)
    app = visit(monkeypatch, path.parent, devices="2")
    assert "this run holds counts and no trace" in words(app)
    assert set(app.selectbox(key="method").options) == {
        "EPLB: replicate busy experts", "longest first, then swaps", "replicas that attention hides",
        "as engines begin",
    }  # fmt: skip
    assert not [one for one in app.number_input if one.key == "requests"]
    assert titles(app) == ["Balancedness per layer, the counts"]
    assert app.button_group(key="section").options == [name for name in SECTIONS if name != "Traffic"]
    app.button_group(key="section").set_value("Side by side").run()
    assert not app.exception and not titles(app)
    assert list(metrics(app)) == ["Balancedness", "To be sent"]


def test_a_model_whose_experts_are_not_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path, _ = place_runs.counts(tmp_path, config={})
    app = visit(monkeypatch, path.parent)
    assert "Nothing can be placed: run 'counts' does not know the width" in words(app) and "--config" in words(app)
    assert not titles(app) and not metrics(app)


def test_a_long_trace_is_read_in_part(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    monkeypatch.setattr(exhibits, "TOKENS", 20_000)
    app = visit(monkeypatch, directory, devices="4")
    assert "Rests on about 20,000 of 108,000 tokens" in words(app) and "moescope place reads all" in words(app)
    with store.open_run(directory / "sample.duckdb") as run:
        plan = place(run, devices=4, max_tokens=20_000)
        assert verdict(run, plan, max_tokens=20_000).sentence in words(app)


def test_a_run_whose_checks_failed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    synthetic.finished(tmp_path)
    monkeypatch.setattr(store.Run, "badge", store.Badge("invalid", "counts differ"))
    app = visit(monkeypatch, tmp_path, devices="4", section="Moving")
    assert "counts differ" in words(app) and "allow an invalid run" in words(app) and not titles(app)
    app.toggle(key="allow-invalid").set_value(True).run()
    assert not app.exception and titles(app)
    app.button_group(key="section").set_value("Files").run()
    assert "--allow-invalid" in app.code[-1].value


def test_a_run_that_is_still_collected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    synthetic.live(tmp_path, shards=2)
    app = visit(monkeypatch, tmp_path)
    assert "when the collection ends" in words(app) and not titles(app)
