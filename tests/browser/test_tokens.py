"""The page Tokens in a browser: found text is underlined, experts are picked, keys move, and the measure follows."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from tests.browser.driver import Watched, open_page, settle

pytestmark = pytest.mark.browser


def test_found_text_is_underlined_and_an_expert_is_picked(watched: Watched, url: str) -> None:
    page = watched.page
    open_page(page, url, "tokens?run=plain&sequence=4&layer=3&colour=entropy&find=text&text=plain%20ü")
    expect(page.locator(".legend .ramp")).to_be_visible()
    expect(page.locator(".text .token.marked")).to_have_count(0)
    page.get_by_label("Text", exact=True).fill("本")
    page.get_by_label("Text", exact=True).press("Enter")
    expect(page.locator(".text .token.marked")).to_have_count(2)
    page.locator(".token").nth(9).hover()
    expect(page.locator(".detail .value")).to_contain_text("entropy of the gate weights, layer 3")
    chip = page.locator(".detail .row").nth(1).locator("button.chip").first
    expert = chip.evaluate("node => node.firstChild.textContent")
    page.locator(".strip .text").focus()
    page.keyboard.press("End")
    expect(page.locator(".detail .heading")).to_contain_text("Position 79")
    page.locator(".token").nth(9).click()
    settle(page)
    page.locator(".detail .row").nth(1).locator("button.chip").first.click()
    expect(page.locator(".detail .row.chosen .layer")).to_have_text("L 2")
    settle(page)
    for part in ("layer=2", f"expert={expert}", "token=9", "sequence=4"):
        assert part in page.url
