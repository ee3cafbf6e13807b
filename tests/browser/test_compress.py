"""The page Compress in a browser: the budget is a slider, and stands in the address."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from tests.browser.driver import Watched, open_page, settle

pytestmark = pytest.mark.browser


def test_the_budget_stands_in_the_address(watched: Watched, url: str) -> None:
    page = watched.page
    open_page(page, url, "compress?run=plain&budget=40", charts=False)
    slider = page.get_by_role("slider").first
    expect(slider).to_have_value("40")
    slider.focus()
    page.keyboard.press("ArrowRight")
    expect(slider).to_have_value("41")
    settle(page)
    assert "budget=41" in page.url
    page.reload()
    settle(page)
    expect(page.get_by_role("slider").first).to_have_value("41")
