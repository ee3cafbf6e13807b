"""Screenshots of every page, light and dark: ``python -m tests.browser.screenshots --store DIR --out DIR``."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from app.serve import start
from tests.browser.driver import PAGES, chromium_browser, grow_to_content, open_page, watched_page


def main() -> int:
    """Shoot the pages; returns 1 if a page had errors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--run", default="", help="the run to show (default: the newest finished one)")
    parser.add_argument("--pages", nargs="*", default=[*PAGES, "cache", "data"])
    parser.add_argument("--themes", nargs="*", default=["light", "dark"])
    parser.add_argument("--width", type=int, default=1400)
    options = parser.parse_args()
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_path is None:
        print("no Chromium found on PATH", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    server, url = start(options.store, browser=False)
    problems = 0
    try:
        with chromium_browser(browser_path) as browser:
            for theme in options.themes:
                for name in options.pages:
                    with watched_page(browser, theme=theme, width=options.width) as watched:
                        query = f"?run={options.run}" if options.run else ""
                        page_name, _, extra = name.partition("?")
                        query += ("&" if query else "?") + extra if extra else ""
                        open_page(watched.page, url, page_name + query, charts=False)
                        watched.page.wait_for_timeout(1500)
                        grow_to_content(watched.page, options.width)
                        target = options.out / f"{page_name or 'overview'}-{theme}.png"
                        watched.page.screenshot(path=target)
                        for trouble in (*watched.errors, *watched.foreign):
                            print(f"{target.name}: {trouble}", file=sys.stderr)
                            problems += 1
                        print(target, flush=True)
    finally:
        server.terminate()
        server.wait()
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
