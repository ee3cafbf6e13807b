"""Reruns of every page in the browser, and the first paint of the dashboard.

    python -m benchmarks.pages_in_browser [--layers 94] [--experts 384] [--rounds 7] [--first]

Baselines, in the same run: for reruns, a page of the same dashboard that draws nothing; for the first paint (--first),
Streamlit's hello app with one Plotly chart, served with the same settings, in a fresh server each time; ours is page
Routing with its largest map. Reruns are caused in two ways: a token is chosen in the bar on top (no figure changes),
and another layer is (figures of one layer change). One ends when the script has ended and the page has been painted
twice after that. Runs are generated (``shaped_run``): the same shape, with aggregates as of 10 thousand and of 10
million tokens. Needs Chromium.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from playwright.sync_api import Page

from app.address import Address
from app.serve import command_line, environment_for
from benchmarks.shaped_run import Shape, write
from tests.browser.driver import chromium_browser, settle, watched_page

RUNS = {"10k": 10_000, "10M": 10_000_000}
EMPTY_LIMIT, TOKENS_LIMIT, FIRST_LIMIT = 3.0, 1.3, 1.5

# The dashboard with one more page, which draws nothing.
WITH_EMPTY = """
    from pathlib import Path
    from app import main, views
    blank = views.PageInfo(str(Path(__file__).with_name("blank.py")), "Blank", ":material/dashboard:", "blank")
    main.PAGES = (*views.PAGES, blank)
    main.main()
"""
# Streamlit's own first app, with one chart, so that the browser loads Plotly for it too.
HELLO = """
    import plotly.graph_objects as go
    import streamlit as st
    from streamlit.hello import streamlit_app
    streamlit_app.run()
    st.plotly_chart(go.Figure(go.Bar(x=[1, 2, 3], y=[1, 2, 3])))
"""
# Milliseconds from the key to the second frame after the script has ended.
WATCH = """
    () => {
      const app = document.querySelector("[data-testid='stApp']")
      const begin = performance.now()
      window.rerun = new Promise((done) => {
        let ran = false
        const look = () => {
          const running = app.getAttribute("data-test-script-state") !== "notRunning"
          ran = ran || running
          if (ran && !running) requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - begin)))
          else if (performance.now() - begin > 60000) done(-1)
          else setTimeout(look, 4)
        }
        look()
      })
    }
"""


@contextmanager
def served(script: Path, store: Path) -> Iterator[str]:
    """The address of a server of the script, which ends with the context."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = command_line(Address(port=port))
    command[command.index("run") + 1] = str(script)
    server = subprocess.Popen(
        command, env=environment_for(store), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"{url}/_stcore/health", timeout=1) as answer:
                    if answer.read() == b"ok":
                        break
            except OSError:
                time.sleep(0.05)
        yield url
    finally:
        server.terminate()
        server.wait(timeout=20)


def rerun(page: Page, field: str, text: str) -> float:
    """Milliseconds of the rerun that a value in a field of the bar causes; a layer is chosen from its list."""
    box = page.get_by_label(field, exact=True).first
    box.click()
    box.fill(text)
    if field == "Layer":
        option = page.get_by_role("option", name=text, exact=True).first
        option.wait_for()
        page.evaluate(WATCH)
        option.click()
    else:
        page.evaluate(WATCH)
        box.press("Enter")
    milliseconds: float = page.evaluate("window.rerun")
    settle(page)
    return milliseconds


def sections_of(page: Page) -> list[str]:
    """The sections that a page offers; one without a name where it has none."""
    buttons = page.locator(".st-key-section button")
    return [text.strip() for text in buttons.all_inner_texts()] or [""]


def measure(page: Page, url: str, path: str, run: str, section: str, rounds: int) -> dict[str, float]:
    """Median milliseconds of both kinds of rerun on one section of a page."""
    page.goto(f"{url}/{path}?run={run}" + (f"&section={section}" if section else ""))
    settle(page)
    page.wait_for_timeout(800)
    times: dict[str, list[float]] = {"token": [], "layer": []}
    for turn in range(rounds + 1):
        found = {"token": rerun(page, "Token", str(turn + 1)), "layer": rerun(page, "Layer", str(turn % 5 + 1))}
        if turn:  # the first one fills caches that every later one finds
            for kind, milliseconds in found.items():
                times[kind].append(milliseconds)
    return {kind: float(np.median(values)) for kind, values in times.items()}


