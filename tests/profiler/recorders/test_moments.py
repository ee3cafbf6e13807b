"""Level ``moments`` against the product of the recorded inputs, in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from numpy.testing import assert_allclose
from numpy.typing import NDArray

import profiler
import store
from tests.profiler.capture.tiny import batch, build, output_of, recorded_calls

DOMAINS = [["code", "code", "code"], ["german", "code", "german"]]
BATCHES = [batch(seed=1), batch(seed=2, padding="left")]


def _matrix(frame: pl.DataFrame) -> NDArray[np.float64]:
    return np.array(frame.sort("channel")["products"].to_list(), dtype=np.float64)


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "deepseek_v3", "gpt_oss", "nemotron_h"])
@pytest.mark.parametrize("by_domain", [False, True])
def test_moments_equal_the_inputs_product(family: str, by_domain: bool, tmp_path: Path) -> None:
    model, outputs = build(family), []
    with torch.no_grad(), recorded_calls(model) as calls:
        plain = [output_of(model(**inputs)) for inputs in BATCHES]
    with (
        torch.no_grad(),
        profiler.watch(model, store=tmp_path, name="tiny", level="moments", vectors_per_domain=by_domain) as session,
    ):
        for inputs, domains in zip(BATCHES, DOMAINS, strict=True):
            session.label(domains=domains)
            outputs.append(output_of(model(**inputs)))
            session.flush()  # two shards must add up
    assert all(torch.equal(*pair) for pair in zip(plain, outputs, strict=True))
    assert session.path is not None
    run = store.open_run(session.path)
    assert run.badge.status == "valid", run.badge.reason
    table = run.table("moment")
    real = [inputs["attention_mask"].reshape(-1) == 1 for inputs in BATCHES]
    for entry in calls:
        for domain in ("code", "german") if by_domain else ("",):
            parts = []
            for hidden, mask, names in zip(entry.hidden, real, DOMAINS, strict=True):
                of = torch.tensor([domain in ("", name) for name in names]).repeat_interleave(12)
                parts.append(hidden[mask & of].double())
            entered = torch.cat(parts).numpy()
            found = table.filter(layer=entry.layer.layer, domain=domain, phase="prompt")
            assert set(found["tokens"]) == {len(entered)}
            size = (entered**2).sum(0).max()
            assert_allclose(_matrix(found), entered.T @ entered, rtol=1e-4, atol=1e-6 * size)


def test_a_broken_token_leaves_the_others_alone(tmp_path: Path) -> None:
    model, inputs = build("olmoe"), batch(padding="none")
    with torch.no_grad():
        model.model.embed_tokens.weight[int(inputs["input_ids"][2, -1])] = torch.nan
    with (
        torch.no_grad(),
        profiler.watch(model, store=tmp_path, name="tiny", level="moments") as session,
        recorded_calls(model) as calls,
    ):
        model(**inputs)
    assert session.path is not None
    hidden = calls[0].hidden[0]
    sound = hidden[~hidden.isnan().any(1)].double().numpy()
    assert 0 < len(sound) < 36
    frame = store.open_run(session.path).table("moment").filter(layer=0)
    assert_allclose(_matrix(frame), sound.T @ sound, rtol=1e-4, atol=1e-4)
