"""What only a browser can show: drawing, hovering, clicking, links, and that nothing leaves this machine."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.browser.driver import PAGES, Watched, open_page, settle, show_in

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("path", PAGES)
def test_every_page_draws_in_light_and_dark_and_hostile_text_stays_text(watched: Watched, url: str, path: str) -> None:
    page = watched.page
    open_page(page, url, f"{path}?run=hostile&{PAGES[path]}")
    for scheme in ("light", "dark"):
        show_in(page, scheme)
        expect(page.locator("[data-testid='stPlotlyChart']").first.locator(".main-svg").first).to_be_visible()
    if path == "tokens":
        expect(page.locator(".token").nth(3)).to_contain_text("<script>")
        page.locator(".token").nth(3).hover()
        expect(page.locator(".detail .heading")).to_contain_text("<script>")
    assert page.evaluate("window.hacked === undefined")


def test_figures_say_what_a_cell_is_and_follow_a_switch_of_the_theme(watched: Watched, url: str) -> None:
    page = watched.page
    open_page(page, url, "routing?run=plain")
    box = page.locator(".nsewdrag").first.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.4)
    expect(page.locator(".hoverlayer").first).to_contain_text("of the layer's selections")
    title = page.locator(".gtitle").first
    expect(title).to_have_css("fill", "rgb(23, 33, 43)")
    line = page.locator(".scatterlayer .js-line").first
    before = line.evaluate("node => getComputedStyle(node).stroke")
    page.emulate_media(color_scheme="dark")
    expect(title).not_to_have_css("fill", "rgb(23, 33, 43)")
    expect(line).not_to_have_css("stroke", before)


def test_choosing_a_run_changes_page_and_address(watched: Watched, url: str) -> None:
    page = watched.page
    open_page(page, url, "?run=plain", charts=False)
    expect(page.get_by_test_id("stMetricValue").nth(1)).to_have_text("9")
    page.get_by_test_id("stSidebar").get_by_test_id("stSelectbox").click()
    page.get_by_role("option", name="other").click()
    expect(page.get_by_test_id("stMetricValue").nth(1)).to_have_text("12")
    settle(page)
    assert "run=other" in page.url


def test_a_link_restores_the_view_and_hovering_shows_experts(watched: Watched, url: str) -> None:
    page = watched.page
    open_page(page, url, "tokens?run=plain&sequence=4&layer=3&token=6")
    expect(page.locator(".token")).to_have_count(80)
    expect(page.locator(".detail .heading")).to_contain_text("Position 6")
    expect(page.locator(".detail .row.chosen .layer")).to_have_text("L 3")
    page.locator(".token").nth(9).hover()
    expect(page.locator(".detail .heading")).to_contain_text("Position 9")
    expect(page.locator(".detail .row")).to_have_count(4)
    expect(page.locator(".detail .row").first.locator(".chip")).to_have_count(2)


def test_a_click_keeps_a_token_and_names_it_in_the_address(watched: Watched, url: str) -> None:
    page = watched.page
    open_page(page, url, "tokens?run=plain")
    expect(page.locator(".token").nth(6)).to_have_text("…")  # a character over two tokens is read whole
    expect(page.locator(".token").nth(7)).to_have_text("本")
    page.locator(".token").nth(11).click()
    expect(page.get_by_role("heading", name="Experts of the token at position 11")).to_be_visible()
    settle(page)
    assert "token=11" in page.url
    page.locator(".text").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".detail .heading")).to_contain_text("Position 12")


def test_data_and_figure_can_be_downloaded(watched: Watched, url: str, tmp_path: Path) -> None:
    page = watched.page
    open_page(page, url, "super-experts?run=plain")
    page.get_by_test_id("stPopover").get_by_role("button").first.click()
    with page.expect_download() as caught:
        page.get_by_role("button", name="Data, CSV").click()
    caught.value.save_as(tmp_path / "data.csv")
    assert caught.value.suggested_filename == "plain-outputs-all.csv"
    rows = list(csv.DictReader((tmp_path / "data.csv").open(encoding="utf-8")))
    assert (rows[0]["layer"], rows[0]["expert"], rows[0]["paper"]) == ("2", "5", "true")
    with page.expect_download() as caught:
        page.get_by_role("button", name="Figure, HTML").click()
    caught.value.save_as(tmp_path / "figure.html")
    html = (tmp_path / "figure.html").read_text(encoding="utf-8")
    assert "Largest output of each expert" in html
    assert "cdn.plot.ly" not in html.split("<script", 1)[0]
    with page.expect_download() as caught:
        page.get_by_role("button", name="Data, Parquet").click()
    caught.value.save_as(tmp_path / "data.parquet")
    assert (tmp_path / "data.parquet").read_bytes()[:4] == b"PAR1"


def test_pages_follow_a_run_while_it_grows(browser, url: str, store_directory: Path) -> None:  # type: ignore[no-untyped-def]
    import synthetic

    from tests.browser.driver import watched_page

    writer = synthetic.live(store_directory, "growing")
    try:
        with watched_page(browser) as watched:
            page = watched.page
            open_page(page, url, "?run=growing", charts=False)
            expect(page.get_by_test_id("stProgress")).to_contain_text("240 of 10,000 tokens")
            expect(page.get_by_test_id("stMetricValue").first).to_have_text("240")
            writer.write_shard(synthetic.tables(3, start=3))
            expect(page.get_by_test_id("stMetricValue").first).to_have_text("480", timeout=20_000)
            writer.finish(seconds=1.0)
            expect(page.get_by_test_id("stProgress")).to_have_count(0, timeout=20_000)
            expect(page.get_by_test_id("stMetricValue").first).to_have_text("480")
            watched.assert_clean()
    finally:
        (store_directory / "growing.duckdb").unlink(missing_ok=True)


def test_an_empty_store_says_what_to_do(browser, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    import synthetic

    from app.serve import start
    from tests.browser.driver import watched_page

    server, address = start(tmp_path / "empty", browser=False)
    try:
        with watched_page(browser) as watched:
            open_page(watched.page, address, charts=False)
            expect(watched.page.get_by_text("moescope demo")).to_be_visible()
            # The first run appears by itself.
            synthetic.finished(tmp_path / "empty", "first")
            expect(watched.page.get_by_role("heading", name="Overview")).to_be_visible(timeout=20_000)
            watched.assert_clean()
    finally:
        server.terminate()
        server.wait(timeout=10)
