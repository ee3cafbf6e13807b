"""An evolutionary search for a better plan of one size, by what plans are measured to cost.

A genome says how dear a change of each layer's stream is, how much is slimmed, and how dear it is to drop; exact
choices turn it into a plan of the size that was asked for, so that no genome misses it. Children are priced from the
run's sums, and the most promising are measured. It begins with the best plans of single methods. After the genetic
search of "Compressing Pre-trained Models of Code into 3 MB" (arXiv 2208.07120), whose size constraint is a term of its
fitness and whose objective is a proxy; here the size is exact and the objective is measured. What it finds fits the
calibration text: measure it on other text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from compressor.plan import Plan
from moescope.errors import PlanError
from planner.candidates import Request, bytes_of, multiple_of, what_it_does, with_elsewhere
from planner.engines import loads
from planner.estimate.prediction import Calibration, predict
from planner.finalists import Measurement
from planner.presets import DEFAULT_QUANTIZER
from planner.recommendation import Candidate, mix_of
from planner.source import source_of

CHILDREN, MEASURED, PARENTS = 12, 3, 6
"""Children of a generation, how many of them are measured, and how many plans have children."""

SLIM_STEP, FACTOR_STEP = 0.0625, 0.7
"""How far genes move: a share, and the standard deviation of a factor's logarithm."""

_SEED = 0


@dataclass(frozen=True)
class Genome:
    """What a plan is made from.

    Attributes:
        factors: per MoE layer, how dear a change of its stream is.
        slim: share of the neurons that go; 0 = none.
        drop: how dear it is to drop an expert against its price; 0 = none goes. Only without slimming.
    """

    factors: tuple[float, ...]
    slim: float = 0.0
    drop: float = 0.0

    def recipe(self, request: Request, multiple: int) -> dict[str, Any]:
        """Arguments of :func:`planner.make`."""
        common = {"memory": request.memory, "factors": self.factors}
        if self.slim > 0:
            return {**common, "preset": "stream_slim", "form": "per_layer", "share": self.slim, "multiple": multiple,
                    "quantizer": DEFAULT_QUANTIZER}  # fmt: skip
        return {**common, "preset": "mixed", "drop": self.drop}


def search(
    request: Request,
    found: list[Candidate],
    measure: Callable[[Plan], Measurement],
    *,
    calibration: Calibration | None,
    generations: int,
    tell: Callable[[str], None],
) -> list[Candidate]:
    """The candidates with what the search found, measured ones first and the best of them at the head.

    Args:
        request: the size, and what plans are made for.
        found: candidates; some are measured.
        measure: of a plan.
        calibration: what prices rest on.
        generations: at most; it ends where three in a row find nothing better.
        tell: told how far it is.
    """
    if not (loads(request.engine, "packed") and loads(request.engine, "per_layer")):
        return found
    hunt = _Search(request, measure, calibration)
    pool = hunt.seeds(found)
    idle = 0
    for number in range(1, generations + 1):
        best = min(one.score for _, one in pool) if pool else float("inf")
        tell(f"search, generation {number} of {generations}: {len(hunt.seen)} plans priced, best {best:.4g}")
        pool = hunt.generation(pool)
        improved = bool(pool) and min(one.score for _, one in pool) < best * (1 - 1e-3)
        idle = 0 if improved else idle + 1
        if idle == 3:
            break
    known = {what_it_does(one.plan) for one in found}
    bred = [one for _, one in pool if what_it_does(one.plan) not in known]
    measured = sorted(
        [*bred, *(one for one in found if one.measurement is not None)], key=lambda one: (one.score, one.plan.digest)
    )
    return measured + [one for one in found if one.measurement is None]


