"""Whether the model of one run was made of the other's by a plan, and what was measured of the two: from the documents
beside the runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Literal

import polars as pl

import store
from app.frames import evaluation
from compressor.plan import Plan, experts_after, kept_layers
from compressor.plan.result import router_stays
from moescope.errors import MoescopeError
from profiler.expert_pairs import Made

Side = Literal["first", "second"]


@dataclass(frozen=True)
class Link:
    """The plan between two runs.

    Attributes:
        base: which of the two runs watched the original.
        plan: file of the plan.
        digest: SHA-256 of its text.
    """

    base: Side
    plan: Path
    digest: str

    def load(self) -> Plan:
        """The plan itself.

        Raises:
            PlanError: it cannot be read any more.
        """
        return Plan.load(self.plan)


def link(first: store.Run, second: store.Run) -> Link | None:
    """The plan that made the model of one run of the other's; None where nothing beside the runs says so.

    A receipt beside the original names the folder that the plan was applied into, an evaluation the fingerprint of what
    it measured. Both count only where the plan leaves as many layers and experts as the other run has.
    """
    sides: tuple[tuple[Side, store.Run, store.Run], ...] = (("first", first, second), ("second", second, first))
    for side, base, model in sides:
        for digest in _digests(base, model):
            path = store.plan_path(base.path, "plan", digest[:12])
            try:
                plan = Plan.load(path)
            except MoescopeError:
                continue
            if plan.digest == digest and _fits(plan, base, model):
                return Link(side, path, digest)
    return None


def made_by(found: Link | None) -> Made | None:
    """Which experts and layers are left; None where all are, each under its own number.

    Raises:
        PlanError: the plan cannot be read any more.
    """
    if found is None:
        return None
    plan = found.load()
    if not any(step.step in ("drop", "merge") for step in plan.for_checkpoint):
        return None
    kept = {} if router_stays(plan) else experts_after(plan)
    return Made(found.base, {key: [one.members for one in experts] for key, experts in kept.items()}, kept_layers(plan))


def measured(first: store.Run, second: store.Run) -> pl.DataFrame:
    """What ``moescope evaluate`` found of the two models, one row per figure: figure, value, low, high, model, base.

    Figures: KL divergence in nats per token, perplexity over that of the base, share of tokens with the same likeliest
    next one. Empty where no evaluation beside either run is of these two.
    """
    rows: list[tuple[Any, ...]] = []
    for run in (first, second):
        for document in evaluation.documents(run):
            if not _is_of(document, first, second):
                continue
            found = evaluation.summary(document)
            who = (found["model"], found["base"], found["tokens"], bool(found["held_out"]))
            rows += [
                ("KL divergence, nats per token", found["kl"], found["kl_low"], found["kl_high"], *who),
                ("perplexity over the base's", found["ratio"], found["ratio_low"], found["ratio_high"], *who),
                ("same likeliest next token", found["agreement"], None, None, *who),
            ]
    return pl.DataFrame(rows, schema=_MEASURED, orient="row").unique(maintain_order=True)


def _digests(base: store.Run, model: store.Run) -> Iterator[str]:
    """Plans that were applied into a folder of the model's name, or whose result was measured, the newest first."""
    for path in store.list_plans(base.path, "receipt"):
        document = _read(store.read_plan_document, path)
        if _last(document.get("destination")) == _last(model.info.model):
            yield str(document.get("plan") or "")
    for run in (base, model):
        for path in store.list_evaluations(run.path, "evaluation"):
            document = _read(store.read_evaluation, path)
            mark = (document.get("model") or {}).get("fingerprint")
            if document.get("plan") and mark and mark == model.info.model_fingerprint:
                yield str(document["plan"])


def _fits(plan: Plan, base: store.Run, model: store.Run) -> bool:
    """Whether the plan is for the one's experts, and leaves the other's."""
    if {shape.key: shape.num_experts for shape in plan.source.layers} != _counts(base):
        return False
    places = {layer: place for place, layer in enumerate(kept_layers(plan))}
    whole = router_stays(plan)
    left = {
        (places[layer], step): base_count if whole else len(experts)
        for (layer, step), experts in experts_after(plan).items()
        for base_count in (plan.source.by_key[layer, step].num_experts,)
    }
    there = _counts(model)
    return left.keys() == there.keys() and all(count <= there[key] for key, count in left.items())


def _counts(run: store.Run) -> dict[tuple[int, int], int]:
    return {(one.layer, one.step): one.num_experts for one in run.layers}


def _is_of(document: dict[str, Any], first: store.Run, second: store.Run) -> bool:
    mine = [_marks_of(run) for run in (first, second)]
    theirs = [{part.get("fingerprint") or "", _last(part.get("name"))} - {""} for part in _parts(document)]
    return len(theirs) == 2 and any(
        mine[0] & one and mine[1] & other for one, other in (theirs, theirs[::-1])
    )  # fmt: skip


def _marks_of(run: store.Run) -> set[str]:
    """What names a run's model: its fingerprint, or its folder where that is no part of a path to another."""
    return {run.info.model_fingerprint, _last(run.info.model)} - {""}


def _parts(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [part for part in (document.get("model"), document.get("base")) if isinstance(part, dict)]


def _last(name: object) -> str:
    """The last part of a path or hub id."""
    return PurePath(str(name or "").replace("\\", "/")).name


def _read(reader: Any, path: Path) -> dict[str, Any]:
    """A document; an empty one where it cannot be read, as of another version."""
    try:
        return dict(reader(path))
    except MoescopeError:
        return {}


_MEASURED = {"figure": pl.String, "value": pl.Float64, "low": pl.Float64, "high": pl.Float64, "model": pl.String,
             "base": pl.String, "tokens": pl.Int64, "held_out": pl.Boolean}  # fmt: skip
