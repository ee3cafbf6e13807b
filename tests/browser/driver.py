"""Driving the dashboard in Chromium: launch, settle, and what must never appear in the console or on the network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

from playwright.sync_api import Browser, FloatRect, Locator, Page, expect, sync_playwright

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PAGES = {
    "": "section=Text",
    "routing": "",
    "architecture": "",
    "tokens": "",
    "expert": "",
    "super-experts": "",
    "local-consistency": "",
    "similarity": "",
    "compress": "section=Plan",
    "placement": "",
    "what-if": "",
}
"""Pages that draw something on every run, with the section that does; Compare needs a second run, Data a question."""

# The frontend probes for a base path below sub-pages; both answers are 404 by design.
_HARMLESS = ("_stcore/health", "_stcore/host-config", "GPU stall", "GL Driver Message")


@dataclass
class Watched:
    """A page with everything that went wrong on it."""

    page: Page
    errors: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)

    def assert_clean(self) -> None:
        """Fail on an error in the console or a request to another host."""
        assert self.errors == []
        assert self.foreign == []


@contextmanager
def chromium_browser(executable: str) -> Iterator[Browser]:
    """A headless browser."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def watched_page(browser: Browser, *, theme: str = "light", width: int = 1400, height: int = 1000) -> Iterator[Watched]:
    """A page with a fresh profile in the given colour scheme."""
    context = browser.new_context(color_scheme=theme, viewport={"width": width, "height": height})  # type: ignore[arg-type]
    watched = Watched(context.new_page())

    def on_console(message) -> None:  # type: ignore[no-untyped-def]
        text = f"{message.text} {message.location.get('url', '')}"
        if message.type == "error" and not any(part in text for part in _HARMLESS):
            watched.errors.append(text)

    def on_request(request) -> None:  # type: ignore[no-untyped-def]
        parts = urlsplit(request.url)
        if parts.scheme in ("http", "https", "ws", "wss") and parts.hostname not in ("127.0.0.1", "localhost"):
            watched.foreign.append(request.url)

    watched.page.on("console", on_console)
    watched.page.on("pageerror", lambda error: watched.errors.append(str(error)))
    watched.page.on("request", on_request)
    try:
        yield watched
    finally:
        context.close()


def box_of(locator: Locator, seconds: float = 10) -> FloatRect:
    """Where an element lies on the page; one that is drawn again at this moment lies nowhere, and is waited for."""
    for _ in range(int(seconds * 10)):
        box = locator.bounding_box()
        if box is not None:
            return box
        locator.page.wait_for_timeout(100)
    raise AssertionError(f"{locator} lies nowhere")


def settle(page: Page, timeout: float = 60_000) -> None:
    """Wait until the script has run and nothing raised."""
    page.wait_for_timeout(200)
    page.locator(
        "[data-testid='stApp'][data-test-connection-state='CONNECTED'][data-test-script-state='notRunning']"
    ).wait_for(state="attached", timeout=timeout)
    expect(page.locator("[data-testid='stException']")).to_have_count(0)


def open_page(page: Page, url: str, path: str = "", *, charts: bool = True) -> None:
    """Open one page of the dashboard and wait until its charts are drawn."""
    page.goto(f"{url}/{path}")
    settle(page)
    if charts:
        page.locator(".js-plotly-plot .main-svg").first.wait_for(state="attached", timeout=60_000)
    settle(page)


def show_in(page: Page, scheme: Literal["light", "dark"]) -> None:
    """Switch an open page to a colour scheme, and wait until it shows it: text light on dark, or dark on light."""
    page.emulate_media(color_scheme=scheme)
    page.wait_for_function(
        """dark => {
            const [red, green, blue] = getComputedStyle(document.querySelector("h1")).color.match(/\\d+/g).map(Number);
            return (red + green + blue) / 3 > 128 === dark;
        }""",
        arg=scheme == "dark",
    )
    settle(page)


def grow_to_content(page: Page, width: int = 1400) -> None:
    """Make the window as high as the page, because the page scrolls inside the window."""
    for _ in range(2):
        height = page.evaluate("document.querySelector('[data-testid=stMain]').scrollHeight")
        page.set_viewport_size({"width": width, "height": max(int(height), 1000)})
        page.wait_for_timeout(700)
