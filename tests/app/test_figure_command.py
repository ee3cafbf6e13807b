"""``moescope figure``: the list, every kind of file, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from app import exhibits, images
from app.cli import main


@pytest.mark.parametrize("ending", ["csv", "parquet", "json"])
def test_data_of_a_figure(finished_path: Path, tmp_path: Path, ending: str) -> None:
    target = tmp_path / f"load.{ending}"
    assert main(["figure", str(finished_path), "load", "-o", str(target), "--phase", "prompt"]) == 0
    read = {"csv": pl.read_csv, "parquet": pl.read_parquet, "json": lambda path: pl.DataFrame(
        json.loads(path.read_text())["data"])}[ending]  # fmt: skip
    import store

    with store.open_run(finished_path) as run:
        expected = exhibits.make("load", run, choices={"phase": "prompt"}).frame
    assert read(target)["tokens"].to_list() == expected["tokens"].to_list()
    assert [path.name for path in tmp_path.iterdir()] == [target.name]  # nothing half-written is left


def test_a_page_of_its_own(finished_path: Path, tmp_path: Path) -> None:
    found = []
    for name in ("a.html", "b.html"):
        assert main(["figure", str(finished_path), "load", "-o", str(tmp_path / name), "--theme", "dark"]) == 0
        found.append((tmp_path / name).read_bytes())
    assert found[0] == found[1] and b"#10171F" in found[0] and b'src="http' not in found[0]


@pytest.mark.browser
@pytest.mark.parametrize(("ending", "start"), [("svg", b"<svg"), ("png", b"\x89PNG")])
def test_pictures(finished_path: Path, tmp_path: Path, ending: str, start: bytes) -> None:
    target = tmp_path / f"load.{ending}"
    found = []
    for _ in range(2 if ending == "svg" else 1):
        arguments = ["figure", str(finished_path), "load", "-o", str(target), "--width", "600", "--scale", "1"]
        assert main(arguments) == 0
        found.append(target.read_bytes())
    assert found[0].startswith(start) and len(set(found)) == 1
    if ending == "svg":
        assert b'width="600"' in found[0] and b"rgb(255, 255, 255)" in found[0]
    if ending == "png":
        assert int.from_bytes(found[0][16:20], "big") == 600


def test_a_pdf_says_no_time() -> None:
    drawn = b"/CreationDate (D:20261130153338+00'00')\n/ModDate (D:20261130153339+00'00')>>"
    assert images._without_chance(drawn, "pdf") == drawn.replace(b"2026113015333", b"1980010100000").replace(
        b"19800101000008", b"19800101000000"
    ).replace(b"19800101000009", b"19800101000000")


def test_without_a_browser_or_kaleido_it_says_what_to_install(
    finished_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "a.svg"
    monkeypatch.setitem(__import__("sys").modules, "kaleido", None)
    assert main(["figure", str(finished_path), "load", "-o", str(target)]) == 2
    said = capsys.readouterr().err
    assert "pip install 'moescope[images]'" in said and "html, csv" in said and said.count("\n") == 1
    monkeypatch.undo()
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "no-browser"))
    assert main(["figure", str(finished_path), "load", "-o", str(target)]) == 2
    said = capsys.readouterr().err
    assert "Chromium" in said and said.count("\n") == 1
    assert not target.exists()


def test_the_list_says_what_the_run_has(
    finished_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = exhibits.entry("load")

    def none(run, *, frames=None, theme="light"):  # type: ignore[no-untyped-def]
        raise exhibits.Absent("There is nothing.", remedy="moescope demo")

    absent = exhibits.Entry("nothing", none, "Nothing at all", page="routing")
    monkeypatch.setattr("app.exhibits.entries", lambda: {"load": entry, "nothing": absent})
    assert main(["figure", str(finished_path), "--check", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first["here"] and "scale=relative|share" in first["choices"] and first["page"] == "routing"
    assert not second["here"] and second["reason"] == "There is nothing. moescope demo"
    assert main(["figure", str(finished_path), "--json"]) == 0
    assert [set(row) for row in json.loads(capsys.readouterr().out)] == [{"name", "title", "page", "choices"}] * 2
    assert main(["figure", str(finished_path), "nothing"]) == 2
    assert "There is nothing." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [(["lood"], "did you mean load"), (["load", "-o", "a.gif"], "svg, png, pdf"),
     (["load", "--layer", "1"], "no choice"), (["load", "--set", "scale"], "NAME=VALUE"),
     (["load", "--set", "scale=huge"], "none of relative"), (["load", "--domain", "nix"], "none of"),
     (["-o", "a.csv"], "name it")],
)  # fmt: skip
def test_mistakes_are_one_line(
    finished_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["figure", str(finished_path), *words]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
