"""What recommendations and predictions are worth: chosen on one text, scored on other text and on an unseen domain.

    python -m benchmarks.recommendation {sizes,predictions,curve} [--bits 2.5 3.0 8.0] [--seeds 0 1 2]

The bundled model, its bundled texts. The first half of each domain's documents is for calibration: two thirds of it
make the run, the rest is what plans are measured on to choose. The second half, and one whole domain that calibration
lacks, are what they are scored on. Bits are effective ones over all expert weights of the source, so plans that cut
have more for what they leave.

sizes        the recommended plan beside every preset of its size. Baseline: the best of these.
predictions  Spearman's correlation of predicted and measured divergence among varied plans of one size, coverage and
             width of 90 % intervals, and the regret of choosing by quick measurements on calibration text.
curve        seconds for the whole size/quality curve over all methods, against a bare forward over the held-out text.

The model is small and its domains differ by script: experts specialise more than in a large model.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from scipy.stats import spearmanr
from torch import nn

import planner
import store
from app.moments import Moments
from benchmarks.compression import corpus_of, documents
from compressor.memory import edited
from compressor.plan import Plan
from moescope.errors import PlanError
from planner.advice import recommend
from planner.candidates import Request, candidates, with_elsewhere
from planner.curve import curve, pareto
from planner.estimate.parameters import expert_parameters, sizes_before
from planner.finalists import Damage, Measurement
from planner.presets import PRESETS
from planner.recommendation import Candidate, mix_of
from profiler import load_model, load_tokenizer
from profiler.collect import collect
from profiler.evaluation.distribution import BaseDistribution, Divergence
from sample_data import MODEL

LEVEL = "routing,activations,similarity,gradients,moments,errors"
UNSEEN = ("french", "python", "arithmetic")
GENERATIONS = 6


@dataclass(frozen=True)
class Scored:
    """What a plan costs on text that nothing was chosen on."""

    kl: float
    seen: float
    unseen: float


@dataclass(frozen=True)
class Case:
    """One draw of calibration text.

    Attributes:
        model: in float32, the type that plans are measured in; sizes are those of the checkpoint's bfloat16.
        run: of two thirds of the calibration text.
        choosing: the model on the rest of it.
        scoring: the model on other text.
        unseen: the domain that calibration lacks.
    """

    model: nn.Module
    run: store.Run
    choosing: BaseDistribution
    scoring: BaseDistribution
    unseen: str

    def memory(self, bits: float) -> int:
        """Bytes at which all experts of the source would have so many bits per weight."""
        source = Request(self.run, 1).task().source
        return int(expert_parameters(source, sizes_before(source)) * bits / 8)

    def choose(self, plan: Plan) -> Measurement:
        """The plan's cost on calibration text."""
        found = self._against(plan, self.choosing)
        domains = {name: Damage(one.kl, one.low, one.high, one.tokens) for name, one in found.per_domain.items()}
        return Measurement(kl=found.kl, low=found.low, high=found.high, tokens=found.tokens, domains=domains)

    def score(self, plan: Plan) -> Scored:
        """The plan's cost on other text and on the unseen domain."""
        found = self._against(plan, self.scoring)
        parts = []
        for part in (pl.col("domain") != self.unseen, pl.col("domain") == self.unseen):
            rows = found.sequences.filter(part)
            parts.append(float(rows["kl_sum"].sum() / rows["predictions"].sum()))
        return Scored(found.kl, *parts)

    def _against(self, plan: Plan, base: BaseDistribution) -> Divergence:
        subspace = any(getattr(step, "method", "") == "subspace" for step in plan.steps)
        with edited(self.model, plan, moments=Moments(self.run, plan) if subspace else None):
            return base.against(self.model)


