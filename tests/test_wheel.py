"""The wheel: what it holds, how large it is, and that it works installed, without the checkout and without torch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import sysconfig
import time
import tomllib
import urllib.request
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

ROOT = Path(__file__).parents[1]
MAX_BYTES = 3 * 2**20
"""Of a wheel without the sample."""

ABSENT = ("torch", "transformers", "moescope", "__pycache__")
"""What the new environment does not get from this one; nor .pth files, which name the checkout."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the checkout without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", str(ROOT), *options, "--wheel-dir", str(folder)], check=True)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel, the dependencies of this one, and neither the checkout nor torch."""
    folder = tmp_path_factory.mktemp("an environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    options = ["--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check", "--quiet"]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), "install", *options, str(wheel)], check=True)
    (packages,) = folder.glob("lib/*/site-packages")
    for found in Path(sysconfig.get_path("purelib")).iterdir():
        wanted = not found.name.startswith(ABSENT) and found.suffix != ".pth"
        if wanted and not (packages / found.name).exists():
            (packages / found.name).symlink_to(found)
    return folder


@pytest.fixture
def moescope(installed: Path, tmp_path: Path) -> tuple[str, Path, dict[str, str]]:
    """The command, a folder to stand in, and the environment."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MOESCOPE"))}
    return str(installed / "bin" / "moescope"), tmp_path, environment


def test_every_file_of_the_packages_is_inside(wheel: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    tracked = subprocess.run(["git", "ls-files", *packages], cwd=ROOT, capture_output=True, text=True, check=True)
    files = {line for line in tracked.stdout.splitlines() if (ROOT / line).is_file()}
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    assert files - inside == set()
    assert {Path(name).suffix for name in files} >= {".js", ".css", ".sql", ".toml", ".csv", ".duckdb", ".typed"}
    assert [name for name in inside if "__pycache__" in name or name.startswith(("tests/", "docs/"))] == []


def test_it_is_small(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        sizes = {one.filename: one.compress_size for one in archive.infolist()}
    without = sum(size for name, size in sizes.items() if not name.startswith("sample_data/"))
    print(f"the wheel without the sample: {without / 2**20:.2f} MiB; with it: {wheel.stat().st_size / 2**20:.2f} MiB")
    assert 0 < without < MAX_BYTES


def test_commands_work_without_torch(moescope: tuple[str, Path, dict[str, str]], installed: Path) -> None:
    command, folder, environment = moescope

    def said(*arguments: str) -> str:
        done = subprocess.run(
            [command, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "dashboard" in said("--help")
    python = str(installed / "bin" / "python")
    code = "import app, importlib.util as util; print(app.__file__, util.find_spec('torch'), sep='\\n')"
    found = subprocess.run([python, "-P", "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert found.stdout.splitlines() == [str(next(installed.glob("lib/*/site-packages/app/__init__.py"))), "None"]
    run = sample_store(installed) / "sample.duckdb"
    shown = json.loads(said("show", str(run), "--json"))
    assert shown["path"] == str(run)
    assert shown["info"]["tokens"] > 100_000
    said("report", str(run), "-o", "report.html")
    assert (folder / "report.html").stat().st_size > 100_000
    said("figure", str(run), "load", "-o", "load.csv")
    assert len((folder / "load.csv").read_text(encoding="utf-8").splitlines()) > shown["info"]["num_layers"]
    assert json.loads(said("query", str(run), "SELECT sum(tokens) AS tokens FROM sequence", "--json")) == [
        {"tokens": shown["info"]["tokens"]}
    ]


@pytest.fixture
def dashboard(moescope: tuple[str, Path, dict[str, str]], installed: Path) -> Iterator[str]:
    """The address of a dashboard on the bundled run, started by the command from a folder of its own."""
    command, folder, environment = moescope
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ["dashboard", "--store", str(sample_store(installed)), "--port", str(port), "--no-browser"]
    server = subprocess.Popen([command, *arguments], cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(f"{url}/_stcore/health", server)
        yield url
    finally:
        server.terminate()
        server.wait(timeout=30)


@pytest.mark.browser
def test_every_page_of_the_installed_dashboard(dashboard: str, browser: Browser) -> None:
    from playwright.sync_api import expect

    from app.views import PAGES
    from tests.browser.driver import open_page, settle, watched_page

    with watched_page(browser) as watched:
        page = watched.page
        open_page(page, dashboard, charts=False)
        shell = page.get_by_test_id("stApp")
        # The theme beside the main script is applied: these are not Streamlit's own colours.
        expect(page.locator("h1").first).to_have_css("color", "rgb(23, 33, 43)")
        page.emulate_media(color_scheme="dark")
        expect(shell).to_have_css("background-color", "rgb(16, 23, 31)")
        # Cache comes last, and only its title is awaited: in a new environment it compiles its simulators first.
        for info in sorted(PAGES[1:], key=lambda info: info.url == "cache"):
            page.get_by_test_id("stSidebarNavLink").filter(has_text=info.title).first.click()
            expect(page.locator("h1").first, info.title).to_have_text(info.title, timeout=60_000)
            if info.url != "cache":
                settle(page)
            expect(page.get_by_test_id("stAlertContentError")).to_have_count(0)
        watched.assert_clean()


def sample_store(installed: Path) -> Path:
    """The folder of the bundled run."""
    (found,) = installed.glob("lib/*/site-packages/sample_data/runs")
    return found


def wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    """Wait until the server answers "ok"."""
    for _ in range(600):
        assert server.poll() is None, f"the server ended with {server.returncode}"
        try:
            with urllib.request.urlopen(url, timeout=1) as answer:
                if answer.read() == b"ok":
                    return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"{url} did not answer")
