"""Below a base path and for two users at once, in a browser; and text made to harm on every page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from app.address import Address
from app.serve import start
from app.views import PAGES
from tests.browser import driver
from tests.browser.driver import Watched, open_page, settle, watched_page

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def below(store_directory: Path) -> Iterator[str]:
    """A dashboard below ``/lab/moe``."""
    server, url = start(store_directory, Address(base_path="lab/moe"), browser=False)
    yield url
    server.terminate()
    server.wait(timeout=10)


def test_links_clicks_and_deep_links_stay_below_the_base_path(browser: Browser, below: str) -> None:
    with watched_page(browser) as watched:
        page = watched.page
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        open_page(page, below, "routing?run=plain&layer=2")
        expect(page.get_by_label("Layer", exact=True)).to_have_value("2")
        box = page.locator(".nsewdrag").first.bounding_box()
        assert box is not None
        page.mouse.click(box["x"] + box["width"] * 0.4, box["y"] + box["height"] * 0.6)
        expect(page.get_by_label("Expert", exact=True)).not_to_have_value("", timeout=20_000)
        settle(page)
        assert page.url.startswith(f"{below}/routing?") and "expert=" in page.url
        page.get_by_test_id("stSidebarNav").get_by_role("link", name="Tokens").click()
        expect(page.locator(".token").first).to_be_visible(timeout=20_000)
        assert page.url.startswith(f"{below}/tokens")
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        page.get_by_role("button", name="Copy link").click()
        expect(page.get_by_role("button", name="Copied")).to_be_visible()
        assert page.evaluate("navigator.clipboard.readText()") == page.url
        page.reload()
        expect(page.locator(".token").first).to_be_visible(timeout=20_000)
        outside = [url for url in asked if not url.startswith((f"{below}/", "data:", "blob:"))]
        assert outside == []
        watched.assert_clean()


def test_two_users_look_at_different_things(browser: Browser, below: str) -> None:
    with watched_page(browser) as one, watched_page(browser) as other:
        open_page(one.page, below, "routing?run=plain&layer=1")
        open_page(other.page, below, "similarity?run=other&layer=5")
        one.page.locator(".st-key-section").get_by_text("Confidence").click()
        settle(one.page)
        settle(other.page)
        for tab, run, layer in ((one.page, "plain", "1"), (other.page, "other", "5")):
            expect(tab.get_by_label("Layer", exact=True)).to_have_value(layer)
            assert f"run={run}" in tab.url
        assert "Confidence" in one.page.url and "Confidence" not in other.page.url
        one.assert_clean()
        other.assert_clean()


def test_pages_that_no_other_test_opens_on_hostile_text(watched: Watched, url: str) -> None:
    """tests/browser/test_dashboard.py opens the others: no script, no dialog, no request elsewhere."""
    page = watched.page
    asked: list[str] = []
    page.on("dialog", lambda dialog: asked.append(f"dialog {dialog.message}"))
    for info in [info for info in PAGES[1:] if info.url not in driver.PAGES]:
        page.goto(f"{url}/{info.url}?run=hostile")
        settle(page)
        assert page.evaluate("window.hacked === undefined"), info.title
        main = page.get_by_test_id("stMain")
        assert main.evaluate("node => node.scrollWidth <= node.clientWidth + 1"), info.title
    assert asked == []
