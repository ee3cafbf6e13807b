"""Shared by all tests: the browser option, and no network."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# Models and tokenizers come from folders; a test that would ask a hub must fail at once, not wait for it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:  # several processes share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-browser", action="store_true", help="fail instead of skipping without a browser")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if CHROMIUM is not None:
        return
    waiting = [item for item in items if item.get_closest_marker("browser")]
    if waiting and config.getoption("--require-browser"):
        raise pytest.UsageError(f"no Chromium found: {len(waiting)} browser tests cannot run")
    for item in waiting:
        item.add_marker(pytest.mark.skip(reason="no Chromium on this machine"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if CHROMIUM is None:
        terminalreporter.section("BROWSER TESTS WERE SKIPPED: no Chromium found", sep="!", red=True, bold=True)


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of the browser; only tests marked ``browser`` ask for it."""
    assert CHROMIUM is not None
    return CHROMIUM


@pytest.fixture(scope="session")
def browser(chromium: str) -> Iterator[Browser]:
    """A headless Chromium; one per process, since Playwright allows no second one in it."""
    from tests.browser.driver import chromium_browser

    with chromium_browser(chromium) as opened:
        yield opened
