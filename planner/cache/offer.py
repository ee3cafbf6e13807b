"""One way to spend the memories of a machine, as a plan that can be followed, with what it is expected to give."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from compressor.plan import Estimate, Evidence, LayerKey, LayerValues, Plan, Provenance, QuantizeStep, Step, Target
from moescope import __version__
from moescope.errors import PlanError
from planner.cache.bound import Bound
from planner.cache.setting import Setting
from planner.cache.study import DomainFigures
from planner.cache.tiers import Tiers, cache_step
from planner.cache.ways import Served
from planner.estimate import estimate
from planner.estimate.parameters import active_parameters, expert_parameters, sizes_before
from planner.estimate.speed import speed
from planner.simulate.forecast import hit_rate_interval
from planner.task import Array, Draft, Task, once, rounded

COVERAGE = 0.95
PRESET = "serve"
"""Name of what made the plan, in its target."""

SCORE = "selections"
"""What exporters read as how often an expert was used."""


@dataclass(frozen=True)
class Offer:
    """A plan, and what it is expected to give.

    Attributes:
        plan: widths, if experts become narrower, and where each lies.
        widths: in words.
        way: in words.
        kl: predicted KL divergence from the model as it is, nats per token; 0 where no weight changes, None where the
            run cannot price it.
        ms: per token; low, high: its interval over requests.
        experts: on the device (most at a time), in host memory, on disk alone.
        bytes: of these.
        domains: the slowest first; served alone where several sequences are decoded together, since passes are then of
            several domains.
    """

    plan: Plan
    widths: str
    way: str
    kl: float | None
    ms: float
    low: float
    high: float
    experts: tuple[int, int, int]
    bytes: tuple[float, float, float]
    domains: tuple[DomainFigures, ...]

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences together."""
        return 1e3 / self.ms if self.ms > 0 else float("inf")

    @property
    def worst(self) -> DomainFigures:
        """The domain that is slowest."""
        return self.domains[0]

    def content(self) -> dict[str, Any]:
        """As plain data, for a file; the plan is in it whole."""
        plain = {name: getattr(self, name) for name in ("widths", "way", "kl", "ms", "low", "high")}
        return {
            **plain,
            "plan": self.plan.model_dump(mode="json"),
            "experts": list(self.experts),
            "bytes": list(self.bytes),
            "domains": [asdict(one) for one in self.domains],
        }

    @staticmethod
    def of(content: Mapping[str, Any]) -> Offer:
        """From plain data.

        Raises:
            PlanError: it is no offer, or its plan cannot be followed.
        """
        try:
            given = dict(content)
            return Offer(
                plan=Plan.parse(json.dumps(given.pop("plan")), "a plan of the offer"),
                experts=tuple(given.pop("experts")), bytes=tuple(given.pop("bytes")),
                domains=tuple(DomainFigures(**row) for row in given.pop("domains")), **given,
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"this is no offer of moescope: {error}") from error


