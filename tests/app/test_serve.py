"""The launcher: from any folder, beside files that would shadow ours, and its errors."""

from __future__ import annotations

import ast
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import synthetic

from app import address, serve
from app.address import Address, checked
from app.cli import main
from moescope.errors import InputError, RunError


@pytest.fixture
def hostile_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a space in its name and the user's own modules named like ours."""
    folder = tmp_path / "my folder"
    folder.mkdir()
    for name in ("store", "app", "profiler", "data", "state", "plotly"):
        (folder / f"{name}.py").write_text("raise SystemExit('the file of the user was imported')\n", encoding="utf-8")
    monkeypatch.chdir(folder)
    return folder


def test_no_script_writes_its_own_strings_onto_a_page() -> None:
    """Streamlit shows every string that stands alone in a script, also where the flag against it is not given."""
    assert "--runner.magicEnabled=false" in serve.command_line(Address(port=8501))
    scripts = [serve.SCRIPT.with_name("main.py"), *serve.SCRIPT.with_name("views").glob("*.py")]
    for script in scripts:
        first, *rest = ast.parse(script.read_text(encoding="utf-8")).body
        assert not [one.lineno for one in rest if isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant)]


def test_start_answers_and_serves_from_a_hostile_folder(hostile_folder: Path) -> None:
    synthetic.finished(hostile_folder / "runs of mine")
    server, url = serve.start(Path("runs of mine"), browser=False)
    try:
        with urllib.request.urlopen(f"{url}/_stcore/health", timeout=5) as answer:
            assert answer.read() == b"ok"
        assert server.poll() is None
    finally:
        server.terminate()
        assert server.wait(timeout=10) is not None


def test_serve_becomes_the_server_and_ends_with_a_signal(hostile_folder: Path) -> None:
    port = free_port()
    code = (
        "import pathlib; from app.address import Address; from app.serve import serve\n"
        f"serve(pathlib.Path('none'), Address(port={port}), browser=False)"
    )
    environment = serve.environment_for(Path("none"))
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        wait_for_health(f"http://127.0.0.1:{port}", process)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=15)
    finally:
        process.kill()
    assert f"http://127.0.0.1:{port}".encode() in output
    assert b"Traceback" not in output


def test_a_taken_port_is_an_error_and_the_next_free_one_is_found() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} on 127.0.0.1 is taken"):
            address.choose_port("127.0.0.1", port)
    assert address.choose_port("127.0.0.1", None) >= address.FIRST_PORT


@pytest.mark.parametrize(("host", "port"), [("203.0.113.7", None), ("no such host", 1), ("127.0.0.1", 99999)])
def test_impossible_addresses_are_input_errors(host: str, port: int | None) -> None:
    with pytest.raises(InputError):
        address.choose_port(host, port)


def test_the_command_is_closed_to_other_hosts() -> None:
    command = serve.command_line(Address(port=8501, names=("moe.example.org",)))
    assert command[1] == "-P"
    for flag in (
        "server.address=127.0.0.1",
        "browser.gatherUsageStats=false",
        "server.enableXsrfProtection=true",
        "server.allowedHosts=127.0.0.1",
        "server.allowedHosts=moe.example.org",
        "server.headless=true",
    ):
        assert f"--{flag}" in command
    assert not [flag for flag in serve.command_line(Address("0.0.0.0", 1)) if "allowedHosts" in flag]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "a-name"])
def test_other_addresses_need_a_flag_and_warn(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=r"needs --expose: everyone who reaches that address can read the runs"):
        checked(host)
    serve._warn_exposed(checked(host, expose=True))
    assert capsys.readouterr().err.startswith(f"warning: listening on {host}: everyone")
    assert main(["dashboard", "--host", host, "--no-browser"]) == 2
    assert main(["demo", "--host", host, "--no-browser"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_addresses_of_this_machine_only_need_none(capsys: pytest.CaptureFixture[str]) -> None:
    for host in ("127.0.0.1", "localhost", "::1", "127.8.0.1"):
        serve._warn_exposed(checked(host))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["*", "http://a.b", "a.b:80", "a b", "a/b", "", "<b>", "*.", "a..b"])
def test_names_that_no_host_has_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="--allowed-hosts"):
        checked("127.0.0.1", names=[name])


@pytest.mark.parametrize("path", ["../up", "a//b", "a b", "_stcore", "media/a", "a/..", "?a", "%2e"])
def test_base_paths_that_cannot_be_are_refused(path: str) -> None:
    with pytest.raises(InputError, match="--base-path"):
        checked("127.0.0.1", base_path=path)


def test_addresses_to_open() -> None:
    assert Address("0.0.0.0", 1).url == "http://127.0.0.1:1"
    assert Address("::1", 2).url == "http://[::1]:2"
    assert checked("127.0.0.1", port=3, base_path="/a/b/").url == "http://127.0.0.1:3/a/b"


def test_the_store_is_absolute_for_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert serve.environment_for(Path("runs"))["MOESCOPE_STORE"] == str(tmp_path / "runs")


def test_a_server_that_dies_is_reported_with_its_last_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(_: object) -> list[str]:
        return [sys.executable, "-c", "import sys; sys.exit('no such luck')"]

    monkeypatch.setattr(serve, "command_line", broken)
    with pytest.raises(RunError, match="no such luck"):
        serve.start(tmp_path, browser=False)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_health(url: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until a server answers, or fail with what it said."""
    for _ in range(300):
        if process.poll() is not None:
            raise AssertionError((process.stdout.read() if process.stdout else b"").decode())
        try:
            with urllib.request.urlopen(f"{url}/_stcore/health", timeout=1) as answer:
                if answer.read() == b"ok":
                    return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"{url} did not answer; {os.getcwd()}")
