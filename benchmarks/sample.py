"""How long it takes to profile the bundled model on its bundled texts, and to answer ``moescope --help``.

    python benchmarks/sample.py

Baseline, in the same run: the bare model on the same batches, without the profiler.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import store
from app.commands.demo import profile_sample
from profiler import load_model, load_tokenizer
from profiler.corpus import open_corpus
from sample_data import MODEL, TEXTS

TOKENS, COLLECT_LIMIT, HELP_LIMIT = 120_000, 45.0, 0.5


def bare_seconds() -> float:
    """Seconds of the bare decoder over the batches that the profile feeds."""
    model, tokenizer = load_model(MODEL, dtype="float32", device="cpu"), load_tokenizer(MODEL)
    texts = sorted(str(path) for path in TEXTS.glob("*.jsonl"))
    corpus = open_corpus(texts, tokenizer=tokenizer, sequence_length=512, batch_size=8, token_budget=TOKENS)
    spent = 0.0
    with torch.no_grad():
        for batch in corpus.batches():
            inputs, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask)
            begin = time.perf_counter()
            model.base_model(input_ids=inputs, attention_mask=mask, use_cache=False)  # as collect: without the head
            spent += time.perf_counter() - begin
    return spent


def main() -> None:
    """Print the two figures and what they are made of."""
    bare = bare_seconds()
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        path = profile_sample(Path(folder), tokens=TOKENS, name="sample")
        whole = time.perf_counter() - begin
        with store.open_run(path) as run:
            tokens, forwards = run.info.tokens, run.info.seconds
        size = sum(file.stat().st_size for file in Path(folder).glob("*.duckdb")) / 1e6
    verdict = "" if whole <= COLLECT_LIMIT else f"   OVER {COLLECT_LIMIT:.0f} s"
    print(f"collect, both levels, {tokens:,} tokens: {whole:.1f} s in all{verdict} (run and metrics: {size:.1f} MB)")
    print(f"  of which watched forwards {forwards:.1f} s = {forwards / bare:.2f}x the bare forwards ({bare:.1f} s)")
    code = "import app.cli; app.cli.main(['--help'])"
    times = []
    for _ in range(10):
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-P", "-c", code], check=False, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - begin)
    low, middle, high = np.quantile(times, [0, 0.5, 1])
    verdict = "" if middle <= HELP_LIMIT else f"   OVER {HELP_LIMIT} s"
    print(f"moescope --help: median {middle:.2f} s, {low:.2f} to {high:.2f} s over 10 runs{verdict}")


if __name__ == "__main__":
    main()
