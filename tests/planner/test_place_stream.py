"""Placements made and scored part by part are those of the whole text, to the last digit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from cache_settings import random_routes, written_run

import store
from app.frames.placement import placed, scores
from moescope import memory
from moescope.errors import PlanError
from planner.place import stream
from planner.place.methods import pass_loads
from planner.place.pairs import coactivations, transitions
from planner.place.passes import passes
from planner.place.rebalance import eplb
from planner.place.score import score
from planner.place.slots import Placement, contiguous
from planner.place.stream import Stream, chance, uniform
from planner.place.windows import split
from planner.placing import place
from planner.simulate.reading import Reading
from planner.simulate.workload import Workload, workload_of
from tests.planner.sent import Sent

DOMAINS = ["code", "prose", "code", "math", "code", "prose", "math", "code", "code", "prose", "code"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> store.Run:
    folder: Path = tmp_path_factory.mktemp("parts")
    ids = random_routes(3, layers=3, experts=8, k=2, requests=len(DOMAINS), length=12)
    for request in range(len(DOMAINS)):
        ids[:, request, 5 + request % 7 :] = -1  # lengths differ
    ids[1, 4] = 0
    ids[1, 4, :, 1] = -1
    return written_run(folder, ids, domains=DOMAINS, experts=8)


@pytest.fixture(params=["here", "on workers"])
def parts(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, run: store.Run
) -> Iterator[tuple[Stream, Workload]]:
    monkeypatch.setattr(stream, "PART_BYTES", 1)  # a batch at a time
    sent = Sent()
    cluster = cast(Any, sent) if request.param == "on workers" else None
    yield Stream(Reading.of(run).with_passes(), 8, cluster=cluster), workload_of(run)
    if request.node.originalname != "test_a_batch_beyond_the_memory_limit_is_refused":
        assert (sent.pieces > 0) == (cluster is not None)


def of_experts() -> list[Placement]:
    load = np.random.default_rng(0).integers(1, 50, (3, 8))
    slots = eplb(load=load, num_replicas=12, num_groups=1, num_nodes=1, num_gpus=4).physical_to_logical
    return [contiguous(num_layers=3, num_experts=8, devices=4, nodes=2), Placement(slots, 8, 4, 2)]


@pytest.mark.parametrize(
    "asked",
    [{"batch": 1}, {"batch": 3}, {"batch": 4, "dispatch": "fair", "by": "passes"}, {"chunk": 4}, {"batch": 100}],
)
def test_sums_of_parts_are_those_of_the_whole(parts: tuple[Stream, Workload], asked: dict) -> None:
    by_part, whole = parts
    assert len(list(by_part.parts(multiple=asked.get("batch", 1)))) == -(-11 // asked.get("batch", 1))
    for placement in of_experts():
        found, expected = score(by_part, placement, **asked), score(whole, placement, **asked)
        for name, value in vars(expected).items():
            np.testing.assert_array_equal(getattr(found, name), value, err_msg=name)
        asked = {name: value for name, value in asked.items() if name != "by"}
        some, every = passes(by_part, placement, **asked), passes(whole, placement, **asked)
        for name, value in vars(every).items():
            np.testing.assert_array_equal(getattr(some, name), value, err_msg=name)


def test_counts_pairs_and_controls_of_parts(parts: tuple[Stream, Workload]) -> None:
    by_part, whole = parts
    np.testing.assert_array_equal(by_part.counts(), whole.counts())
    np.testing.assert_array_equal(transitions(by_part), transitions(whole))
    np.testing.assert_array_equal(coactivations(by_part), coactivations(whole))
    np.testing.assert_array_equal(pass_loads(by_part, batch=2), pass_loads(whole, batch=2))
    assert (by_part.num_passes, by_part.num_requests) == (whole.num_passes, whole.num_requests)
    drawn = chance(by_part, seed=4)
    assert isinstance(drawn, Stream)
    ids = np.concatenate([part.work.ids for part in drawn.parts()], axis=1)
    np.testing.assert_array_equal(ids, uniform(whole, seed=4).ids)
    for mine, theirs in zip(by_part.split(0.5), split(whole, 0.5), strict=True):
        np.testing.assert_array_equal(mine.counts(), theirs.counts())
        np.testing.assert_array_equal(mine.of_domain("code").counts(), theirs.of_domain("code").counts())


def test_plans_do_not_depend_on_the_parts(run: store.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [place(run, method=name, devices=4, batch=2).text() for name in ("eplb", "affinity")]
    monkeypatch.setattr(stream, "PART_BYTES", 1)
    assert [place(run, method=name, devices=4, batch=2).text() for name in ("eplb", "affinity")] == whole


def test_placements_and_verdicts_made_on_workers_are_those_of_one_process(run: store.Run) -> None:
    asked: dict[str, Any] = {"method": "affinity", "devices": 4, "batch": 2}
    alone, shared = placed(run, **asked), placed(run, **asked, cluster=cast(Any, Sent()))
    assert shared.plan.text() == alone.plan.text()
    assert shared.verdict is not None and alone.verdict is not None
    assert shared.verdict.sentence == alone.verdict.sentence
    for name, score_alone in scores(alone).items():
        for field, value in vars(score_alone).items():
            np.testing.assert_array_equal(getattr(scores(shared)[name], field), value, err_msg=f"{name}.{field}")
    for name, by_pass in alone.passes.items():
        np.testing.assert_array_equal(shared.passes[name].largest, by_pass.largest)


def test_what_takes_long_is_told(run: store.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {"devices": 4, "batch": 2}
    told: list[str] = []
    placed(run, **asked, tell=told.append)
    assert told == []  # all of it is read at once
    monkeypatch.setattr(stream, "PART_BYTES", 1)
    placed(run, **asked, tell=told.append)
    assert told[:3] == [f"reading the first text, part {number} of 6" for number in (1, 2, 3)]
    assert "reading the later text, part 3 of 3" in told
    told.clear()
    placed(run, **asked, tell=told.append, cluster=cast(Any, Sent()))
    assert "reading the later text, part 3 of 3" in told


def test_more_parts_than_one_goes_to_each_worker(run: store.Run) -> None:
    text = Stream(Reading.of(run).with_passes(), 8, cluster=cast(Any, Sent()))
    jobs = text.jobs(np.sum, multiple=1)
    assert Sent.workers < len(jobs) <= 2 * stream.PER_WORKER * Sent.workers
    assert np.concatenate([job.numbers for job in jobs]).tolist() == text.reading.numbers.tolist()


def test_a_batch_beyond_the_memory_limit_is_refused(parts: tuple[Stream, Workload]) -> None:
    with (
        memory.limited(None),
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(PlanError, match="64 requests that run together hold .*--batch"),
    ):
        patch.setattr(memory, "share", lambda part, default: 100)
        list(parts[0].parts(multiple=64))
