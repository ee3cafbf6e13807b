"""One server for the tests that ask it over the network; and the runs of ``tests/app/synthetic.py``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.address import Address
from app.serve import start
from tests.security.serving import Served

sys.path.insert(0, str(Path(__file__).parents[1] / "app"))
import synthetic

# Python runs a file of this name first, wherever it finds one: it notes whom the server talks to.
_NOTES = """
import os, sys
def note(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        with open(os.environ["MOESCOPE_TEST_NOTES"], "a") as file:
            file.write(f"{event} {arguments[1] if event == 'socket.connect' else arguments[0]!r}\\n")
sys.addaudithook(note)
with open(os.environ["MOESCOPE_TEST_NOTES"], "a") as file:
    file.write("began\\n")
"""


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A dashboard below ``/some/where`` that also answers as ``moe.example.org`` and below ``lab.example``."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "sitecustomize.py").write_text(_NOTES, encoding="utf-8")
    for name in ("ada", "bob"):
        synthetic.finished(folder / "runs", name)
    names = ("moe.example.org", "*.lab.example")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        patch.setenv("MOESCOPE_TEST_NOTES", str(folder / "notes.txt"))
        server, url = start(folder / "runs", Address(base_path="some/where", names=names), browser=False)
    yield Served(url, int(url.split(":")[2].split("/")[0]), folder / "notes.txt")
    server.terminate()
    server.wait(timeout=10)