def reruns(folder: Path, store: Path, rounds: int, wanted: list[str]) -> None:
    """Print one row per page and section; ``wanted``: titles of pages, none for all."""
    from app.views import PAGES

    (folder / "blank.py").write_text("", encoding="utf-8")
    script = folder / "with_empty.py"
    script.write_text(textwrap.dedent(WITH_EMPTY), encoding="utf-8")
    shutil.copytree(Path(__file__).parents[1] / "app" / ".streamlit", folder / ".streamlit")
    with (
        served(script, store) as url,
        chromium_browser(shutil.which("chromium") or "") as browser,
        watched_page(browser) as watched,
    ):
        page = watched.page
        measure(page, url, "blank", "10k", "", 1)  # the server's first page is slow
        empty = [measure(page, url, "blank", "10k", "", rounds)]
        print("ms (median); ratio to the blank page")
        print(f"{'page':34s} {'token':>6s} {'layer':>6s} {'x':>5s} {'x':>5s}   10M/10k")
        for index, info in enumerate(PAGES):
            path = info.url if index else ""  # the first page is the root
            if wanted and info.title not in wanted:
                continue
            page.goto(f"{url}/{path}?run=10k")
            settle(page)
            page.wait_for_timeout(1000)
            found = sections_of(page)
            empty.append(measure(page, url, "blank", "10k", "", rounds))
            base = {kind: float(np.mean([one[kind] for one in empty[-2:]])) for kind in empty[0]}
            for section in found:
                small, large = (measure(page, url, path, run, section, rounds) for run in RUNS)
                over = {kind: large[kind] / base[kind] for kind in small}
                longer = max(large[kind] / small[kind] for kind in small)
                verdict = "" if max(over.values()) <= EMPTY_LIMIT and longer <= TOKENS_LIMIT else "   OVER"
                print(
                    f"{info.title + (' / ' + section if section else ''):34s} {large['token']:6.0f} "
                    f"{large['layer']:6.0f} {over['token']:5.2f} {over['layer']:5.2f}   {longer:.2f}{verdict}",
                    flush=True,
                )
        blank = np.array([[one["token"], one["layer"]] for one in empty])
        spread = f"{blank.min(axis=0).round()} to {blank.max(axis=0).round()}"
        print(f"blank page: {np.median(blank, axis=0).round()} ms, {spread} over {len(blank)} times")


def first_paint(url: str) -> float:
    """Seconds from asking for an address to its first chart, in a new profile."""
    with chromium_browser(shutil.which("chromium") or "") as browser, watched_page(browser) as watched:
        begin = time.perf_counter()
        watched.page.goto(url)
        watched.page.locator(".js-plotly-plot .main-svg").first.wait_for(state="attached", timeout=120_000)
        return time.perf_counter() - begin


def first(folder: Path, store: Path, rounds: int) -> None:
    """Print the ratio of the first paints."""
    script = folder / "hello_with_chart.py"
    script.write_text(textwrap.dedent(HELLO), encoding="utf-8")
    import app

    ours = Path(app.__file__).with_name("main.py")
    times: dict[str, list[float]] = {"dashboard": [], "hello": []}
    for _ in range(rounds):
        for name, path, query in (("hello", script, ""), ("dashboard", ours, "routing?run=10k")):
            with served(path, store) as url:
                times[name].append(first_paint(url + "/" + query))
    generator = np.random.default_rng(0)
    both = {name: np.array(values) for name, values in times.items()}
    drawn = generator.integers(0, rounds, (2000, rounds))
    ratios = np.median(both["dashboard"][drawn], axis=1) / np.median(both["hello"][drawn], axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    ratio = np.median(both["dashboard"]) / np.median(both["hello"])
    medians = ", ".join(f"{name} {np.median(values):.2f} s" for name, values in both.items())
    verdict = "" if ratio <= FIRST_LIMIT else f"   OVER {FIRST_LIMIT}"
    print(f"first paint: {medians}; ratio {ratio:.2f} [{low:.2f}, {high:.2f}]{verdict}")


def main() -> None:
    """Generate the runs and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=94)
    parser.add_argument("--experts", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pages", nargs="*", default=[], metavar="TITLE", help="these pages only")
    parser.add_argument("--first", action="store_true", help="measure the first paint only")
    parser.add_argument("--store", type=Path, help="keep the generated runs here, or take them from here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = options.store or folder / "runs"
        for run, tokens in RUNS.items():
            if not (store / f"{run}.duckdb").exists():
                write(store, run, Shape(layers=options.layers, experts=options.experts, tokens=tokens))
        shape = json.dumps({"layers": options.layers, "experts": options.experts})
        print(f"{shape}, {os.cpu_count()} cores, {sys.version.split()[0]}")
        if options.first:
            first(folder, store, options.rounds)
        else:
            reruns(folder, store, options.rounds, options.pages)


if __name__ == "__main__":
    main()
