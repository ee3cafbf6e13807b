"""A job in the background, seen from two tabs: both show it, one stops it, the other hears of it by itself."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from app import jobs
from tests.browser.driver import open_page, settle, watched_page

pytestmark = pytest.mark.browser


def test_two_tabs_see_one_job(browser: Browser, url: str, store_directory: Path) -> None:
    run, waiting = store_directory / "plain.duckdb", store_directory / "waiting.json"
    os.mkfifo(waiting)  # a plan that nobody writes: the job waits for it until it is stopped
    job = jobs.start(
        run, plan=waiting, digest="0" * 64, source=store_directory, destination=store_directory / "smaller"
    )
    try:
        with watched_page(browser) as first, watched_page(browser) as second:
            for tab in (first, second):
                open_page(tab.page, url, "compress?run=plain", charts=False)
                expect(tab.page.get_by_role("button", name="Stop")).to_be_visible(timeout=60_000)
            second.page.get_by_role("button", name="Stop").click()
            for tab in (first, second):
                expect(tab.page.get_by_role("button", name="Go on")).to_be_visible(timeout=60_000)
                expect(tab.page.get_by_role("button", name="Stop")).to_have_count(0)
            first.page.reload()
            settle(first.page)
            expect(first.page.get_by_role("button", name="Go on")).to_be_visible(timeout=60_000)
            first.assert_clean()
            second.assert_clean()
    finally:
        jobs.stop(job)
        end = time.monotonic() + 30
        while jobs.is_alive(job) and time.monotonic() < end:
            time.sleep(0.1)
        waiting.unlink()
    assert jobs.status(job).state == "stopped"
