"""One copied expert in the bundled model: found from a run, merged where the router stays, and nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import compressor
import planner
import profiler
import store
from compressor.memory import edited
from compressor.plan import MergeStep, experts_after
from profiler.corpus import TokenBatch
from profiler.evaluation import BaseDistribution, evaluate
from tests.planner.collected import ROOT

LAYER, PAIR = 3, (5, 11)
MODEL, TEXTS = ROOT / "sample_data" / "model", ROOT / "sample_data" / "texts"


def batch(tokenizer: Any, line: int) -> TokenBatch:
    """The beginnings of one document of each domain, 128 tokens long."""
    domains = ("german", "python", "english", "c")
    rows = []
    for domain in domains:
        lines = (TEXTS / f"{domain}.jsonl").read_text(encoding="utf-8").splitlines()
        rows.append(tokenizer.encode(json.loads(lines[line])["text"])[:128])
    ids = np.array(rows)
    return TokenBatch(
        ids, np.ones_like(ids), np.zeros_like(ids, bool), np.arange(len(rows)), list(domains), [""] * len(rows)
    )


@pytest.mark.parametrize("row", [False, True], ids=["rows differ", "row copied"])
def test_a_copied_expert_is_found_and_costs_nothing(row: bool, tmp_path: Path) -> None:
    model: Any = profiler.load_model(MODEL, dtype="float32")
    tokenizer = profiler.load_tokenizer(MODEL)
    block = model.model.layers[LAYER].mlp
    with torch.no_grad():
        for tensor in (*block.experts.parameters(), *([block.gate.weight] if row else [])):
            tensor[PAIR[1]] = tensor[PAIR[0]]
    levels = "routing,activations,similarity"
    with (
        profiler.watch(model, store=tmp_path, name="copied", level=levels, similarity_every=2) as session,
        torch.no_grad(),
    ):
        model(input_ids=torch.from_numpy(batch(tokenizer, 0).input_ids))
    assert session.path is not None
    with store.open_run(session.path) as run:
        plan = planner.make(run, preset="copies", share=1 / 96, engine="transformers")
    (step,) = plan.steps
    assert isinstance(step, MergeStep) and step.form == "shared"
    merged = [(one.layer, group.members) for one in step.layers for group in one.groups if len(group.members) > 1]
    assert merged == [(LAYER, PAIR)]

    held_out = [batch(tokenizer, -1)]
    base = BaseDistribution.of(model, held_out)
    with edited(model, plan):
        assert 0 <= base.against(model).kl <= 1e-6
    model.save_pretrained(tmp_path / "source")
    receipt = compressor.apply(plan, source=tmp_path / "source", destination=tmp_path / "out")
    assert receipt.bytes_before - receipt.bytes_after == pytest.approx(3 * 128 * 128 * 4, abs=1024)
    loaded = compressor.load(tmp_path / "out")
    kept = {key: [expert.members for expert in experts] for key, experts in experts_after(plan).items()}
    found = evaluate(loaded, model, lambda: iter(held_out), kept=kept, skip=["generation", "probes", "speed"])
    assert found.divergence.kl <= 1e-6 and found.divergence.agreement.value == 1.0
    assert found.routing is not None and found.routing.whole.agreement.value == 1.0
