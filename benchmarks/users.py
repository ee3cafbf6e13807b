"""Users of one dashboard at once: errors, seconds of a rerun beside those of one user, and the server's memory.

    python -m benchmarks.users [--users 5] [--minutes 30] [--every 2] [--store DIR] [--url URL --pid PID]

Users are sessions that speak Streamlit's protocol (``page_client``), so that no browser takes the server's cores away.
A click is another page, section, layer or expert, drawn from a seed. Baseline, in the same run: one user alone with the
same kinds of clicks, before and after the crowd. Without --store a run is generated.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

import numpy as np

from app.serve import start
from benchmarks.page_client import Visitor, visitor
from benchmarks.shaped_run import Shape, write
from store import Catalog

RATIO_LIMIT, MEMORY_LIMIT = 2.0, 1.10
SETTLED = 0.2
"""Part of the crowd's time after which the memory must be level."""


@dataclass
class Click:
    """One click: what it was, and seconds until the page was whole again."""

    kind: str
    seconds: float


async def click(user: Visitor, drawn: random.Random) -> Click:
    """One click of a user at something that the page offers now."""
    kind = drawn.choices(["page", "section", "layer", "expert"], [4, 3, 2, 1])[0]
    options = user.options.get(kind, [])
    if kind == "page" or len(options) < 2:
        name = drawn.choice(list(user.pages))
        return Click(f"page {name or 'overview'}", await user.open(name))
    return Click(kind, await user.choose(kind, drawn.choice(options)))


async def clicking(url: str, query: str, *, seed: int, seconds: float, every: float) -> tuple[list[Click], list[str]]:
    """One user who clicks every so many seconds; what was clicked, and what went wrong."""
    drawn = random.Random(seed)
    await asyncio.sleep(drawn.uniform(0, every))
    user = await visitor(url, query)
    await user.open()
    clicks: list[Click] = []
    end = next_click = time.monotonic()
    end += seconds
    while time.monotonic() < end and not (user.errors and "connection" in user.errors[-1]):
        clicks.append(await click(user, drawn))
        next_click = max(next_click + every, time.monotonic() - every)
        await asyncio.sleep(max(0.0, next_click - time.monotonic()))
    await user.leave()
    return clicks, user.errors


async def crowd(
    url: str, queries: list[str], *, users: int, seed: int, seconds: float, every: float
) -> tuple[list[Click], list[str]]:
    """Several users at once, each at one of the addresses in turn."""
    found = await asyncio.gather(
        *(
            clicking(url, queries[number % len(queries)], seed=seed + number, seconds=seconds, every=every)
            for number in range(users)
        )
    )
    return [one for clicks, _ in found for one in clicks], [error for _, errors in found for error in errors]


async def warm(url: str, query: str) -> list[str]:
    """Open every section of every page once, so that nobody is measured while code is compiled."""
    user = await visitor(url, query)
    await user.open()
    for name in list(user.pages):
        await user.open(name)
        for section in user.options.get("section", []):
            await user.choose("section", section)
    await user.leave()
    return user.errors


