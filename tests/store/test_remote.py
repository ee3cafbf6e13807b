"""Runs in an S3 service of this machine: listed, fetched once, read in pieces, never changed."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import duckdb
import fsspec
import pytest
from moto.server import ThreadedMotoServer

import store
from app.cli import main
from app.commands.runs import ACTIONS
from moescope.errors import InputError, ShardError, StoreError
from store import Catalog, RunWriter, remote
from store.remote import collecting, delivery, location, mirror, room
from store.remote.objects import Objects
from tests.app import synthetic

SECRET = "do-not-show-this-key"
BUCKET = "s3://bucket"


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(autouse=True)
def environment(service: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "AWS_ENDPOINT_URL": service, "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1", "MOESCOPE_CACHE": str(tmp_path / "cache"),
    }  # fmt: skip
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    mirror._mirrors.clear()


@pytest.fixture(scope="module")
def s3(service: str) -> Any:
    """A client beside ours, and the bucket."""
    keys = {"aws_access_key_id": "testing", "aws_secret_access_key": SECRET, "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=service, **keys)
    client.create_bucket(Bucket="bucket")
    return client


@pytest.fixture
def url(s3: Any, tmp_path: Path) -> str:
    """A store with run ``mine``, its metrics and one plan."""
    prefix = tmp_path.name
    file = synthetic.finished(tmp_path / "made", "mine")
    store.write_plan(file, '{"steps": []}', name="one")
    for path in (file, file.with_name("mine.derived.duckdb"), file.with_name("mine.plans") / "plan-one.json"):
        s3.upload_file(str(path), "bucket", f"{prefix}/{path.relative_to(file.parent)}")
    return f"{BUCKET}/{prefix}"


def objects(s3: Any, url: str) -> dict[str, str]:
    """Key -> ETag of all objects of a store."""
    prefix = url.removeprefix(f"{BUCKET}/") + "/"
    found = s3.list_objects_v2(Bucket="bucket", Prefix=prefix).get("Contents", [])
    return {one["Key"].removeprefix(prefix): one["ETag"] for one in found}


def expire(directory: Path) -> None:
    """What this process knows of a store is old."""
    found = remote.mirror_of(directory)
    assert found is not None
    found.forget()


def test_a_run_is_listed_without_being_fetched_and_read_as_from_a_directory(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces: list[int] = []
    piece = Objects.piece
    counted = lambda self, name, start, end: pieces.append(end - start) or piece(self, name, start, end)  # noqa: E731
    monkeypatch.setattr(Objects, "piece", counted)
    directory = store.located(url)
    entry = Catalog(url).entries()[0]
    file = tmp_path / "made" / "mine.duckdb"
    assert (entry.name, entry.live, entry.size_bytes) == ("mine", False, file.stat().st_size)
    from app.frames.runs import run_list

    local, there = run_list(Catalog(file.parent)), run_list(Catalog(directory))
    assert there.equals(local) and there["state"].to_list() == ["finished"]
    assert 0 < sum(pieces) < file.stat().st_size and not list(directory.rglob("*.duckdb*"))
    with store.open_run(entry.path) as run, store.open_run(file) as made:
        assert run.table("expert_load").equals(made.table("expert_load")) and len(run.metrics())
    assert store.read_plan(store.list_plans(entry.path)[0]) == '{"steps": []}'
    asked = len(pieces)
    store.open_run(f"{url}/mine.duckdb").close()
    assert len(pieces) == asked, "fetched once"


def test_user_sql_reaches_nothing_through_a_run_that_lies_in_a_store(url: str) -> None:
    with store.open_run(f"{url}/mine.duckdb", fetch=False) as run:
        assert run.query("select count(*) as n from expert_load")["n"][0] > 0
        for source in (
            "read_parquet('moescope://x.parquet')", "read_blob('moescope://run.duckdb')", "glob('moescope://*')",
            "read_text('moescope:///etc/passwd')", "read_text('/etc/passwd')", f"read_text('{url}/mine.duckdb')",
        ):  # fmt: skip
            with pytest.raises(StoreError):
                run.query(f"select * from {source}")
        with pytest.raises(duckdb.Error):
            run._connection.cursor().execute("attach 'moescope://run.duckdb' as again (read_only)").fetchall()
    assert store.console(f"{url}/mine.duckdb").ask("select 1 as one").frame["one"].to_list() == [1]


def test_what_is_made_here_stays_here(url: str, s3: Any) -> None:
    before = objects(s3, url)
    path = Catalog(url).resolve("mine")
    store.open_run(path).close()
    store.write_plan(path, '{"steps": [], "mine": 1}', name="mine")
    assert {file.name for file in store.list_plans(path)} == {"plan-one.json", "plan-mine.json"}
    for action in (lambda: Catalog(url).rename("mine", "yours"), lambda: Catalog(url).delete("mine")):
        with pytest.raises(StoreError, match="what is in a remote store stays as it is"):
            action()
    with pytest.raises(StoreError, match="already has a run 'mine'"):
        RunWriter.create(path.parent, "mine", synthetic.info())
    assert objects(s3, url) == before


def test_an_object_that_changed_is_fetched_again_and_one_that_vanished_is_said(
    url: str, s3: Any, tmp_path: Path
) -> None:
    path = Catalog(url).resolve("mine")
    with store.open_run(path) as former:
        store.write_metrics(path, former.metrics().head(1))  # computed here, of the former object
        other = synthetic.finished(tmp_path / "other", "mine", sequences=6)
        s3.upload_file(str(other), "bucket", f"{url.removeprefix(BUCKET + '/')}/mine.duckdb")
        expire(path.parent)
        with store.open_run(path) as run:
            assert (former.info.sequences, run.info.sequences) == (9, 6)
            assert former.table("sequence").height == 9 and former.version != run.version
    assert len(list((path.parent / room.COPIES).glob("mine.duckdb@*"))) == 1
    s3.delete_object(Bucket="bucket", Key=f"{url.removeprefix(BUCKET + '/')}/mine.duckdb")
    expire(path.parent)
    with pytest.raises(StoreError, match=r"s3://.*/mine.duckdb is not there \(any more\)"):
        store.open_run(path)
    assert Catalog(url).entries() == []
    Catalog(url).require_free("mine")


def test_an_object_that_changes_while_it_is_read_is_no_copy(
    url: str, s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = synthetic.finished(tmp_path / "other", "mine", sequences=6)
    piece = Objects.piece

    def changing(self: Objects, name: str, start: int, end: int) -> bytes:
        found = piece(self, name, start, end)
        if name == "mine.duckdb":
            s3.upload_file(str(other), "bucket", f"{url.removeprefix(BUCKET + '/')}/mine.duckdb")
        return found

    monkeypatch.setattr(Objects, "piece", changing)
    path = Catalog(url).resolve("mine")
    with pytest.raises(StoreError, match="changed while it was read"):
        store.open_run(path)
    assert not path.exists() and not list((path.parent / room.COPIES).glob("mine.duckdb*"))


def test_two_at_once_fetch_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []
    fetch = Objects.fetch

    def slow(self: Objects, wanted: Any, target: Path, tell: Any = None) -> None:
        fetched.append(wanted.name)
        time.sleep(0.2)
        fetch(self, wanted, target, tell)

    monkeypatch.setattr(Objects, "fetch", slow)
    path = Catalog(url).resolve("mine")
    threads = [threading.Thread(target=lambda: store.open_run(path).close()) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(fetched) == ["mine.derived.duckdb", "mine.duckdb", "mine.plans/plan-one.json"]


def test_half_a_copy_of_a_dead_process_is_no_copy(url: str) -> None:
    directory = store.located(url)
    copies = directory / room.COPIES
    copies.mkdir()
    left = copies / f".mine.duckdb@0123456789abcdef.{socket.gethostname()}-999999999-0.tmp"
    left.write_bytes(b"half")
    store.open_run(directory / "mine.duckdb").close()
    assert not left.exists()


def test_names_that_are_no_runs_are_left_out_and_nothing_is_written_outside(url: str, s3: Any) -> None:
    prefix = url.removeprefix(BUCKET + "/")
    for name in (
        ".hidden.duckdb", "ü.duckdb", "-flag.duckdb", "mine.plans/plan-A.json", "mine.plans/job-1.json", "deep/x.duckdb"
    ):  # fmt: skip
        s3.put_object(Bucket="bucket", Key=f"{prefix}/{name}", Body=b"{}")
    assert [entry.name for entry in Catalog(url).entries()] == ["mine"]
    path = Catalog(url).resolve("mine")
    store.open_run(path).close()
    assert [file.name for file in path.with_name("mine.plans").iterdir()] == ["plan-one.json"]
    root = Path(os.environ["MOESCOPE_CACHE"])
    assert {file.name for file in root.iterdir()} == {path.parent.name}


def test_copies_are_bounded_and_what_was_made_here_never_leaves(
    url: str, s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "made" / "mine.duckdb"
    prefix, size = url.removeprefix(BUCKET + "/"), file.stat().st_size
    for name in ("two", "three"):
        s3.upload_file(str(file), "bucket", f"{prefix}/{name}.duckdb")
    monkeypatch.setattr(room, "_IN_USE", -1.0)
    monkeypatch.setenv("MOESCOPE_CACHE_LIMIT", str(int(2.6 * size)))
    paths = [Catalog(url).resolve(name) for name in ("mine", "two", "three")]
    store.open_run(paths[0]).close()
    store.write_plan(paths[0], "{}", name="here")
    store.open_run(paths[1]).close()
    store.open_run(paths[0]).close()  # used again: the other one is older
    store.open_run(paths[2]).close()
    assert [path.exists() for path in paths] == [True, False, True]
    assert [entry.name for entry in Catalog(url).entries()] == ["mine", "three", "two"]
    store.open_run(paths[1]).close()
    assert [plan.name for plan in store.list_plans(paths[0]) if not plan.is_symlink()] == ["plan-here.json"]
    monkeypatch.setenv("MOESCOPE_CACHE_LIMIT", "1KiB")
    shutil.rmtree(paths[0].parent / room.COPIES)
    with pytest.raises(InputError, match="more than the 1 KiB that fetched runs may take"):
        store.open_run(paths[2])
    monkeypatch.delenv("MOESCOPE_CACHE_LIMIT")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, room._RESERVE + 1000))  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"takes 3.. KiB, and the disk of .* has 1000 B left"):
        store.open_run(paths[2])


def test_a_push_creates_and_never_replaces(
    url: str, s3: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "push" in ACTIONS
    made = synthetic.finished(tmp_path / "else", "yours", sequences=6)
    store.write_plan(made, "{}", name="mine")
    assert main(["runs", "push", str(made), "--store", url]) == 0
    assert capsys.readouterr().out == f"pushed to {url}/yours.duckdb\n"
    assert {"yours.duckdb", "yours.derived.duckdb", "yours.plans/plan-mine.json"} <= set(objects(s3, url))
    before = objects(s3, url)
    assert main(["runs", "push", str(made), "--store", url]) == 2
    assert (
        capsys.readouterr().err
        == f"moescope: {url} already has a run 'yours': choose another name (--name, or moescope runs rename)\n"
    )
    assert objects(s3, url) == before and Catalog(url).resolve("yours").is_symlink()
    assert main(["runs", "push", str(made), "--store", str(tmp_path)]) == 2
    assert "is a directory" in capsys.readouterr().err
    # The name was taken while the work went on: the run here is kept, and nothing there is touched.
    directory = store.located(url)
    synthetic.finished(directory, "late")
    s3.upload_file(str(made), "bucket", f"{url.removeprefix(BUCKET + '/')}/late.duckdb")
    assert main(["runs", "push", "late", "--store", url]) == 2
    assert "has another run 'late': yours is kept" in capsys.readouterr().err
    assert main(["runs", "rename", "late", "early", "--store", url]) == 0
    assert main(["runs", "push", "early", "--store", url]) == 0
    assert "early.duckdb" in objects(s3, url) and main(["show", "early", "--store", url]) == 0


def shard(target: Any, number: int, start: int) -> bool:
    tables = synthetic.tables(3, start=start, text=False, activations=False)
    filled = store.filled_tables({name: tables[name] for name in ("layer", "sequence", "expert_load")})
    return store.publish_shard(target, number, filled, f"shard {number}")


def test_a_run_of_many_machines_counts_each_shard_once_and_is_resumed_after_every_kill(
    url: str, s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = store.located(url)
    writer = RunWriter.create(directory, "shared", synthetic.info())
    place = delivery.announce(writer.folder)
    with pytest.raises(StoreError, match="has an unfinished run 'shared'"):
        remote.mirror_of(directory).require_free("shared")  # type: ignore[union-attr]
    target = store.shard_target(place)
    assert shard(target, 0, 0) and shard(target, 1, 3)
    before = objects(s3, url)
    assert not shard(target, 1, 3), "done twice, counts once"
    assert objects(s3, url) == before and target.numbers() == {0, 1}
    s3.put_object(Bucket="bucket", Key=f"{url.removeprefix(BUCKET + '/')}/shared.live/.parts/000002-00/x", Body=b"half")

    watched = _elsewhere(monkeypatch, url)  # another machine looks on
    with store.open_run(watched.resolve("shared")) as run:
        assert run.live and run.table("sequence")["sequence"].to_list() == [0, 1, 2, 3, 4, 5]
    assert shard(target, 2, 6)

    class Killed(Exception):
        pass

    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    writer.close()
    for patched, name in ((collecting, "_fetch_shard"), (delivery, "_is_the_same"), (Objects, "remove")):
        _home(monkeypatch, directory)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(patched, name, killed)
            _finish(directory)
    _home(monkeypatch, directory)
    assert _finish(directory) == f"{url}/shared.duckdb"
    assert not [name for name in objects(s3, url) if name.startswith("shared.live")]
    with store.open_run(directory / "shared.duckdb") as run:
        assert run.table("sequence")["sequence"].to_list() == list(range(9))
        whole = store.open_run(tmp_path / "made" / "mine.duckdb")
        counted = "select sum(tokens)::bigint as n from expert_load where kind = 'routed'"
        assert run.query(counted).item() == whole.query(counted).item()
    _elsewhere(monkeypatch, url)
    with pytest.raises(StoreError, match="was finished or removed"):
        store.open_run(watched.directory / "shared.live")
    assert [entry.live for entry in watched.entries() if entry.name == "shared"] == [False]


def _finish(directory: Path) -> str | None:
    """What a driver does that goes on with a run."""
    finished = delivery.undelivered(directory, "shared")
    if finished is None:
        delivery.gather(directory / "shared.live")
        writer = RunWriter.resume(directory, "shared")
        try:
            finished = writer.finish(seconds=1.0)
        finally:
            writer.close()
    return delivery.deliver(finished)


def _elsewhere(monkeypatch: pytest.MonkeyPatch, url: str) -> Catalog:
    monkeypatch.setenv("MOESCOPE_CACHE", f"{Path(store.located(url)).parent.parent / 'elsewhere'}")
    mirror._mirrors.clear()
    return Catalog(url)


def _home(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    monkeypatch.setenv("MOESCOPE_CACHE", str(directory.parent))
    mirror._mirrors.clear()


def test_shards_of_another_run_of_the_name_are_never_mixed_in(
    url: str, s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = store.located(url)
    first = RunWriter.create(directory, "both", synthetic.info())
    shard(store.shard_target(delivery.announce(first.folder)), 0, 0)
    first.close()
    _elsewhere(monkeypatch, url)
    second = RunWriter.create(store.located(url), "both", synthetic.info())
    with pytest.raises(StoreError, match="has an unfinished run 'both'"):
        delivery.announce(second.folder)
    with pytest.raises(StoreError, match="is another run than"):
        delivery.gather(second.folder)
    second.write_shard(synthetic.tables(3))
    delivery.deliver(second.finish())
    assert "both.live/run.json" in objects(s3, url), "somebody else's, which stays"
    key = f"{url.removeprefix(BUCKET + '/')}/both.live/shard-000000.json"
    s3.put_object(Bucket="bucket", Key=key, Body=b'{"part": "../x", "files": {}}')
    with pytest.raises(ShardError, match="is damaged"):
        collecting.gather(Objects(url), first.folder)


def _one_line(capsys: pytest.CaptureFixture[str]) -> str:
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and SECRET not in said and "Traceback" not in said
    return said


def test_what_goes_wrong_is_said_in_one_line(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["runs", "--store", "s3://no-such-bucket-here/x"]) == 2
    assert "there is no such bucket" in _one_line(capsys)
    assert main(["show", "none", "--store", url]) == 2
    assert _one_line(capsys) == f"moescope: no run 'none' in {url}; it has mine\n"
    made = tmp_path / "made" / "mine.duckdb"
    for doing, name, command in (
        ("listed", "ls", ["runs", "--store", url]),
        ("read", "cat_file", ["show", "mine", "--store", url]),
        (
            "written",
            "put_file",
            ["runs", "push", str(synthetic.finished(tmp_path / "else", "yours", sequences=6)), "--store", url],
        ),
    ):
        mirror._mirrors.clear()
        with monkeypatch.context() as patch:
            import s3fs

            def denied(*_: Any, **__: Any) -> None:
                raise PermissionError(f"Forbidden https://host/?X-Amz-Signature={SECRET}")

            patch.setattr(s3fs.S3FileSystem, name, denied)
            assert main(command) == 2
            assert f"cannot be {doing}: access was denied" in _one_line(capsys)
    mirror._mirrors.clear()
    for module in ("fsspec", "s3fs"):
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules["fsspec.registry"], "registry", {})
            patch.setitem(sys.modules, module, None)
            mirror._mirrors.clear()
            assert main(["runs", "--store", url]) == 2
            assert _one_line(capsys) == "moescope: s3:// needs fsspec and s3fs: pip install 'moescope[remote]'\n"
    mirror._mirrors.clear()
    with monkeypatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.delenv(name)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("HOME", str(tmp_path))
        assert main(["runs", "--store", url]) == 2
        assert "no credentials were found" in _one_line(capsys)
    with socket.socket() as closed, monkeypatch.context() as patch:
        closed.bind(("127.0.0.1", 0))  # nobody listens
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        began = time.monotonic()
        assert main(["runs", "--store", url]) == 2
        assert "does not answer" in _one_line(capsys) and time.monotonic() - began < 15
    with monkeypatch.context() as patch:
        patch.setenv("MOESCOPE_CACHE", str(made))
        with pytest.raises(SystemExit):
            main(["runs", "--store", url])
        assert "MOESCOPE_CACHE names another folder" in capsys.readouterr().err
    kept = b"".join(file.read_bytes() for file in (tmp_path / "cache").rglob("*.json"))
    assert SECRET.encode() not in kept and b"testing" not in kept


@pytest.mark.parametrize(
    ("text", "words"),
    [("s3://key:word@bucket/x", "password"), ("s3://bucket/x?sig=word", "no '\\?'"), ("s3://bucket/../x", "'..'"),
     ("s3://", "names no bucket"), ("s3://bucket/a\x1b[31m", "control"), ("nosuch://bucket/x", "nothing that is")],
)  # fmt: skip
def test_urls_that_cannot_be_stores_are_refused(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as refused:
        Catalog(text).entries()
    assert "word" not in str(refused.value).replace("password", "")


def test_urls_and_paths_stand_side_by_side(tmp_path: Path) -> None:
    assert remote.split_stores("/a:s3://b/c:/d") == ["/a", "s3://b/c", "/d"]
    assert store.located(f"file://{tmp_path}") == tmp_path
    assert location.checked("s3://bucket//a/") == "s3://bucket/a"
    # A folder that somebody handed over sends nobody anywhere.
    (tmp_path / location.NAME_FILE).write_text(json.dumps({"url": "s3://theirs/x", "endpoint": ""}))
    assert remote.mirror_of(tmp_path) is None and Catalog(tmp_path).entries() == []


def test_other_protocols_do_the_same(tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}/runs"
    made = synthetic.finished(tmp_path / "made", "mine")
    assert Catalog(url).entries() == []
    assert main(["runs", "push", str(made), "--store", url]) == 0
    shutil.rmtree(os.environ["MOESCOPE_CACHE"])
    with store.open_run(f"{url}/mine.duckdb", fetch=False) as lying, store.open_run(made) as run:
        assert lying.table("layer").equals(run.table("layer"))
    with store.open_run(f"{url}/mine.duckdb") as fetched:
        assert fetched.has_trace and len(fetched.metrics())
    target = store.shard_target(f"{url}/two.live")
    assert shard(target, 3, 0) and not shard(target, 3, 0) and target.numbers() == {3}
    system = fsspec.filesystem("memory")
    for name in (
        "../up.duckdb",
        "..duckdb",
        "a\nb.duckdb",
        "..live/run.json",
        "a/../../b.duckdb",
        "mine.plans/../x.json",
    ):
        system.store[f"/{tmp_path.name}/runs/{name}"] = system.store[f"/{tmp_path.name}/runs/mine.duckdb"]
    mirror._mirrors.clear()
    assert [(entry.name, entry.live) for entry in Catalog(url).entries()] == [("mine", False), ("two", True)]
