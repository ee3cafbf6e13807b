"""What plans cost: every preset at the same number of experts, measured on text that no plan was made from.

    python -m benchmarks.compression [--shares 0.25 0.5] [--seeds 0 1 2] [--unseen french python arithmetic]

The bundled model, its bundled texts. The first half of each domain's documents is for calibration, the second for
measuring. A seed draws the calibration text out of the first half, without the domain that is held out; each seed holds
out another one. Baseline in the same run: the other presets, frequency, and 20 random plans.

The model is small and its domains differ by script, so that experts specialise by domain more than in a large model:
dropping flatters methods that see every domain, and punishes those that do not.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from torch import nn

import planner
import store
from app.moments import Moments
from compressor.memory import edited
from compressor.plan import Plan
from moescope.errors import PlanError
from planner.presets import PRESETS
from profiler import load_model, load_tokenizer
from profiler.collect import collect
from profiler.corpus import Corpus, open_corpus
from profiler.evaluation.distribution import BaseDistribution, Divergence
from profiler.metrics.divergence import mean_of_items
from sample_data import MODEL, TEXTS

LEVEL = "routing,activations,similarity,gradients,moments"
CONTROLS = 20
WHOLE = ("block_influence", "moe_blocks", "copies", "random")
"""Presets that drop something else than experts, or as many as there are copies."""


def documents() -> dict[str, tuple[list[str], list[str]]]:
    """Domain -> (lines for calibration, lines for measuring)."""
    halves = {}
    for path in sorted(TEXTS.glob("*.jsonl")):
        lines = path.read_text(encoding="utf-8").splitlines()
        halves[path.stem] = (lines[: len(lines) // 2], lines[len(lines) // 2 :])
    return halves


def corpus_of(lines: dict[str, list[str]], folder: Path, tokenizer: Any, tokens: int) -> Corpus:
    """A corpus of some lines per domain."""
    folder.mkdir()
    for domain, part in lines.items():
        (folder / f"{domain}.jsonl").write_text("\n".join(part) + "\n", encoding="utf-8")
    paths = sorted(str(path) for path in folder.glob("*.jsonl"))
    return open_corpus(paths, tokenizer=tokenizer, sequence_length=256, batch_size=8, token_budget=tokens)


def plans(run: store.Run, share: float) -> Iterator[tuple[str, Plan]]:
    """Every preset that lowers the number of experts, in its own form, and random controls."""
    for preset in PRESETS:
        if preset.step == "slim" or preset.name in WHOLE:
            continue
        try:
            yield preset.name, planner.make(run, preset=preset.name, share=share)
        except PlanError as error:
            print(f"  {preset.name}: {error}")
    for seed in range(CONTROLS):
        yield f"random {seed}", planner.make(run, preset="random", share=share, form="uniform", seed=seed)


def measure(model: nn.Module, base: BaseDistribution, run: store.Run, plan: Plan) -> Divergence:
    """The plan's damage."""
    subspace = any(getattr(step, "method", "") == "subspace" for step in plan.steps)
    with edited(model, plan, moments=Moments(run, plan) if subspace else None):
        return base.against(model)


def paired(first: pl.DataFrame, second: pl.DataFrame) -> str:
    """KL of the first less that of the second on the same sequences, with its interval."""
    both = first.join(second, on=["sequence", "domain", "predictions"], suffix="_second")
    assert len(both) == len(first) == len(second)
    found = mean_of_items(
        sums=(both["kl_sum"] - both["kl_sum_second"]).to_numpy(), items=both["predictions"].to_numpy()
    )
    verdict = "below" if found.high < 0 else "above" if found.low > 0 else "not told apart"
    return f"{found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}] {verdict}"


