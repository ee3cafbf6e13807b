"""Shared by all tests: the browser option, no network, and signals that stay as they were."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
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

LONG = (
    "profiler/capture/test_families.py", "browser/test_dashboard.py", "app/test_page_shapes.py", "test_wheel.py",
    "faults/test_kills.py", "profiler/workers/test_collect_on_ray.py", "test_cluster.py", "store/test_remote.py",
    "profiler/test_memory_limit.py",
    "profiler/capture/test_watch.py", "app/test_pages.py", "browser/test_focus.py", "app/test_recommend_command.py",
    "app/test_compress_page.py", "browser/test_report_in_browser.py", "app/test_compress_advice.py",
    "browser/test_data.py", "app/test_plan_command.py", "app/test_rank_command.py", "browser/test_cache.py",
    "profiler/importers/test_hostile.py", "browser/test_background_jobs.py", "app/test_placement_page.py",
    "browser/test_compress.py", "compressor/test_autoround_backend.py", "profiler/test_planted_super_experts.py",
    "planner/test_copied_expert.py", "planner/simulate/test_cache_curves.py", "app/test_checkpoint_timeline.py",
    "app/test_jobs.py", "test_adding.py", "test_benchmarks.py",
)  # fmt: skip
"""Files of ten seconds and more, by their path here: they begin first, so that none is left to run alone at the end."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-browser", action="store_true", help="fail instead of skipping without a browser")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path, len(LONG)))
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


@pytest.fixture(autouse=True)
def _sigterm_stays() -> Iterator[None]:
    """A handler that a test leaves behind ends a later one, or its whole process, in some orders only."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    assert signal.getsignal(signal.SIGTERM) == before, "this test leaves a handler of SIGTERM behind"


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
