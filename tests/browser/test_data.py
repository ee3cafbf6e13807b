"""The page Data in a browser: Ctrl+Enter asks, examples fill, cells pick, and answers are saved."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import quote

import polars as pl
import pytest
from playwright.sync_api import expect

from tests.browser.driver import Watched, open_page, settle, show_in

pytestmark = pytest.mark.browser
LAYERS = "select layer, sum(tokens) as tokens from expert_load group by layer order by layer"


def test_ctrl_enter_asks_and_the_address_holds_the_question(watched: Watched, url: str, tmp_path: Path) -> None:
    page = watched.page
    open_page(page, url, "data?run=plain", charts=False)
    question = page.get_by_label("Question", exact=True)
    expect(page.get_by_text("rows in").first).to_be_visible(timeout=30_000)
    question.fill(LAYERS)
    question.press("Control+Enter")
    settle(page)
    expect(page).to_have_url(re.compile(r"sql=select(\+|%20)layer%2C"), timeout=20_000)
    expect(page.get_by_text(re.compile(r"^4 rows in")).first).to_be_visible(timeout=30_000)
    page.locator(".st-key-download-answer").get_by_role("button").first.click()
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Data, Parquet").click()
    target = tmp_path / "answer.parquet"
    waiting.value.save_as(target)
    assert pl.read_parquet(target).columns == ["layer", "tokens"]


def test_an_example_as_a_map_whose_cells_pick(watched: Watched, url: str) -> None:
    page = watched.page
    open_page(page, url, "data?run=plain&show=chart")
    page.locator(".st-key-sql-example").get_by_text("Load of each expert").click()
    settle(page)
    show_in(page, "dark")
    area = page.locator(".nsewdrag").first
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    assert box is not None
    page.mouse.click(box["x"] + box["width"] * 0.4, box["y"] + box["height"] * 0.25)
    expect(page.get_by_label("Layer", exact=True)).not_to_have_value("", timeout=20_000)
    settle(page)
    assert "layer=" in page.url and "expert=" in page.url


def test_hostile_text_stays_text(watched: Watched, url: str) -> None:
    page = watched.page
    sql = quote("select distinct domain, source, '<img src=x onerror=alert(1)>' as \"<b>\" from sequence")
    open_page(page, url, f"data?run=hostile&sql={sql}&table=sequence", charts=False)
    for section in ("", "Tables", "Methods", "Files"):
        if section:
            page.get_by_role("radio", name=section, exact=True).click()
            settle(page)
        expect(page.get_by_test_id("stDataFrame").first).to_be_visible(timeout=30_000)
        assert page.evaluate("window.hacked === undefined")
