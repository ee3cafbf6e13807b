"""The page Cache in a browser: it draws, hostile text stays text, and choices stand in the address."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from tests.browser.driver import Watched, open_page, settle, show_in

pytestmark = pytest.mark.browser
ASKED = "context-length=512&other-weights=0.001"


def test_all_charts_are_drawn_and_hostile_text_stays_text(watched: Watched, url: str) -> None:
    page = watched.page
    open_page(page, url, f"cache?run=hostile&{ASKED}")
    expect(page.locator("[data-testid='stPlotlyChart'] .main-svg").first).to_be_visible()
    for section, charts in (("Hit rates", 2), ("Domains", 2), ("One token", 1), ("Speed", 2)):
        page.get_by_role("radio", name=section, exact=True).click()
        settle(page)
        expect(page.locator("[data-testid='stPlotlyChart']")).to_have_count(charts)
    show_in(page, "dark")
    expect(page.locator("[data-testid='stPlotlyChart'] .main-svg").first).to_be_visible()
    assert page.evaluate("window.hacked === undefined")


def test_the_memory_stands_in_the_address(watched: Watched, url: str) -> None:
    page = watched.page
    open_page(page, url, f"cache?run=plain&{ASKED}&vram=0.002")
    memory = page.get_by_label("Device memory, GiB", exact=True)
    expect(memory).to_have_value("0.002")
    memory.fill("0.003")
    memory.press("Enter")
    settle(page)
    expect(page.get_by_text("All fits")).to_be_visible()
    assert "vram=0.003" in page.url
