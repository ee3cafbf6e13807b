"""The report: findings that agree with the tables, pieces that unpack, a file that is safe to open."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
import struct
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl
import pytest
import synthetic
from streamlit.testing.v1 import AppTest

import store
from app import exhibits
from app.cli import main
from app.exhibits import Exhibit
from app.findings.findings import findings
from app.report import document, packing
from app.report.document import Document, Section, Shown, compose
from app.report.html import page
from app.report.inline import markdown, text
from app.report.markdown import text as as_markdown
from app.report.telling_layers import telling_layers
from store import LayerInfo, RunInfo, RunWriter


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Document:
    """The report of a run whose model, domains, sources and tokens are attacks."""
    path = synthetic.finished(tmp_path_factory.mktemp("hostile"), "hostile", hostile=True)
    with store.open_run(path) as run:
        return compose(run, command="moescope report 'a</script>b' -o report.html", layers=1)


@pytest.fixture(scope="module")
def file(hostile: Document) -> str:
    """Its HTML."""
    return page(hostile)


def unpacked(piece: str) -> Any:
    """What a page makes of a piece, by its description alone (see app/report/packing.py)."""
    raw = gzip.decompress(base64.b64decode(piece))
    (length,) = struct.unpack("<I", raw[:4])
    blob = raw[4 + length :]

    def filled(value: Any) -> Any:
        if isinstance(value, list):
            return [filled(item) for item in value]
        if not isinstance(value, dict):
            return value
        if isinstance(value.get("$"), list):
            code, start, count, shape = value["$"]
            width = int(code[1])
            planes = np.frombuffer(blob, np.uint8, count * width, start).reshape(width, count)
            return np.ascontiguousarray(planes.T).view(np.dtype(code)).reshape(shape)
        return {key: filled(item) for key, item in value.items()}

    return filled(json.loads(raw[4 : 4 + length]))


def test_a_run_of_counts_alone_says_what_it_cannot_say(tmp_path: Path) -> None:
    writer = RunWriter.create(tmp_path, "counts", RunInfo(model="tiny", origin="import csv", num_layers=1))
    load = {"layer": [0, 0], "step": [0, 0], "expert": [0, 1], "kind": ["routed"] * 2, "domain": ["all"] * 2,
            "phase": ["prompt"] * 2, "tokens": [75, 25], "first_choices": [75, 25]}  # fmt: skip
    reason = "counts alone"
    writer.write_shard({
        "layer": pl.DataFrame([vars(LayerInfo(0, 0, "layers.0", "", "", 2, 1))]), "expert_load": pl.DataFrame(load),
        "omission": pl.DataFrame({"subject": ["logits", "outputs"], "reason": [reason] * 2}),
    })  # fmt: skip
    with store.open_run(writer.finish()) as run:
        found = findings(run)
        made = compose(run, command="moescope report counts", both=False)
    said = {one.subject: one for one in found}
    assert said["Balance"].evidence[0].value == pytest.approx(0.5)
    assert {one.subject for one in found if one.tone == "unknown"} >= {
        "Confidence", "Domains", "Local consistency", "Super experts", "Redundancy", "Not known",
    }  # fmt: skip
    assert all(reason in said[subject].sentence for subject in ("Confidence", "Super experts", "Redundancy"))
    assert made.missing and made.layers[0].label == "0"
    assert "not known" in made.provenance.filter(pl.col("what") == "tokenizer")["value"].to_list()


def test_telling_layers_are_those_that_stand_out(run: store.Run) -> None:
    chosen = {one.label: one.reasons for one in telling_layers(run, 2)}
    assert len(chosen) == 2 and list(chosen) == sorted(chosen, key=int)
    outputs = run.table("expert_output").sort("output_max", descending=True)
    assert any(f"|{outputs['output_max'][0]:.3g}|" in reason for reason in chosen[str(outputs["layer"][0])])
    assert [one.label for one in telling_layers(run, 99)] == [str(layer) for layer in synthetic.LAYERS]
    assert telling_layers(run, 0) == []


def test_pieces_unpack_to_what_went_in() -> None:
    rng = np.random.default_rng(0)
    many = rng.lognormal(0.0, 8.0, (40, 30))
    many[3, 4] = np.nan
    content = {
        "text": "日本\x00</script>", "few": np.array([0.1, 2.0]), "many": many,
        "whole": np.arange(5000.0).reshape(100, 50),
        "large": np.array([2**40, -1]), "small": np.array([3, 200]), "list": [0.5] * 30, "mixed": [1, None, "a"],
        "bad": [float("nan"), float("inf")], "words": np.array(["a", None], dtype=object), "yes": True,
    }  # fmt: skip
    got = unpacked(packing.packed(content))
    assert got["text"] == content["text"] and got["mixed"] == [1, None, "a"] and got["bad"] == [None, None]
    assert got["words"] == ["a", None] and got["yes"] is True
    np.testing.assert_allclose(got["few"], content["few"], rtol=1e-7)
    np.testing.assert_allclose(got["many"], many, rtol=2.0 ** -(packing.KEPT_BITS + 1) * 1.001)
    for name in ("whole", "large", "small", "list"):
        np.testing.assert_array_equal(got[name], content[name])
    assert got["many"].dtype == np.float32 and got["small"].dtype == np.uint8
    assert packing.packed(content) == packing.packed(content)


def test_the_difference_turns_a_light_figure_into_the_dark_one(run: store.Run) -> None:
    from app.report.html import _plain

    light, dark = (_plain(exhibits.make("load", run, theme=theme).figure) for theme in ("light", "dark"))
    for path, value in packing.difference(light, dark):
        node = light
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value
    assert packing.difference(light, dark) == []
    assert json.dumps(light, default=np.ndarray.tolist) == json.dumps(dark, default=np.ndarray.tolist)


class Tags(HTMLParser):
    """All tags with their attributes, and the text outside of scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.words.append(data)


