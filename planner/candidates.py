"""Every way to reach a size: each preset by itself, and cuts whose rest is quantized. No model is run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import store
from compressor.plan import Plan, SlimStep
from moescope.errors import PlanError
from planner.budget import bytes_after
from planner.domains import pooled
from planner.engines import loads
from planner.entry import make
from planner.estimate.prediction import Calibration, predict
from planner.guard import Rule, guard_of
from planner.presets import DEFAULT_QUANTIZER, PRESETS, Preset, find
from planner.recommendation import Candidate, mix_of
from planner.source import source_of
from planner.task import Task, once

SHARES = (0.125, 0.25, 0.375, 0.5)
"""What mixtures cut before the rest is quantized."""

MIXTURES = (
    ("stream_slim", "per_layer"), ("camera_p", "uniform"), ("budgeted_reap", "per_layer"), ("even_search", "uniform"),
    ("hc_smoe", "shared"),
)  # fmt: skip
"""(preset, form) of the cuts that mixtures begin with."""

CONTROLS = ("random", "random_bits", "moe_blocks", "copies")
"""Presets that are no advice: controls, and what saves nothing or cannot be asked for a size."""

DROP_FACTORS = (1.0, 2.0, 4.0)
"""Preset ``mixed`` is tried with dropping as cheap as the sums say, and dearer: it hurts text that the run has not seen
more than narrow widths do."""


@dataclass
class Request:
    """What is asked of all candidates alike.

    Attributes:
        run: a finished run.
        memory: bytes that all weights may take.
        other_weights: bytes of the weights beside experts.
        engine: see :func:`planner.make`.
        domains: whose text counts; None = all.
        guard: protect super experts.
        allow_invalid: take a run whose checks failed.
        presets: names of those that are tried, alone and in mixtures; None = all.
        shares: what mixtures cut before the rest is quantized.
        kept: what was worked out before, by the domains that counted.
    """

    run: store.Run
    memory: int
    other_weights: int = 0
    engine: str | None = None
    domains: Sequence[str] | None = None
    guard: bool | Rule = True
    allow_invalid: bool = False
    presets: Sequence[str] | None = None
    shares: Sequence[float] = SHARES
    kept: dict[tuple[str, ...], dict[Any, Any]] = field(default_factory=dict, repr=False)

    def task(self, domains: Sequence[str] | None = None) -> Task:
        """A task for pricing plans over some domains; None = those of the request."""
        names = tuple(sorted(domains or self.domains or self.run.domains))
        kept = self.kept.setdefault(names, {})
        guard = once(kept, ("guard", self.guard), lambda: guard_of(self.run, self.guard))
        return Task(
            run=self.run, source=once(kept, "source", lambda: source_of(self.run)), domains=names, share=0.0,
            form="per_layer", guard=guard, kept=kept,
        )  # fmt: skip

    def plan(self, recipe: Mapping[str, Any], domains: Sequence[str] | None = None) -> Plan:
        """The plan of a recipe, over the request's domains or others."""
        names = tuple(sorted(domains or self.domains or self.run.domains))
        return make(
            self.run, engine=self.engine, domains=names, guard=self.guard, allow_invalid=self.allow_invalid,
            kept=self.kept.setdefault(names, {}), other_weights=self.other_weights, **recipe,
        )  # fmt: skip


def candidates(request: Request, calibration: Calibration | None = None) -> tuple[list[Candidate], dict[str, str]]:
    """All plans that reach the size, unranked, and presets that gave none with the reason."""
    found: dict[str, Candidate] = {}
    refused: dict[str, str] = {}
    for name, recipe in recipes(request):
        try:
            plan = request.plan(recipe)
        except PlanError as error:
            refused.setdefault(name, str(error))
            continue
        size = bytes_of(request, plan)
        if size > request.memory:
            refused.setdefault(name, f"its weights would take {size:,} bytes")
            continue
        found.setdefault(
            what_it_does(plan),
            Candidate(plan, mix_of(plan), size, predict(plan, request.task(), calibration), recipe=recipe),
        )
    return list(found.values()), {name: why for name, why in refused.items() if not _given(name, found.values())}


def recipes(request: Request) -> Iterator[tuple[str, dict[str, Any]]]:
    """(preset, arguments of ``make``) of everything that is tried."""
    for preset in PRESETS:
        if preset.name in CONTROLS or not _tried(request, preset.name):
            continue
        forms = saving_forms(preset, request.engine)
        if not forms:
            continue
        recipe: dict[str, Any] = {"preset": preset.name, "memory": request.memory, "form": forms[0]}
        if preset.name == "mixed":
            yield from ((preset.name, {**recipe, "drop": factor}) for factor in DROP_FACTORS)
        elif preset.name.startswith("pmq"):
            yield preset.name, {**recipe, "widths": (2, 3)}
        else:
            yield preset.name, recipe
    for name, form in MIXTURES:
        if loads(request.engine, "packed") and loads(request.engine, form):
            for share in request.shares if _tried(request, name) else ():
                recipe = {"preset": name, "form": form, "share": share, "memory": request.memory}
                if find(name).step == "slim":
                    recipe["multiple"] = multiple_of(request)
                yield f"{name}+{DEFAULT_QUANTIZER}", {**recipe, "quantizer": DEFAULT_QUANTIZER}


def saving_forms(preset: Preset, engine: str | None) -> list[str]:
    """The forms of a preset that take less than the source, and that the engine loads."""
    forms = [form for form in preset.forms if form not in ("masked", "dense", "padded")]
    if preset.step == "factor":
        return []
    return [form for form in forms if loads(engine, form)]


def bytes_of(request: Request, plan: Plan) -> int:
    """Bytes of all weights that a plan leaves."""
    return request.other_weights + bytes_after(request.task(), plan)


def what_it_does(plan: Plan) -> str:
    """The same for plans that do the same, whatever they rest on."""
    steps = [step.model_dump(mode="json", exclude={"method", "grouping", "granularity"}) for step in plan.steps]
    return json.dumps(steps, sort_keys=True)


def with_elsewhere(request: Request, candidate: Candidate, calibration: Calibration | None = None) -> Candidate:
    """The candidate with what its recipe costs on domains that it was not made from."""
    names = tuple(sorted(request.domains or request.run.domains))
    if len(names) < 2 or not candidate.recipe or candidate.prediction is None:
        return candidate
    slims = any(isinstance(step, SlimStep) for step in candidate.plan.steps)
    if slims and pooled(request.task(names[:1]), "neuron_activation"):
        return candidate
    costs = []
    for name in names:
        others = [one for one in names if one != name]
        try:
            plan = request.plan(candidate.recipe, others)
        except PlanError:
            return candidate
        found = predict(plan, request.task([name]), calibration)
        if found is None:
            return candidate
        costs.append(found.kl)
    return replace(candidate, elsewhere=sum(costs) / len(costs))


def _tried(request: Request, name: str) -> bool:
    return request.presets is None or name in request.presets


def multiple_of(request: Request) -> int:
    """Widths that keep groups of scales large: a quarter of the width, at most 64, at least 8."""
    width = min(shape.width for shape in source_of(request.run).layers)
    size = 64
    while size > 8 and size > width // 4:
        size //= 2
    return size


def _given(name: str, found: Iterable[Candidate]) -> bool:
    return any(candidate.plan.target.preset == name for candidate in found)
