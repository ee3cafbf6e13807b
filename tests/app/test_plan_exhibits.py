"""Exhibits of compression, caching and placement by name: their choices, and why a run cannot fill one."""

from __future__ import annotations

from pathlib import Path

import place_runs
import pytest
import synthetic

import store
from app import exhibits
from app.exhibits.exhibit import Absent
from app.exhibits.listed import domains_of, listed
from app.frames import placement as frames
from app.left_out import ranges, told_once
from moescope.errors import InputError
from sample_data import RUN


def test_placement_by_name_is_that_of_the_planner() -> None:
    with store.open_run(RUN) as run:
        made = exhibits.make("placement-loads", run, choices={"devices": "4", "domains": "c,german"})
        found = frames.placed(run, method="eplb", devices=4, domains=("c", "german"), max_tokens=200_000, batch=64)
        assert made.frame.equals(frames.device_loads(found))
        with pytest.raises(InputError, match="no domain 'klingon'"):
            exhibits.make("placement-loads", run, choices={"domains": "klingon"})
        with pytest.raises(Absent, match="use at most 16 devices"):
            exhibits.make("placement-balance", run, choices={"devices": "32"})


def test_a_plan_by_name_and_room_need_their_levels(tmp_path: Path) -> None:
    synthetic.finished(tmp_path, activations=False)
    with store.open_run(tmp_path / "synthetic.duckdb") as run:
        assert len(exhibits.make("plan-map", run, choices={"share": "0.5"}).frame) > 0
        for name in ("room-depth", "room-width", "plan-cost", "compress-curve"):
            with pytest.raises(Absent):
                exhibits.make(name, run)
        with pytest.raises(Absent, match="choose other_weights"):
            exhibits.make("caching-speed", run)
        with pytest.raises(InputError, match="no machine 'abacus'"):
            exhibits.make("caching-speed", run, choices={"machine": "abacus"})
        with pytest.raises(Absent, match="No plan of this run was measured") as missing:
            exhibits.make("compress-measured", run)
        assert "moescope evaluate" in missing.value.remedy


def test_counts_have_no_passes(tmp_path: Path) -> None:
    path, _ = place_runs.counts(tmp_path)
    with store.open_run(path) as run:
        assert len(exhibits.make("placement-windows", run, choices={"devices": "2"}).frame)
        with pytest.raises(Absent, match="counts and no trace"):
            exhibits.make("placement-passes", run, choices={"devices": "2"})
        with pytest.raises(Absent, match="cannot be computed"):
            exhibits.make("caching-hits", run)


def test_names_that_hold_commas_survive() -> None:
    with store.open_run(RUN) as run:
        assert domains_of(run, listed(["c", "german"])) == ("c", "german")
        assert listed([]) is None and domains_of(run, None) is None
    assert listed(["a, b", "c"]) == '"a, b",c'


def test_what_is_said_of_many_layers_is_said_once() -> None:
    said = [
        "step 1, cache: policy lru", "layer 0 (slots for 8 experts): it holds none", "layer 2: other",
        "layer 1 (slots for 8 experts): it holds none", "layer 3 (slots for 7 experts): it holds none",
        *(f"layer 4 expert {expert} (gate 4 bit): no" for expert in range(3)),
    ]  # fmt: skip
    assert told_once(said) == [
        "step 1, cache: policy lru", "layers 0 to 1, 3: it holds none", "layer 2: other",
        "3 experts of layer 4 (gate 4 bit): no",
    ]  # fmt: skip
    assert told_once([]) == [] and ranges([1, 2, 3, 7]) == "1 to 3, 7"
