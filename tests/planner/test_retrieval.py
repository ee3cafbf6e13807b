"""Patterns per domain: kept, read back, and found again by another text of the same domain."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import planner
import planner.importance as importance
import profiler
import store
from compressor.plan import Plan, experts_after
from moescope.errors import PlanError
from planner.drop.retrieval import Patterns, build, nearest, query, retrieve
from tests.planner.collected import ROOT, sample


@pytest.fixture(scope="module")
def run() -> Iterator[store.Run]:
    with sample() as opened:
        yield opened


@pytest.fixture(scope="module")
def patterns(run: store.Run) -> Patterns:
    return build(run, share=0.5)


def test_a_pattern_is_the_domains_own_plan(run: store.Run, patterns: Patterns) -> None:
    assert set(patterns.domains) == set(run.domains)
    for domain in ("german", "python"):
        after = experts_after(planner.make(run, preset="tcess", share=0.5, domains=[domain]))
        kept = {key: tuple(one.lead for one in experts) for key, experts in after.items()}
        assert patterns.domains[domain].kept == kept
        vector = importance.score(run, "tcess", rank=1, domain=domain).filter(layer=0)["value"].to_numpy()
        np.testing.assert_allclose(patterns.domains[domain].vector, vector, rtol=1e-5)


def test_patterns_come_back(patterns: Patterns, tmp_path: Path) -> None:
    patterns.save(tmp_path / "patterns.json")
    assert Patterns.load(tmp_path / "patterns.json") == patterns
    first = (tmp_path / "patterns.json").read_bytes()
    patterns.save(tmp_path / "patterns.json")
    assert (tmp_path / "patterns.json").read_bytes() == first


def test_the_nearest_by_distance(run: store.Run, patterns: Patterns) -> None:
    for domain in run.domains:
        found, distances = nearest(patterns, query(run, domain=domain))
        assert found == domain and distances[domain] == 0.0
        other = np.asarray(patterns.domains["c"].vector) - np.asarray(patterns.domains[domain].vector)
        assert distances["c"] == pytest.approx(float(np.sqrt((other**2).sum())))
    with pytest.raises(PlanError, match="the vector has 3 experts, the pattern of domain 'arithmetic' has 16"):
        nearest(patterns, np.zeros(3))
    with pytest.raises(PlanError, match="name no domain"):
        nearest(replace(patterns, domains={}), np.zeros(16))


def test_another_text_finds_its_domain(patterns: Patterns, tmp_path: Path) -> None:
    """Other documents of each domain, through the same model, at level routing."""
    model = profiler.load_model(str(ROOT / "sample_data" / "model"), dtype="float32")
    tokenizer = profiler.load_tokenizer(str(ROOT / "sample_data" / "model"))
    texts = ROOT / "sample_data" / "texts"
    for domain in ("german", "python"):
        lines = (texts / f"{domain}.jsonl").read_text(encoding="utf-8").splitlines()
        content = json.loads(lines[-1])["text"]
        with profiler.watch(model, store=tmp_path, name=domain, level="routing") as session, torch.no_grad():
            session.label(domains=["unknown"])
            model(input_ids=torch.tensor([tokenizer.encode(content)[:400]]))
        assert session.path is not None
        with store.open_run(session.path) as asked:
            plan = retrieve(asked, patterns)
        assert Plan.parse(plan.text()) == plan
        kept = {key: tuple(one.lead for one in experts) for key, experts in experts_after(plan).items()}
        assert kept == patterns.domains[domain].kept
        assert f"The pattern of domain {domain} was taken" in plan.evidence[0].notes[0]
        assert plan.provenance.run == domain and plan.target.share == 0.5


def test_other_models_and_files_are_refused(run: store.Run, patterns: Patterns, tmp_path: Path) -> None:
    with pytest.raises(
        PlanError, match="the patterns are those of sample_data/model, run 'sample' is of another model"
    ):
        retrieve(run, replace(patterns, fingerprint="another"))
    for text in ("", "[]", "{}", '{"version": 2}', '{"version": 1, "domains": {"a": 3}}', "[" * 10**5):
        (tmp_path / "wrong.json").write_text(text)
        with pytest.raises(PlanError, match="wrong.json"):
            Patterns.load(tmp_path / "wrong.json")
    with pytest.raises(PlanError, match="cannot be read"):
        Patterns.load(tmp_path / "none.json")
    with pytest.raises(PlanError, match="cannot be written"):
        patterns.save(tmp_path / "nowhere" / "patterns.json")