def resident(pid: int) -> float:
    """MiB that a process holds."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return float("nan")


async def memory(pid: int, into: list[tuple[float, float]]) -> None:
    """Seconds and MiB, every second, until it is cancelled."""
    began = time.monotonic()
    while True:
        into.append((time.monotonic() - began, resident(pid)))
        await asyncio.sleep(1.0)


def percentile(clicks: list[Click], share: float) -> float:
    """Seconds below which that share of the reruns took."""
    return float(np.percentile([one.seconds for one in clicks], share))


def ratio(many: list[Click], one: list[Click], share: float) -> str:
    """A percentile of many users over that of one, with a 95 % interval by resampling clicks."""
    drawn = np.random.default_rng(0)

    def resampled(clicks: list[Click]) -> np.ndarray:
        values = np.array([click.seconds for click in clicks])
        return np.percentile(values[drawn.integers(0, len(values), (2000, len(values)))], share, axis=1)

    low, high = np.quantile(resampled(many) / resampled(one), [0.025, 0.975])
    return f"{percentile(many, share) / percentile(one, share):.2f} [{low:.2f}, {high:.2f}]"


def said(name: str, clicks: list[Click], errors: list[str]) -> None:
    """Print one phase."""
    print(
        f"{name:16s} {len(clicks):6d} clicks   p50 {percentile(clicks, 50) * 1e3:5.0f} ms   p95 "
        f"{percentile(clicks, 95) * 1e3:5.0f} ms   longest {max(one.seconds for one in clicks):5.2f} s   "
        f"{len(errors)} errors",
        flush=True,
    )
    for error in sorted(set(errors))[:5]:
        print(f"    {error[:200]}")


def said_of_memory(samples: list[tuple[float, float]]) -> bool:
    """Print how level the memory was; False where it was not."""
    seconds, held = np.array(samples).T
    late = seconds > SETTLED * seconds[-1]
    level = float(np.median(held[late]))
    slope = float(np.polyfit(seconds[late], held[late], 1)[0])
    grown = slope * (seconds[-1] - seconds[late][0]) / level
    fifth = max(1, int(late.sum()) // 5)
    first, last = (float(np.median(held[late][part])) for part in (slice(fifth), slice(-fifth, None)))
    print(
        f"memory: {held[0]:.0f} MiB at first, {level:.0f} MiB level, slope {slope * 3600:+.1f} MiB/h ({grown:+.1%} of "
        f"the level over the time); last fifth over the first {last / first:.3f}; highest "
        f"{held[late].max():.0f} MiB, in the middle of something large"
    )
    return last / first <= MEMORY_LIMIT and grown <= MEMORY_LIMIT - 1


async def soak(url: str, pid: int, queries: list[str], options: argparse.Namespace) -> bool:
    """All phases; False where a bound was missed."""
    alone = max(30.0, options.minutes * 60 / 5)
    wrong = [error for query in queries for error in await warm(url, query)]
    first, first_errors = await crowd(url, queries, users=1, seed=1000, seconds=alone, every=options.every)
    said("one, before", first, first_errors)
    samples: list[tuple[float, float]] = []
    watching = asyncio.create_task(memory(pid, samples))
    many, many_errors = await crowd(
        url, queries, users=options.users, seed=2000, seconds=options.minutes * 60, every=options.every
    )
    watching.cancel()
    said(f"{options.users} at once", many, many_errors)
    last, last_errors = await crowd(url, queries[::-1], users=1, seed=3000, seconds=alone, every=options.every)
    said("one, after", last, last_errors)
    one = first + last
    print(f"ratio p50 {ratio(many, one, 50)}   p95 {ratio(many, one, 95)}   ({options.users} users over one)")
    for kind in sorted({click.kind for click in many}):
        ours, theirs = ([c for c in clicks if c.kind == kind] for clicks in (many, one))
        if ours and theirs:
            print(
                f"    {kind:24s} p95 {percentile(ours, 95) * 1e3:5.0f} ms of {len(ours):4d}, alone "
                f"{percentile(theirs, 95) * 1e3:5.0f} ms of {len(theirs):3d}"
            )
    level = said_of_memory(samples)
    for error in wrong:
        print(f"    while warming up: {error[:200]}")
    errors = wrong + first_errors + many_errors + last_errors
    quick = percentile(many, 95) <= RATIO_LIMIT * percentile(one, 95)
    missed = [name for name, held in (("errors", not errors), ("p95", quick), ("memory", level)) if not held]
    print("all bounds held" if not missed else f"OVER: {', '.join(missed)}")
    return not missed


def main() -> int:
    """Serve a store, or take a server that runs, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=30.0, help="of the crowd")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two clicks of a user")
    parser.add_argument("--store", type=Path, help="a store to serve; users look at its runs in turn")
    parser.add_argument("--url", help="a dashboard of that store that runs already")
    parser.add_argument("--pid", type=int, help="its process")
    options = parser.parse_args()
    if (options.url is None) != (options.pid is None):
        parser.error("--url and --pid go together")
    print(f"{os.cpu_count()} cores, {sys.version.split()[0]}, a click every {options.every:g} s")
    with tempfile.TemporaryDirectory() as name:
        stop: Callable[[], object] = lambda: None  # noqa: E731
        url, pid = options.url, options.pid
        store = options.store or Path(name)
        if url is None:
            if options.store is None:
                write(store, "shaped", Shape(layers=24, experts=64, tokens=10_000))
            server, url = start(store, browser=False)
            pid, stop = server.pid, server.terminate
        runs = [entry.name for entry in Catalog(store).entries() if not entry.live]
        queries = [urlencode({"run": name}) for name in runs] or [""]
        try:
            return 0 if asyncio.run(soak(url, pid, queries, options)) else 1
        finally:
            stop()


if __name__ == "__main__":
    sys.exit(main())