class _Search:
    """The state of a search."""

    def __init__(
        self, request: Request, measure: Callable[[Plan], Measurement], calibration: Calibration | None
    ) -> None:
        self.request, self.measure, self.calibration = request, measure, calibration
        self.rng = np.random.default_rng(_SEED)
        self.layers = len(source_of(request.run).layers)
        self.seen: dict[str, Genome] = {}
        self.multiple = multiple_of(request)

    def seeds(self, found: list[Candidate]) -> list[tuple[Genome, Candidate]]:
        """The measured candidates that a genome stands for, and the plainest genomes."""
        self.seen = {what_it_does(one.plan): Genome((1.0,) * self.layers) for one in found}
        pool = []
        for one in found:
            genome = self._genome(one)
            if genome is not None and one.measurement is not None:
                self.seen[what_it_does(one.plan)] = genome
                pool.append((genome, one))
        even = (1.0,) * self.layers
        missing = [Genome(even), Genome(even, drop=4.0), Genome(even, slim=0.25)]
        return pool + self._measured(self._priced(missing), len(missing) if not pool else 1)

    def generation(self, pool: list[tuple[Genome, Candidate]]) -> list[tuple[Genome, Candidate]]:
        """The pool with the most promising children measured; the best plans stay."""
        pool = sorted(pool, key=lambda pair: (pair[1].score, pair[1].plan.digest))[:PARENTS]
        if not pool:
            return pool
        children = [self._child([genome for genome, _ in pool]) for _ in range(CHILDREN)]
        return pool + self._measured(self._priced(children), MEASURED)

    def _child(self, parents: list[Genome]) -> Genome:
        weights = 1.0 / (1 + np.arange(len(parents)))
        one, two = (parents[place] for place in self.rng.choice(len(parents), 2, p=weights / weights.sum()))
        mixed = np.where(self.rng.random(self.layers) < 0.5, one.factors, two.factors)
        moved = mixed * np.exp(
            self.rng.normal(0, FACTOR_STEP, self.layers) * (self.rng.random(self.layers) < max(0.3, 2 / self.layers))
        )
        slim, drop = one.slim, one.drop
        turn = self.rng.random()
        if turn < 0.25:
            slim = float(np.clip(slim + self.rng.choice([-SLIM_STEP, SLIM_STEP]), 0.0, 0.75))
        elif turn < 0.4:
            drop = float(self.rng.choice([0.0, 1.0, 2.0, 4.0, 8.0]))
        factors = tuple(float(f"{value:.3g}") for value in moved / np.exp(np.log(moved).mean()))
        return Genome(factors, slim, 0.0 if slim else drop)

    def _priced(self, genomes: list[Genome]) -> list[tuple[Genome, Candidate]]:
        pairs = []
        for genome in genomes:
            recipe = genome.recipe(self.request, self.multiple)
            try:
                plan = self.request.plan(recipe)
            except PlanError:
                continue
            size = bytes_of(self.request, plan)
            if what_it_does(plan) in self.seen or size > self.request.memory:
                continue
            self.seen[what_it_does(plan)] = genome
            price = predict(plan, self.request.task(), self.calibration)
            pairs.append((genome, Candidate(plan, mix_of(plan), size, price, recipe=recipe)))
        return sorted(pairs, key=lambda pair: (pair[1].score, pair[1].plan.digest))

    def _measured(self, pairs: list[tuple[Genome, Candidate]], count: int) -> list[tuple[Genome, Candidate]]:
        done = []
        for genome, one in pairs[:count]:
            priced = with_elsewhere(self.request, one, self.calibration)
            reasons = ("Found by the search; its text is the one that it was measured on.",)
            done.append((genome, replace(priced, measurement=self.measure(one.plan), reasons=reasons)))
        return done

    def _genome(self, one: Candidate) -> Genome | None:
        recipe, even = one.recipe, (1.0,) * self.layers
        if recipe.get("preset") == "mixed":
            return Genome(tuple(recipe.get("factors", even)), drop=recipe.get("drop", 1.0))
        if recipe.get("preset") == "stream_slim" and "quantizer" in recipe:
            return Genome(tuple(recipe.get("factors", even)), slim=recipe["share"])
        return Genome(even) if recipe.get("preset") == DEFAULT_QUANTIZER else None
