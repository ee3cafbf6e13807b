"""Prompts read in chunks, and experts that a checkpoint keeps packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_settings import EXPERT, HIDDEN, WIDTH, random_routes, slow_machine, sticky_routes, written_run

from moescope.errors import PlanError
from planner.cache.policies import compare
from planner.cache.setting import setting_of
from planner.caching import study
from planner.serving import serving
from planner.simulate.workload import prefill

SHAPE = {"layers": 3, "experts": 16, "k": 2, "requests": 8, "length": 20}


def test_chunks_are_passes_of_their_tokens(tmp_path: Path) -> None:
    run = written_run(tmp_path, random_routes(0, **SHAPE), config={})
    single, chunked = (setting_of(run, slow_machine(), other_weights=0, chunk=chunk) for chunk in (1, 6))
    expected = prefill(single.test, chunk=6)
    assert (chunked.test.ids == expected.ids).all()
    assert chunked.test.pass_tokens.tolist() == [6, 6, 6, 2] * single.test.num_requests
    assert chunked.least_slots == single.least_slots == 3 * 2  # what one token needs; more may pass through
    # each expert of a chunk is read once, for all of its tokens
    used = [len(set(single.test.ids[0, at : at + 6].ravel().tolist())) for at in (0, 6, 12)]
    assert chunked.test.needed[0, :3].tolist() == used


def test_reading_many_tokens_at_once_takes_less_time_for_each(tmp_path: Path) -> None:
    run = written_run(tmp_path, sticky_routes(0, stay=0.5, **SHAPE), config={})
    machine = slow_machine(vram=24 * EXPERT)
    times = [study(run, machine, other_weights=0, chunk=chunk).best.ms for chunk in (1, 4, 16)]
    assert times == sorted(times, reverse=True)
    found = study(run, machine, other_weights=0, chunk=4)
    assert any("4 tokens at a time" in note for note in found.notes)
    assert all(point.bound <= point.ms for point in found.points)


def test_sequences_side_by_side_or_chunks(tmp_path: Path) -> None:
    run = written_run(tmp_path, random_routes(0, **SHAPE), config={})
    with pytest.raises(PlanError, match="batch 2 and chunk 4: .* ask for one"):
        setting_of(run, slow_machine(), other_weights=0, batch=2, chunk=4)
    with pytest.raises(PlanError, match="chunk 0 is no number of tokens"):
        setting_of(run, slow_machine(), other_weights=0, chunk=0)


@pytest.mark.parametrize(
    ("quantization", "bits"),
    [({"quant_method": "mxfp4"}, 4.25), ({"quant_method": "fp8"}, 8.0), ({"quant_method": "gptq", "bits": 4}, 4.15625),
     ({"quant_method": "awq", "bits": 4, "group_size": 64}, 4.3125),
     ({"quant_method": "gptq", "bits": 4, "group_size": -1}, 4.0),
     ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4.5), ({"quant_method": "unheard"}, 16.0), (None, 16.0)],
)  # fmt: skip
def test_packed_experts_take_what_the_checkpoint_stores(
    tmp_path: Path, quantization: dict[str, Any] | None, bits: float
) -> None:
    config = {} if quantization is None else {"quantization_config": quantization}
    run = written_run(tmp_path, random_routes(0, **SHAPE), config=config)
    setting = setting_of(run, slow_machine(), other_weights=0)
    assert setting.slot_bytes == pytest.approx(3 * HIDDEN * WIDTH * bits / 8)
    assert (setting.packed is None) == (bits == 16.0)


def test_packed_experts_are_offered_as_they_are(tmp_path: Path) -> None:
    run = written_run(tmp_path, random_routes(0, **SHAPE), config={"quantization_config": {"quant_method": "mxfp4"}})
    found = serving(run, slow_machine(vram=6 * EXPERT), other_weights=0)
    assert {one.widths for one in found.offers} == {"as they are"}
    assert any("4.25 bits already" in note for note in found.notes)


def test_the_narrow_half_of_hobbit_goes_by_gate_weights_of_one_token(tmp_path: Path) -> None:
    run = written_run(tmp_path, sticky_routes(0, stay=0.6, **SHAPE), config={})
    titles = [one.title for one in compare(setting_of(run, slow_machine(), other_weights=0), slots=12)]
    assert sum("quarter of the bits" in title for title in titles) == 1
    side_by_side = setting_of(run, slow_machine(), other_weights=0, batch=2)
    assert not any("quarter of the bits" in one.title for one in compare(side_by_side, slots=12))
    assert np.isfinite([one.ms for one in compare(side_by_side, slots=12)]).all()