def one_seed(
    model: nn.Module, tokenizer: Any, folder: Path, seed: int, unseen: str, shares: list[float], tokens: int
) -> list[dict[str, Any]]:
    """Rows (seed, share, preset, text, kl) of one draw of calibration text."""
    halves = documents()
    draw = random.Random(seed)
    calibration = {
        name: draw.sample(lines, max(1, len(lines) * 2 // 3)) for name, (lines, _) in halves.items() if name != unseen
    }
    corpus = corpus_of(calibration, folder / f"calibration-{seed}", tokenizer, tokens)
    held_out = corpus_of(
        {name: lines for name, (_, lines) in halves.items()}, folder / f"held-out-{seed}", tokenizer, tokens // 2
    )
    path = collect(
        model, corpus=corpus, name=f"seed-{seed}", tokenizer=tokenizer, store=folder, level=LEVEL, similarity_every=4,
        headline=False,
    )  # fmt: skip
    base = BaseDistribution.of(model, held_out.batches())
    rows = []
    with store.open_run(path) as run:
        for share in shares:
            found = {name: measure(model, base, run, plan) for name, plan in plans(run, share)}
            rows += report(found, seed, share, unseen)
    return rows


def report(found: dict[str, Divergence], seed: int, share: float, unseen: str) -> list[dict[str, Any]]:
    """Print one table, and what it says of the default."""
    rows = []
    parts = {}
    for name, divergence in found.items():
        sequences = divergence.sequences
        parts[name] = {
            "seen": sequences.filter(pl.col("domain") != unseen),
            "unseen": sequences.filter(pl.col("domain") == unseen),
        }
        for text, part in parts[name].items():
            kl = part["kl_sum"].sum() / part["predictions"].sum()
            rows.append({"seed": seed, "share": share, "preset": name, "text": text, "kl": kl})
    print(f"\nseed {seed}, {share:.0%} fewer experts, held out: {unseen}")
    table = pl.DataFrame(rows).pivot("text", index="preset", values="kl").sort("seen")
    for name, seen, other in table.iter_rows():
        if not name.startswith("random"):
            print(f"  {name:20s} seen {seen:.4f}   unseen {other:.4f}")
    for text in ("seen", "unseen"):
        kls = {row["preset"]: row["kl"] for row in rows if row["text"] == text}
        presets = {name: kl for name, kl in kls.items() if not name.startswith("random")}
        controls = {name: kl for name, kl in kls.items() if name.startswith("random")}
        best, luckiest = min(presets, key=presets.__getitem__), min(controls, key=controls.__getitem__)
        default = presets[planner.DEFAULT]
        print(
            f"  {text}: default {planner.DEFAULT} {default:.4f}; best preset {best} {presets[best]:.4f}, regret"
            f" {default / presets[best] - 1:+.1%}; random {np.mean(list(controls.values())):.4f} on average"
        )
        for other in ("frequency", luckiest):
            difference = paired(parts[planner.DEFAULT][text], parts[other][text])
            print(f"    against {other} ({kls[other]:.4f}): {difference}")
    return rows


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", nargs="+", type=float, default=[0.25, 0.5])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--unseen", nargs="+", default=["french", "python", "arithmetic"])
    parser.add_argument("--tokens", type=int, default=24_000, help="of calibration text (default 24,000)")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    model, tokenizer = load_model(MODEL, dtype="float32", device="cpu"), load_tokenizer(MODEL)
    rows: list[dict[str, Any]] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for number, seed in enumerate(options.seeds):
            unseen = options.unseen[number % len(options.unseen)]
            rows += one_seed(model, tokenizer, Path(folder), seed, unseen, options.shares, options.tokens)
    frame = pl.DataFrame(rows).filter(~pl.col("preset").str.starts_with("random"))
    print("\nMean over seeds")
    means = frame.group_by("share", "text", "preset").agg(pl.col("kl").mean()).sort("share", "text", "kl")
    for (share, text), part in means.group_by("share", "text", maintain_order=True):
        best = part["kl"].min()
        shown = ", ".join(f"{name} {kl:.3f} ({kl / best - 1:+.0%})" for name, kl in part.select("preset", "kl").rows())
        print(f"  {share:.0%} {text}: {shown}")
    print(f"\n{time.monotonic() - began:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
