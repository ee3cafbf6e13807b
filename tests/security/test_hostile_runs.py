"""Run files and stores made to harm: views that read, tables of other types, names and links that lead elsewhere."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import duckdb
import pytest
import synthetic
from streamlit.testing.v1 import AppTest

import store
from app.cli import main
from moescope.errors import MoescopeError, StoreError

MAIN = Path(__file__).parents[2] / "app" / "main.py"
SECRET = "a secret of the machine"


def opened(monkeypatch: pytest.MonkeyPatch, directory: Path, page: str = "", **parameters: str) -> AppTest:
    """A page of a store; it must not raise."""
    monkeypatch.setenv("MOESCOPE_STORE", str(directory))
    app = AppTest.from_file(str(MAIN), default_timeout=60)
    for name, value in parameters.items():
        app.query_params[name] = value
    app.run()
    if page:
        app.switch_page(f"views/{page}.py").run()
    assert not app.exception, app.exception[0].message
    return app


def words(app: AppTest) -> str:
    """All text of a page."""
    kinds = (app.markdown, app.caption, app.info, app.warning, app.error, app.code, app.text)
    return "\n".join(str(element.value) for kind in kinds for element in kind)


@pytest.fixture
def changed(tmp_path: Path) -> Path:
    """A run to be changed with :func:`change`, beside a file that nobody may read through it."""
    (tmp_path / "secret.txt").write_text(SECRET, encoding="utf-8")
    return synthetic.finished(tmp_path / "runs", "evil", metrics=False)


def change(path: Path, *statements: str) -> None:
    with duckdb.connect(str(path)) as connection:
        for statement in statements:
            connection.execute(statement.format(path.parents[1]))


EVIL_VIEWS = {
    "content": (
        "alter table layer rename to old",
        "create view layer as select * replace (content as module) from old, read_text('{0}/secret.txt')",
    ),
    "columns": (
        "alter table layer rename to old",
        "create view layer as select o.* replace (c.column0 as module) from old o,"
        " read_csv('{0}/secret.txt', header = false) c",
    ),
    "part": (
        "alter table sequence rename to old",
        "create view sequence as select * replace (content as domain) from old, read_text('{0}/secret.txt')",
    ),
    "macro": (
        "create macro leak() as (select content from read_text('{0}/secret.txt'))",
        "alter table sequence rename to old",
        "create view sequence as select * replace (leak() as domain) from old",
    ),
    "version": (
        "alter table run rename to old",
        "create view run as select * replace (content as schema_version) from old, read_text('{0}/secret.txt')",
    ),
    "experts": (
        "alter table layer rename to old",
        "create view layer as select * replace ((select content from read_text('{0}/secret.txt'))::integer as"
        " num_experts) from old",
    ),
}


@pytest.mark.parametrize("name", EVIL_VIEWS)
def test_a_view_in_a_run_reads_no_file(
    changed: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change(changed, *EVIL_VIEWS[name])
    said = []
    try:
        with store.open_run(changed) as run:
            for sql in ("from layer", "from sequence", "from route limit 3", "select distinct domain from sequence"):
                try:
                    said.append(str(run.query(sql).to_dicts()))
                except MoescopeError as error:
                    said.append(str(error))
    except MoescopeError as error:
        said.append(str(error))
    assert main(["show", str(changed)]) in (0, 2)
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) <= 1
    if name in ("content", "version"):
        said.append(words(opened(monkeypatch, changed.parent)))
    assert SECRET not in "".join((*said, captured.out, captured.err))


@pytest.mark.parametrize(
    "statement",
    ["alter table layer alter num_experts type varchar using 'many'", "update layer set num_experts = 2000000000",
     "update layer set num_experts = -1, top_k = -1", "update layer set top_k = 2000000000", "delete from layer",
     "drop table layer", "delete from run", "insert into run select * from run",
     "delete from sequence", "update run set schema_version = 99", "update run set created_at = null, model = null",
     "update expert_load set tokens = -5, gate_sum = 'nan'",
     "update expert_load set expert = 99 where expert = 3 and layer = 1",
     "update expert_load set expert = -3 where expert = 3 and layer = 1",
     "update expert_output set expert = 99 where expert = 3 and layer = 1"],
)  # fmt: skip
def test_tables_of_other_content_end_in_words(
    changed: Path, statement: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change(changed, statement)
    for view in ([], ["findings"], ["balance"]):
        code, said = main(["show", str(changed), *view]), capsys.readouterr()
        assert code in (0, 1, 2) and len(said.err.splitlines()) <= 1
        if "expert_load set expert" in statement and view != ["findings"]:
            assert code == 2 and "of layer 1, which has 16" in said.err


def test_a_run_of_impossible_size_is_said_to_be_damaged(
    changed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change(changed, "update layer set num_experts = 2000000000")
    assert main(["show", str(changed)]) == 2
    assert "num_experts 2000000000 cannot be" in capsys.readouterr().err
    assert "num_experts 2000000000 cannot be" in words(opened(monkeypatch, changed.parent)).replace("\\", "")


@pytest.fixture
def odd_store(tmp_path: Path) -> Path:
    """A store with one run and much that is none."""
    path = synthetic.finished(tmp_path / "runs", "good", metrics=False)
    for name in (b"\xff\xfe.duckdb", b"a\nb.duckdb", b"\x1b[31m.duckdb", "\u202egnp.duckdb".encode(), b".duckdb"):
        shutil.copyfile(path, os.path.join(os.fsencode(path.parent), name))
    for name in ("con.duckdb", "<b>x.duckdb", "x'; drop table layer; --.duckdb", "..duckdb", "$(id).duckdb"):
        shutil.copyfile(path, path.parent / name)
    (path.parent / "loop.duckdb").symlink_to("loop.duckdb")
    (path.parent / "dangling.duckdb").symlink_to("/nowhere")
    (path.parent / "passwd.duckdb").symlink_to("/etc/passwd")
    (path.parent / "folder.duckdb").mkdir()
    return path.parent


def test_odd_names_and_links_in_a_store(
    odd_store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [entry.name for entry in store.Catalog(odd_store).entries()]
    assert "good" in names and all(name.isprintable() for name in names)
    assert main(["runs", "--store", str(odd_store)]) == 0
    for name in ("passwd", "folder", "dangling", "loop", "../good", "nothing"):
        assert main(["show", name, "--store", str(odd_store)]) == 2
    said = capsys.readouterr()
    assert "root:" not in said.out + said.err and "Traceback" not in said.err
    for name in ("passwd", "<b>x", "../../etc/passwd"):
        app = opened(monkeypatch, odd_store, run=name)
        assert "root:" not in words(app) and not any("<b>" in element.value for element in app.markdown)


@pytest.mark.parametrize(
    "name", ["../x", "/tmp/x", "a/b", "a\\b", "..", ".", "", "a\0b", "a\nb", "a\n", "\u202ea", "a" * 300, "-x"]
)
def test_no_name_leads_out_of_the_store(odd_store: Path, tmp_path: Path, name: str) -> None:
    before = sorted(path.name for path in tmp_path.rglob("*") if path.name.isprintable())
    for attempt in (
        lambda: store.Catalog(odd_store).rename("good", name),
        lambda: store.RunWriter.create(odd_store, name, synthetic.info()),
        lambda: store.RunWriter.resume(odd_store, name),
        lambda: store.Catalog(odd_store).delete(name),
    ):
        with pytest.raises(StoreError):
            attempt()
    assert sorted(path.name for path in tmp_path.rglob("*") if path.name.isprintable()) == before
