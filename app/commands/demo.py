"""``moescope demo``: the dashboard on the bundled run, while the bundled model is profiled on its bundled texts."""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import signal
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from app import line
from app.commands.collect import show_progress
from app.commands.dashboard import add_server, address_of
from app.commands.options import add_store, positive

if TYPE_CHECKING:
    import subprocess

    from app.address import Address

NAME = "demo"
SUMMARY = "profile the bundled model and open the dashboard"
BUNDLED = "sample"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_store(parser)
    add_server(parser)
    parser.add_argument("--no-dashboard", action="store_true", help="only profile, and end with the summary")
    parser.add_argument("--tokens", type=positive, default=120_000, metavar="N", help="token budget (default 120k)")


def run(options: argparse.Namespace) -> int:
    """Open the dashboard at once, profile meanwhile, print the summary, and serve until interrupted."""
    address = address_of(options)
    _lay_out_bundled_run(options.store)
    # A plain kill would leave the dashboard behind: as an exit it passes through the "finally" below.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    server = None if options.no_dashboard else _open_dashboard(options.store, address, not options.no_browser)
    try:
        if importlib.util.find_spec("torch") is None:
            print("torch is not installed: only the bundled run is shown. For your own: pip install 'moescope[torch]'")
        else:
            path = profile_sample(options.store, tokens=options.tokens)
            _print_summary(path)
        if server is not None:
            print("\nThe dashboard stays open; Ctrl-C ends it.", flush=True)
            return server.wait()
    finally:
        if server is not None:
            server.terminate()
            server.wait()
    return 0


def profile_sample(store: Path, *, tokens: int, name: str = "") -> Path:
    """Profile the bundled model on its held-out texts; returns the run file."""
    from profiler import load_model, load_tokenizer
    from profiler.collect import collect
    from profiler.corpus import open_corpus
    from sample_data import MODEL, TEXTS

    tokenizer = load_tokenizer(MODEL)
    model = load_model(MODEL, dtype="float32")
    texts = sorted(str(path) for path in TEXTS.glob("*.jsonl"))
    corpus = open_corpus(texts, tokenizer=tokenizer, sequence_length=512, batch_size=8, token_budget=tokens)
    path = collect(
        model,
        corpus=corpus,
        store=store,
        name=name or datetime.now().strftime("demo-%Y%m%d-%H%M%S"),
        level="routing,activations",
        router_scores=16,
        scores_every=8,
        tokenizer=tokenizer,
        progress=show_progress,
        flush_seconds=3.0,  # a demo is watched while it grows
        model_name="the sample model of moescope",
    )
    line.end()
    return Path(path)


def _lay_out_bundled_run(store: Path) -> None:
    """Copy the bundled run, and what was measured of its model, into the store, unless it is there already."""
    from sample_data import RUN
    from store import Catalog, list_evaluations, read_evaluation, write_evaluation

    if any(entry.name == BUNDLED for entry in Catalog(store).entries()):
        return
    store.mkdir(parents=True, exist_ok=True)
    for source in sorted(RUN.parent.glob(f"{RUN.stem}*.duckdb")):
        shutil.copyfile(source, store / source.name.replace(RUN.stem, BUNDLED, 1))
    for source in list_evaluations(RUN):
        write_evaluation(store / f"{BUNDLED}{RUN.suffix}", read_evaluation(source))


def _open_dashboard(store: Path, address: Address, browser: bool) -> subprocess.Popen[bytes]:
    from app.serve import start

    server, url = start(store, address, browser=browser)
    print(f"dashboard: {url}", flush=True)
    return server


def _print_summary(path: Path) -> None:
    import store
    from app.commands.show import summary

    with store.open_run(path) as finished:
        print(summary(finished))
