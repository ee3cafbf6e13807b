"""The focus: a click in a chart or the bar moves it on every page, the address names it, and back goes back."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Page, expect

from tests.browser.driver import Watched, box_of, open_page, settle, watched_page

pytestmark = pytest.mark.browser

LAYERS, EXPERTS = ("1", "2", "3", "5"), 16
"""Of the synthetic run: its MoE layers, in the order of the map's rows."""


def click_cell(page: Page, row: int, column: int) -> None:
    """Click the middle of a cell of the page's first map."""
    box = box_of(page.locator(".nsewdrag").first)
    page.mouse.click(
        box["x"] + box["width"] * (column + 0.5) / EXPERTS, box["y"] + box["height"] * (row + 0.5) / len(LAYERS)
    )


def chosen(page: Page, field: str) -> str | None:
    """What the bar shows for a part of the focus."""
    return page.get_by_label(field, exact=True).first.input_value()


def test_a_click_on_a_cell_moves_the_focus_everywhere_and_back_goes_back(watched: Watched, url: str) -> None:
    page = watched.page
    open_page(page, url, "routing?run=plain")
    click_cell(page, 2, 9)
    expect(page).to_have_url(re.compile("layer=3"))
    expect(page).to_have_url(re.compile("expert=9"))
    # The cell is marked, where it lies.
    settle(page)
    mark, plot = page.locator(".moescope-mark").first, page.locator(".nsewdrag").first
    expect(mark).to_be_visible()
    inner, outer = box_of(mark), box_of(plot)
    assert inner["x"] + inner["width"] / 2 == pytest.approx(outer["x"] + outer["width"] * 9.5 / EXPERTS, abs=3)
    assert inner["y"] + inner["height"] / 2 == pytest.approx(outer["y"] + outer["height"] * 2.5 / len(LAYERS), abs=3)
    # Another page follows.
    page.get_by_test_id("stSidebar").get_by_role("link", name="Expert", exact=True).click()
    settle(page)
    expect(page).to_have_url(re.compile("/expert.*layer=3|/expert.*expert=9"))
    assert (chosen(page, "Layer"), chosen(page, "Expert")) == ("3", "9")
    # Back, on the first page, before the second click.
    page.go_back()
    settle(page)
    expect(page).to_have_url(re.compile("/routing.*layer=3"))
    click_cell(page, 0, 4)
    expect(page).to_have_url(re.compile("layer=1"))
    expect(page).to_have_url(re.compile("expert=4"))
    while "expert=4" in page.url:
        page.go_back()
        settle(page)
    expect(page).to_have_url(re.compile("expert=9"))
    expect(page.get_by_label("Expert", exact=True).first).to_have_value("9")


def test_a_bad_address_falls_back_and_a_good_one_is_the_view(watched: Watched, url: str) -> None:
    page = watched.page
    open_page(page, url, "expert?run=plain&layer=99&expert=<b>&token=-7&section=nothing&domain=?")
    assert (chosen(page, "Layer"), chosen(page, "Expert"), chosen(page, "Token")) == ("", "", "")
    open_page(page, url, "expert?run=plain&layer=5&expert=7")
    assert (chosen(page, "Layer"), chosen(page, "Expert")) == ("5", "7")
    expect(page.locator(".moescope-mark").first).to_be_visible()


def test_the_link_of_a_view_is_copied_and_opens_the_same_view(browser, url: str) -> None:  # type: ignore[no-untyped-def]
    with watched_page(browser) as watched:
        watched.page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=url)
        open_page(watched.page, url, "routing?run=plain&domain=deutsch&layer=2")
        watched.page.get_by_role("button", name="Copy link").click()
        expect(watched.page.get_by_role("button", name="Copied")).to_be_visible()
        link = watched.page.evaluate("navigator.clipboard.readText()")
        watched.assert_clean()
    with watched_page(browser) as other:
        other.page.goto(link)
        settle(other.page)
        assert chosen(other.page, "Layer") == "2"
        assert "domain=deutsch" in other.page.url
        other.assert_clean()