def test_the_file_runs_its_own_scripts_alone(file: str) -> None:
    read = Tags()
    read.feed(file)
    scripts = [attributes for tag, attributes in read.tags if tag == "script"]
    assert [one for one in scripts if one.get("type") != "application/octet-stream"] == [{}]
    assert not [tag for tag, _ in read.tags if tag in ("img", "iframe", "object", "form")]
    assert not [name for _, attributes in read.tags for name in attributes if name.startswith("on")]
    links = [attributes.get("href") or "" for tag, attributes in read.tags if tag in ("a", "link")]
    assert links and all(link.startswith(("#", "data:")) for link in links)
    anchors = {attributes["id"] for _, attributes in read.tags if "id" in attributes}
    assert {link[1:] for link in links if link.startswith("#")} <= anchors
    assert any("<script>window.hacked" in words for words in read.words)


def test_the_policy_allows_what_the_file_holds(file: str) -> None:
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', file)
    assert policy is not None and policy[1].startswith("default-src 'none'")
    for kind, inside in (("script", r"<script>(.*?)</script>"), ("style", r"<style>(.*?)</style>")):
        (content,) = re.findall(inside, file, re.DOTALL)
        allowed = re.search(rf"{kind}-src ([^;]*)", policy[1])
        assert allowed is not None
        assert f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'" in allowed[1]
        assert "unsafe" not in allowed[1]
    library = gzip.decompress(base64.b64decode(re.findall(r'id="plotly">([^<]*)<', file)[0]))
    assert base64.b64encode(hashlib.sha256(library).digest()).decode() in policy[1]


def test_the_file_holds_each_figure_and_its_data(hostile: Document, file: str) -> None:
    pieces = dict(re.findall(r'octet-stream" id="([^"]+)">([^<]*)<', file))
    shown = [one for section in hostile.sections for one in section.shown]
    assert len(shown) > 5 and len({one.anchor for one in shown}) == len(shown)
    one = next(one for one in shown if one.name == "load")
    figure, table = unpacked(pieces["f-load"]), unpacked(pieces["t-load"])
    np.testing.assert_allclose(figure["data"][0]["z"], one.exhibit.figure.data[0].z, rtol=1.3e-4)
    assert table["names"] == one.exhibit.frame.columns
    np.testing.assert_array_equal(table["columns"][table["names"].index("tokens")], one.exhibit.frame["tokens"])
    assert len(file) < 7_000_000


def test_what_no_report_draws_is_named_with_its_command(hostile: Document, file: str) -> None:
    drawn = {one.name for section in hostile.sections for one in section.shown}
    left = {name for one in hostile.further for name, _ in one.exhibits}
    assert {"caching-speed", "caching-hits"} <= left and not drawn & left
    assert drawn | left <= set(exhibits.entries())
    for said in (file, as_markdown(hostile)):
        assert "NAME -o NAME.html" in said and all(name in said for name in left)