@contextmanager
def case_of(seed: int, tokens: int, by_domain: bool) -> Iterator[Case]:
    """While entered, there is a run of this draw."""
    model, tokenizer = load_model(MODEL, dtype="float32", device="cpu"), load_tokenizer(MODEL)
    unseen, draw, halves = UNSEEN[seed % len(UNSEEN)], random.Random(seed), documents()
    parts: dict[str, dict[str, list[str]]] = {"run": {}, "choosing": {}, "scoring": {}}
    for name, (lines, others) in halves.items():
        parts["scoring"][name] = others
        if name != unseen:
            mixed = draw.sample(lines, len(lines))
            cut = max(1, len(mixed) * 2 // 3)
            parts["run"][name], parts["choosing"][name] = mixed[:cut], mixed[cut:] or mixed[-1:]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        amounts = {"run": tokens, "choosing": tokens // 3, "scoring": tokens // 2}
        texts = {part: corpus_of(lines, folder / part, tokenizer, amounts[part]) for part, lines in parts.items()}
        path = collect(
            model, corpus=texts["run"], name=f"seed-{seed}", tokenizer=tokenizer, store=folder, level=LEVEL,
            similarity_every=4, errors_every=8, headline=False, vectors_per_domain=by_domain,
        )  # fmt: skip
        with store.open_run(path) as run:
            bases = [BaseDistribution.of(model, texts[part].batches()) for part in ("choosing", "scoring")]
            yield Case(model, run, *bases, unseen=unseen)


def presets_at(case: Case, bits: float) -> dict[str, Plan]:
    """Every preset and mixture at one size, also such as can only be stored dense."""
    memory = case.memory(bits)
    found, _ = candidates(Request(case.run, memory))
    plans = {one.name + _told(one.recipe): one.plan for one in found}
    for preset in PRESETS:
        if preset.step != "quantize" or preset.name in ("eaquant", "mixed"):
            continue
        try:  # widths that only form dense holds: the published ones of PMQ, ternary, nested
            plans.setdefault(preset.name, planner.make(case.run, preset=preset.name, bits=bits, form="dense"))
        except PlanError:
            continue
    return plans


def _told(recipe: Any) -> str:
    return "".join(f" {name}={recipe[name]:g}" for name in ("drop",) if name in recipe)


def sizes(case: Case, budgets: list[float]) -> list[dict[str, Any]]:
    """The recommended plan beside all presets, at each size."""
    rows = []
    for bits in budgets:
        began = time.monotonic()
        advice = recommend(case.run, memory=case.memory(bits), measure=case.choose, generations=GENERATIONS)
        seconds = time.monotonic() - began
        best, mine = advice.candidates[0], case.score(advice[0])
        others = {name: case.score(plan) for name, plan in presets_at(case, bits).items()}
        print(f"\n{bits:g} bits, unseen {case.unseen}: {advice.verdict}, {seconds:.0f} s; {best.name} ({best.mix})")
        print(f"  {'recommended':34s} all {mine.kl:.4f}  seen {mine.seen:.4f}  unseen {mine.unseen:.4f}")
        for name, one in sorted(others.items(), key=lambda pair: pair[1].kl)[:14]:
            print(f"  {name:34s} all {one.kl:.4f}  seen {one.seen:.4f}  unseen {one.unseen:.4f}")
        regret = {
            text: getattr(mine, text) / min(getattr(one, text) for one in others.values()) - 1
            for text in ("kl", "seen", "unseen")
        }
        print(
            "  regret against the best of each: " + ", ".join(f"{text} {value:+.1%}" for text, value in regret.items())
        )
        rows.append(
            {"bits": bits, "recommended": best.name, **{f"regret_{text}": value for text, value in regret.items()}}
        )
    return rows


def varied(case: Case, request: Request) -> dict[str, Candidate]:
    """Plans of one size by as many ways as there are, good and bad, each measured on calibration text."""
    found = {}
    cuts: list[dict[str, Any]] = [
        {"preset": "stream_slim", "form": "per_layer", "share": 0.25, "multiple": 32},
        {"preset": "camera_p", "form": "uniform", "share": 0.25, "multiple": 32},
        {"preset": "budgeted_reap", "share": 0.125},
        {"preset": "even_search", "form": "uniform", "share": 0.125},
        {"preset": "frequency", "form": "uniform", "share": 0.0625},
        {"preset": "random", "form": "uniform", "share": 0.125, "seed": 3},
    ]
    recipes = [
        *({"preset": name} for name in ("error_bits", "edgemoe", "frequency_bits", "first_blocks", "outlier_bits")),
        *({"preset": name} for name in ("block_importance", "camera_bits")),
        *({"preset": "random_bits", "seed": seed} for seed in (0, 1)),
        {"preset": "error_bits", "granularity": "expert", "even": 0.0},
        {"preset": "error_bits", "granularity": "expert", "weigh": "equal"},
        {"preset": "mixed", "drop": 0.5},
        *({**cut, "quantizer": "error_bits"} for cut in cuts),
    ]
    for recipe in recipes:
        recipe = {**recipe, "memory": request.memory}
        try:
            plan = request.plan(recipe)
        except PlanError:
            continue
        price = planner.predict(plan, request.task())
        one = Candidate(plan, mix_of(plan), request.memory, price, recipe=recipe)
        name = " ".join(str(value) for key, value in recipe.items() if key != "memory")
        found[name] = replace(with_elsewhere(request, one), measurement=case.choose(plan))
    return found


def predictions(case: Case, budgets: list[float]) -> list[dict[str, Any]]:
    """Predicted against measured divergence, size by size."""
    # The factors come from one recommendation at another size: what the plans below cost is news to them.
    advice = recommend(case.run, memory=case.memory(3.0), measure=case.choose, finalists=1)
    rows = []
    for bits in budgets:
        request = Request(case.run, case.memory(bits))
        found_plans = varied(case, request)
        plans = {name: one.plan for name, one in found_plans.items()}
        scored = {name: case.score(plan) for name, plan in plans.items()}
        row: dict[str, Any] = {"bits": bits, "plans": len(plans)}
        for basis, calibration in (("sums", None), ("measured plans", advice.calibration)):
            prices = {name: planner.predict(plan, request.task(), calibration) for name, plan in plans.items()}
            known = [name for name in plans if prices[name] is not None]
            found = np.array([scored[name].seen for name in known])
            price = np.array([[getattr(prices[name], end) for end in ("kl", "low", "high")] for name in known])
            row[basis] = {
                "spearman": float(spearmanr(price[:, 0], found)[0]),
                "spearman_unseen": float(spearmanr(price[:, 0], [scored[name].unseen for name in known])[0]),
                "covered": int(((price[:, 1] <= found) & (found <= price[:, 2])).sum()),
                "of": len(known),
                "width": float(np.median((price[:, 2] - price[:, 1]) / price[:, 0])),
                "ratio": [float(value) for value in np.quantile(found / price[:, 0], [0.1, 0.5, 0.9])],
            }
        pick = min(found_plans, key=lambda name: found_plans[name].score)
        for text in ("kl", "seen", "unseen"):
            best = min(getattr(one, text) for one in scored.values())
            row[f"regret_{text}"] = getattr(scored[pick], text) / best - 1
        rows.append(row)
        _print(row, scored, pick)
    return rows


def _print(row: dict[str, Any], scored: dict[str, Scored], pick: str) -> None:
    costs = [one.seen for one in scored.values()]
    print(f"\n{row['bits']:g} bits, {row['plans']} plans, KL {min(costs):.4f} to {max(costs):.4f} on other text")
    for basis in ("sums", "measured plans"):
        one = row[basis]
        low, middle, high = one["ratio"]
        print(
            f"  {basis:14s} Spearman {one['spearman']:.3f} (unseen domain {one['spearman_unseen']:.3f}); intervals hold"
            f" {one['covered']} of {one['of']}, median width {one['width']:.2f} of the value; measured / predicted"
            f" {low:.2f} {middle:.2f} {high:.2f}"
        )
    print(
        f"  chosen on calibration text: {pick}; regret {row['regret_kl']:+.1%} over all"
        f" text, {row['regret_seen']:+.1%} on seen domains, {row['regret_unseen']:+.1%} on the unseen one"
    )


def whole_curve(case: Case) -> None:
    """How long the curve takes."""
    began = time.monotonic()
    found = curve(Request(case.run, 1))
    print(f"{len(found)} plans in {time.monotonic() - began:.1f} s")
    for one in pareto(found):
        print(f"  {one.bytes / 2**20:7.2f} MiB  KL {one.kl:.4f}  {one.name} ({one.mix})")


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("sizes", "predictions", "curve"))
    parser.add_argument("--bits", nargs="+", type=float)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=24_000, help="of calibration text (default 24,000)")
    parser.add_argument("--vectors-per-domain", action="store_true", help="neurons of the run are kept by domain")
    options = parser.parse_args()
    began, rows = time.monotonic(), []
    for seed in options.seeds:
        with case_of(seed, options.tokens, options.vectors_per_domain) as case:
            print(f"\nseed {seed}")
            if options.what == "sizes":
                rows += sizes(case, options.bits or [2.5, 3.0, 8.0])
            elif options.what == "predictions":
                rows += predictions(case, options.bits or [2.3, 2.75, 3.5, 5.0])
            else:
                whole_curve(case)
    if options.what == "predictions":
        told = [row["measured plans"] for row in rows]
        print(
            f"\nall: Spearman {min(one['spearman'] for one in told):.3f} to {max(one['spearman'] for one in told):.3f};"
            f" intervals hold {sum(one['covered'] for one in told)} of {sum(one['of'] for one in told)}"
        )
    print(f"\n{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