def offer_of(
    setting: Setting, task: Task, served: Served, tiers: Tiers, *, step: QuantizeStep | None, widths: str, bound: Bound,
    domains: tuple[DomainFigures, ...], notes: tuple[str, ...] = (),
) -> Offer:  # fmt: skip
    """The offer that a replayed way makes.

    Args:
        setting: in the widths of ``step``.
        task: the run, its domains and its guard.
        served: the way, replayed.
        tiers: where experts lie.
        step: widths; None = as they are.
        widths: in words.
        bound: of the setting.
        domains: the slowest first.
        notes: sentences for the reader.
    """
    low, high = served.interval(coverage=COVERAGE)
    budget = setting.budget
    peak = budget.other + budget.kv + budget.activations + tiers.device_bytes
    rates = hit_rate_interval(served.outcome, domains=served.domains, confidence=COVERAGE)
    found = speed(
        served.clock, bound.ms(served.slots) * bound.tokens / 1e3, setting.machine,
        hit_rate=tuple(float(np.clip(one.item(), 0.0, 1.0)) for one in (rates.rate, rates.lower, rates.upper)),  # type: ignore[arg-type]
        context=setting.context, peak_bytes=peak, batch=setting.batch, coverage=COVERAGE,
    )  # fmt: skip
    steps: tuple[Step, ...] = (cache_step(setting, served, tiers, method=PRESET),)
    steps = steps if step is None else (step, *steps)
    selections = once(task.kept, ("selections", task.domains), lambda: selections_of(task))
    machine = setting.machine
    target = Target(
        machine=machine.name, vram=machine.vram, ram=machine.ram, preset=PRESET,
        engine="any" if step is None else "transformers",
    )  # fmt: skip
    plan = plan_of(task, steps, target=target, selections=selections, notes=notes)
    draft = Draft(steps=steps, score=SCORE, unit="tokens", values=selections, notes=notes)
    values = {name: value for name, value in found.model_dump().items() if isinstance(value, float)}
    figures = found.model_copy(update={name: float(rounded(np.array(value)).item()) for name, value in values.items()})
    plan = plan.model_copy(update={"estimate": estimate(plan, task, draft).model_copy(update={"speed": figures})})
    kl = 0.0 if step is None else None if plan.estimate.prediction is None else plan.estimate.prediction.kl
    exists = setting.sizes.bytes > 0
    elsewhere = int((exists & ~tiers.device & ~tiers.disk).sum())
    return Offer(
        plan=plan, widths=widths, way=served.way.title, kl=kl, ms=served.ms, low=low, high=high,
        experts=(tiers.held, elsewhere, int(tiers.disk.sum())),
        bytes=(tiers.device_bytes, tiers.ram_bytes, tiers.disk_bytes), domains=domains,
    )  # fmt: skip


def plan_of(
    task: Task, steps: tuple[Step, ...], *, target: Target, selections: Mapping[LayerKey, Array], notes: tuple[str, ...]
) -> Plan:
    """The checked plan of some steps, whose evidence is how often each expert was chosen; without an estimate.

    Args:
        task: the run, its domains and its guard.
        steps: of the plan.
        target: what was asked for.
        selections: (layer, step) -> (experts,) tokens that chose each.
        notes: sentences for the reader.
    """
    run, source = task.run, task.source
    whole, active = expert_parameters(source, sizes_before(source)), active_parameters(source, sizes_before(source))
    evidence = Evidence(
        score=SCORE, unit="tokens", source="as recorded",
        layers=tuple(
            LayerValues(layer=layer, step=step, values=tuple(map(float, values.tolist())))
            for (layer, step), values in sorted(selections.items())
        ),
        protected=task.guard.protected, guard=task.guard.active, notes=(*notes, *task.guard.notes),
    )  # fmt: skip
    return Plan(
        provenance=Provenance(
            run=run.name, corpus=str(run.info.settings.get("corpus_sha256", "")), tokens=run.info.tokens,
            domains=task.domains, badge=run.badge.status, tool_version=__version__,
        ),
        source=source, target=target, steps=steps,
        estimate=Estimate(
            expert_parameters=whole, expert_parameters_after=whole, active_parameters=active,
            active_parameters_after=active, bytes_saved=0,
        ),
        evidence=(evidence,),
    ).checked()  # fmt: skip


def selections_of(task: Task) -> dict[LayerKey, Array]:
    """(layer, step) -> (experts,) tokens of the task's domains that chose each."""
    found = {shape.key: np.zeros(shape.num_experts) for shape in task.source.layers}
    rows = task.run.table("expert_load").filter(kind="routed").select("layer", "step", "expert", "domain", "tokens")
    for layer, step, expert, domain, tokens in rows.iter_rows():
        if domain in task.domains and (layer, step) in found and expert < len(found[layer, step]):
            found[layer, step][expert] += tokens
    return found


def domains_of(served: Served) -> tuple[DomainFigures, ...]:
    """A way by domain, the slowest first."""
    tokens: dict[str, float] = {}
    for name, count in zip(served.domains, served.request_tokens.tolist(), strict=True):
        tokens[name] = tokens.get(name, 0.0) + count
    rows = [DomainFigures(name, round(tokens[name]), rate, ms, rate) for name, (rate, ms) in served.by_domain().items()]
    return tuple(sorted(rows, key=lambda row: -row.ms))
