"""Server-side time to paint each page, for a short run and one a hundred times as long.

    python benchmarks/pages.py [--model DIR] [--texts DIR]

Both runs are collected here with the bundled model on its bundled texts (repeated as often as needed), both levels.
Baseline, in the same process: the same page on the short run. Each repetition starts with empty caches, so that frames
are computed anew; the ratio's spread comes from resampling the repetitions.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import streamlit as st
from streamlit.testing.v1 import AppTest

from profiler import load_model, load_tokenizer
from profiler.collect import collect
from profiler.corpus import open_corpus
from sample_data import MODEL, TEXTS

SHORT, LONG, LIMIT, ROUNDS = 10_000, 1_000_000, 1.3, 15


def collect_run(directory: Path, name: str, tokens: int, model_folder: Path, texts: Path) -> None:
    """Collect a run of about ``tokens`` tokens, feeding the texts several times where they do not suffice."""
    model, tokenizer = load_model(model_folder, dtype="float32", device="cpu"), load_tokenizer(model_folder)
    files = sorted(texts.glob("*.jsonl"))
    copies = directory / "texts"
    copies.mkdir(exist_ok=True)
    if tokens == LONG:
        for file in files:
            (copies / file.name).write_text(file.read_text(encoding="utf-8") * 8, encoding="utf-8")
        files = sorted(copies.glob("*.jsonl"))
    corpus = open_corpus([str(file) for file in files], tokenizer=tokenizer, sequence_length=512, token_budget=tokens)
    collect(model, corpus=corpus, store=directory / "runs", name=name, level="routing,activations", tokenizer=tokenizer)


def paint(app: AppTest, page: str, run: str) -> float:
    """Seconds of one cold paint of a page."""
    st.cache_data.clear()
    st.cache_resource.clear()
    app.query_params["run"] = run
    begin = time.perf_counter()
    app.switch_page(page).run(timeout=120)
    seconds = time.perf_counter() - begin
    if app.exception:
        raise SystemExit(f"{page} on {run}: {app.exception[0].value}")
    return seconds


def main() -> None:
    """Print one row per page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--texts", type=Path, default=TEXTS)
    options = parser.parse_args()
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        for name, tokens in (("short", SHORT), ("long", LONG)):
            collect_run(directory, name, tokens, options.model, options.texts)
        os.environ["MOESCOPE_STORE"] = str(directory / "runs")
        from app.views import PAGES

        root = Path(__file__).parents[1] / "app"
        apps = {}
        for name in ("short", "long"):
            apps[name] = AppTest.from_file(str(root / "main.py"), default_timeout=120)
            apps[name].query_params["run"] = name
            apps[name].run()
        print(f"{SHORT:,} and {LONG:,} tokens, {ROUNDS} cold paints each, alternating; median ms")
        print("page                  short    long  ratio  [95 % of resamples]")
        for page in PAGES:
            times: dict[str, list[float]] = {"short": [], "long": []}
            for turn in range(ROUNDS + 1):
                for name, app in apps.items():
                    seconds = paint(app, str(Path(page.file).relative_to(root)), name)
                    if turn:  # the first paint also imports
                        times[name].append(seconds)
            short, long = np.array(times["short"]), np.array(times["long"])
            drawn = generator.integers(0, ROUNDS, (1000, ROUNDS))
            ratios = np.median(long[drawn], axis=1) / np.median(short[generator.permutation(drawn)], axis=1)
            low, high = np.quantile(ratios, [0.025, 0.975])
            ratio = np.median(long) / np.median(short)
            verdict = "" if ratio <= LIMIT else f"   OVER {LIMIT}"
            print(
                f"{page.title:20s} {np.median(short) * 1e3:6.0f}  {np.median(long) * 1e3:6.0f}  {ratio:5.2f}"
                f"  [{low:.2f}, {high:.2f}]{verdict}"
            )


if __name__ == "__main__":
    main()
