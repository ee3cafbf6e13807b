"""Task-adaptive retrieval: kept experts per domain, found again by what the first MoE layer's router does to a text.

Source: PreMoe (arXiv 2505.17639). It stores a TCESS vector of the first MoE layer per task, and at query time takes the
task whose vector is nearest (L2). Its code matches later layers' experts by rank; here every domain stores its own kept
set of every layer, so nothing has to be matched.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

import planner.importance as importance
import store
from compressor.plan import DropLayer, DropStep, LayerKey, Plan, Target, experts_after
from moescope.errors import PlanError
from planner.entry import assemble, make
from planner.guard import guard_of
from planner.source import source_of
from planner.task import Array, Draft, Task, rounded

VERSION = 1


@dataclass(frozen=True)
class Pattern:
    """What is known of one domain.

    Attributes:
        vector: (experts,) TCESS of the first MoE layer on its text.
        kept: (layer, step) -> experts that stay for it, ascending.
    """

    vector: tuple[float, ...]
    kept: dict[LayerKey, tuple[int, ...]]


@dataclass(frozen=True)
class Patterns:
    """The patterns of one model.

    Attributes:
        model: folder name or hub id.
        fingerprint: of its weights; empty = unknown.
        share: part of the experts that every pattern removes.
        rank: choices of a token that TCESS counts.
        domains: the patterns by domain.
    """

    model: str
    fingerprint: str
    share: float
    rank: int
    domains: dict[str, Pattern]

    def save(self, path: str | Path) -> None:
        """Write them as JSON."""
        content = {
            "version": VERSION, "model": self.model, "fingerprint": self.fingerprint, "share": self.share,
            "rank": self.rank,
            "domains": {
                name: {
                    "vector": list(one.vector),
                    "kept": [[layer, step, list(kept)] for (layer, step), kept in sorted(one.kept.items())],
                }
                for name, one in sorted(self.domains.items())
            },
        }  # fmt: skip
        try:
            Path(path).write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise PlanError(f"{path} cannot be written: {error.strerror or error}") from error

    @classmethod
    def load(cls, path: str | Path) -> Patterns:
        """Read them.

        Raises:
            PlanError: the file cannot be read, or holds something else.
        """
        try:
            content: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
            if content["version"] != VERSION:
                raise PlanError(f"{path} has version {content['version']!r}; this moescope reads {VERSION}")
            domains = {
                str(name): Pattern(
                    tuple(float(value) for value in one["vector"]),
                    {(int(layer), int(step)): tuple(map(int, kept)) for layer, step, kept in one["kept"]},
                )
                for name, one in content["domains"].items()
            }
            return cls(
                str(content["model"]),
                str(content["fingerprint"]),
                float(content["share"]),
                int(content["rank"]),
                domains,
            )
        except OSError as error:
            raise PlanError(f"{path} cannot be read: {error.strerror or error}") from error
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise PlanError(f"{path} holds no patterns of moescope: {error!r}") from error


def build(
    run: store.Run, *, share: float, rank: int = 1, domains: Sequence[str] | None = None, guard: bool = True
) -> Patterns:
    """The patterns of a run's domains: what each keeps by its own TCESS, and its vector of the first MoE layer.

    Args:
        run: a run of level routing whose routers show logits.
        share: part of the experts that goes.
        rank: choices of a token that count, 1 as in PreMoe's demo.
        domains: which; None = all.
        guard: keep super experts in every pattern.

    Raises:
        PlanError: as :func:`planner.make`.
    """
    patterns = {}
    for domain in list(domains) if domains is not None else run.domains:
        plan = make(run, preset="tcess", share=share, domains=[domain], rank=rank, guard=guard)
        kept = {key: tuple(one.lead for one in experts) for key, experts in experts_after(plan).items()}
        patterns[domain] = Pattern(tuple(query(run, rank=rank, domain=domain).tolist()), kept)
    return Patterns(run.info.model, run.info.model_fingerprint, share, rank, patterns)


def query(run: store.Run, *, rank: int = 1, domain: str | None = None) -> Array:
    """(experts,) TCESS of the first MoE layer over a run's text: what a pattern is looked up with."""
    first = run.layers[0]
    frame = importance.score(run, "tcess", rank=rank, domain=domain)
    mine = frame.filter((pl.col("layer") == first.layer) & (pl.col("step") == first.step)).sort("expert")
    return rounded(mine["value"].to_numpy())


def nearest(patterns: Patterns, vector: Array) -> tuple[str, dict[str, float]]:
    """The domain whose vector is nearest, and the L2 distance to each; of equal ones the first by name.

    Raises:
        PlanError: no pattern, or a vector of another length.
    """
    if not patterns.domains:
        raise PlanError(f"the patterns of {patterns.model} name no domain: build them from a run that has some")
    distances = {}
    for name, one in sorted(patterns.domains.items()):
        if len(one.vector) != len(vector):
            raise PlanError(
                f"the vector has {len(vector)} experts, the pattern of domain {name!r} has {len(one.vector)}"
            )
        distances[name] = float(np.linalg.norm(np.asarray(one.vector) - vector))
    return min(distances, key=lambda name: (distances[name], name)), distances


def retrieve(run: store.Run, patterns: Patterns, *, engine: str | None = None, guard: bool = True) -> Plan:
    """The plan of the domain that a run's text is nearest to.

    Args:
        run: of the same model on the text that is to be served; level routing is enough.
        patterns: from :func:`build`.
        engine: as for :func:`planner.make`.
        guard: refuse a pattern that cuts a super expert of this run.

    Raises:
        PlanError: another model, or a plan that cannot be.
    """
    info = run.info
    if (patterns.fingerprint or info.model_fingerprint) != (info.model_fingerprint or patterns.fingerprint):
        raise PlanError(
            f"the patterns are those of {patterns.model}, run {run.name!r} is of another model, or in another type:"
            f" {info.model}"
        )
    domain, distances = nearest(patterns, query(run, rank=patterns.rank))
    source = source_of(run)
    task = Task(run, source, tuple(run.domains), patterns.share, "uniform", guard_of(run, guard))
    layers = []
    for shape in source.layers:
        kept = set(patterns.domains[domain].kept.get(shape.key, range(shape.num_experts)))
        gone = tuple(expert for expert in range(shape.num_experts) if expert not in kept)
        layers.append(DropLayer(layer=shape.layer, step=shape.step, experts=gone))
    told = ", ".join(f"{name} {value:.4g}" for name, value in sorted(distances.items(), key=lambda item: item[1]))
    draft = Draft(
        steps=(DropStep(method="tcess", layers=tuple(layers)),),
        score="tcess",
        unit="logits per token",
        values={source.layers[0].key: query(run, rank=patterns.rank)},
        notes=(f"The pattern of domain {domain} was taken: its vector is nearest. Distances: {told}.",),
    )
    return assemble(task, draft, Target(share=patterns.share, engine=engine or "any", preset="tcess"))
