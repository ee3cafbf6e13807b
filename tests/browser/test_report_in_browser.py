"""The report in Chromium: opens from disk, draws, answers the mouse, and asks nobody for anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from app.cli import main
from tests.browser.driver import Watched

pytestmark = pytest.mark.browser


@pytest.fixture(scope="session")
def report(store_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of the report of the run of hostile text."""
    out = tmp_path_factory.mktemp("a report") / "report.html"
    assert main(["report", str(store_directory / "hostile.duckdb"), "-o", str(out), "--layers", "1"]) == 0
    return out.as_uri()


def background(page: Page) -> str:
    """The colour behind everything."""
    found: str = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return found


def test_it_opens_from_disk_and_answers(watched: Watched, report: str) -> None:
    page = watched.page
    page.goto(f"{report}#load")
    load = page.locator("#p-load")
    load.locator(".heatmaplayer image").wait_for(state="attached", timeout=60_000)
    assert page.evaluate("window.hacked") is None
    box = load.locator(".nsewdrag").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + box["height"] * 0.5)
    expect(load.locator(".hoverlayer .hovertext")).to_have_count(1)
    assert background(page) == "rgb(255, 255, 255)"
    page.emulate_media(color_scheme="dark")
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    assert background(page) != "rgb(255, 255, 255)"
    page.get_by_role("button", name="light", exact=True).click()
    assert background(page) == "rgb(255, 255, 255)"
    expect(load).to_have_js_property("drawn", "light")


def test_data_and_pictures_are_saved_and_all_is_printed(watched: Watched, report: str, tmp_path: Path) -> None:
    page = watched.page
    page.goto(report)
    page.wait_for_selector("html[data-ready=yes]", timeout=60_000)
    for what, begins in (("CSV", b"layer,step,label,expert"), ("SVG", b"<svg")):
        with page.expect_download() as waiting:
            page.locator("#load").get_by_role("button", name=what).click()
        waiting.value.save_as(tmp_path / what)
        assert (tmp_path / what).read_bytes().startswith(begins)
    figures = page.locator(".plot").count()
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert page.locator(".plot:has(.main-svg)").count() == figures > 5
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
