"""One server and one browser for all browser tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from app.serve import start
from tests.browser.driver import Watched, watched_page

sys.path.insert(0, str(Path(__file__).parents[1] / "app"))
import synthetic


@pytest.fixture(scope="session")
def store_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a finished run, a second one, and one of hostile text."""
    directory = tmp_path_factory.mktemp("a store")
    synthetic.finished(directory, "hostile", hostile=True)
    synthetic.finished(directory, "other", sequences=12)
    synthetic.finished(directory, "plain")
    return directory


@pytest.fixture(scope="session")
def url(store_directory: Path) -> Iterator[str]:
    """The address of a running dashboard."""
    server, address = start(store_directory, browser=False)
    yield address
    server.terminate()
    server.wait(timeout=10)


@pytest.fixture
def watched(browser: Browser) -> Iterator[Watched]:
    """A fresh light page; fails the test on console errors and foreign requests."""
    with watched_page(browser) as opened:
        yield opened
        opened.assert_clean()