def test_what_there_is_no_room_for_is_told_of(run: store.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).normal(size=(400, 400))
    made = [
        Exhibit(go.Figure(go.Heatmap(z=values)), pl.DataFrame({"value": values.ravel()}), read="", alt="")
        for values in (noise, noise[:20, :20])
    ]
    base = compose(run, command="", layers=0, both=False)
    section = Section("Routing", "page-routing", tuple(
        Shown(name, name, name.capitalize(), None, one) for name, one in zip(("vast", "tiny"), made, strict=True)
    ))  # fmt: skip
    monkeypatch.setattr("app.report.html.LIMIT", 2_500_000)
    file = page(document.replace(base, sections=(section,), missing=()))
    assert 'id="f-tiny"' in file and 'id="t-tiny"' in file and 'id="f-vast"' not in file
    assert "too large" in file and "moescope figure synthetic vast -o vast.html" in file
    assert len(file) <= 2_500_000


def test_text_of_a_page_is_safe() -> None:
    assert text('<b a="1">\x00\u202e&') == "&lt;b a=&quot;1&quot;&gt;&amp;"
    assert markdown(r"a \<b\> **c *d* e** `<e>` [f](javascript:x) 2 * 3 * 4 <g> :material/info: :red[h]") == (
        "a &lt;b&gt; <strong>c <em>d</em> e</strong> <code>&lt;e&gt;</code> f 2 * 3 * 4 &lt;g&gt;  h"
    )


def test_markdown_says_the_same(hostile: Document) -> None:
    said = as_markdown(hostile)
    assert not re.search(r"(?<!\\)<(script|img)", said)
    for one in hostile.findings:
        assert f"**{one.subject}.**" in said
    assert said.count("\n### ") == sum(len(section.shown) for section in hostile.sections)


def test_without_text_no_token_is_in_the_report(finished_path: Path) -> None:
    with store.open_run(finished_path) as whole, store.open_run(finished_path, text=False) as silent:
        assert whole.has_tokens and not silent.has_tokens
        assert whole.info.text_kept and not silent.info.text_kept
        assert silent.table("vocabulary").is_empty() and silent.sequence_text(0) is None
        assert silent.table("expert_load").equals(whole.table("expert_load"))


def test_the_command_writes_whole_files_only(
    finished_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "report.md"
    given = ["report", str(finished_path), "-o", str(out), "--layers", "1"]
    assert main(given) == 0 and out.read_text(encoding="utf-8").startswith("# synthetic")
    assert main(given) == 2 and "--force" in capsys.readouterr().err
    before = out.read_bytes()

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("app.report.document.compose", stop)
    assert main([*given, "--force"]) == 130
    assert out.read_bytes() == before and list(tmp_path.iterdir()) == [out]
    for wrong, said in (
        (["-o", str(tmp_path)], "is a folder"), (["-o", str(tmp_path / "no" / "x.html")], "no folder"),
        (["-o", str(tmp_path / "x.html"), "--figures", "d"], "--format md"),
    ):  # fmt: skip
        assert main(["report", str(finished_path), *wrong]) == 2 and said in capsys.readouterr().err


def test_a_live_run_is_reported_as_far_as_it_is_published(tmp_path: Path) -> None:
    synthetic.live(tmp_path)
    with store.open_run(tmp_path / "growing.live") as run:
        made = compose(run, command="moescope report growing", layers=1, both=False)
    assert "still being collected" in made.live and "240 of 10,000" in made.live
    assert made.findings[0].tone == "attention"
    assert "Load of each expert" in [one.title for section in made.sections for one in section.shown]


def test_the_button_makes_a_file(finished_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def script(path: str) -> None:
        import store
        from app.components.report_button import report_button

        report_button(store.open_run(path))

    monkeypatch.setattr("app.components.report_button.compose", lambda run, **_: run.name)
    monkeypatch.setattr("app.components.report_button.page", lambda made, **_: f"<!doctype html>{made}")
    tested = AppTest.from_function(script, args=(str(finished_path),), default_timeout=20).run()
    assert not tested.get("download_button")
    tested.button[0].click().run()
    assert not tested.exception and len(tested.get("download_button")) == 1
    tested.toggle[0].set_value(False).run()
    assert not tested.get("download_button")  # what was made holds text
