"""A run read layer by layer and part by part is the run read at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cache_settings import random_routes, written_run

import store
from moescope.errors import PlanError
from planner.simulate.reading import Reading
from planner.simulate.workload import Workload, decode, workload_of

DOMAINS = ["code", "prose", "code", "math", "code", "prose", "math"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> store.Run:
    folder: Path = tmp_path_factory.mktemp("reading")
    ids = random_routes(3, layers=3, experts=6, k=2, requests=len(DOMAINS), length=9)
    ids[:, 1, 5:] = -1  # shorter than the others
    ids[0, 2, 4] = ids[1:, 3, 2] = -1  # one layer alone does without experts, or with
    ids[1, :, :, 1] = -1
    return written_run(folder, ids, domains=DOMAINS, experts=[8, 6, 8], top_k=[2, 1, 2], prompt=4)


def at_once(run: store.Run, order: list[int], phase: str) -> Workload:
    """As the whole trace gives it, padded."""
    trace = run.selections(sequences=order)
    at = [trace.sequences.tolist().index(number) for number in order]
    ids, prompts = trace.ids[:, at], dict(run.table("sequence").select("sequence", "prompt_tokens").iter_rows())
    if phase != "any":
        after = np.arange(ids.shape[2])[None] >= np.array([prompts[number] or 0 for number in order])[:, None]
        ids = np.where((after if phase == "decode" else ~after)[None, :, :, None], ids, np.int16(-1))
    return decode(
        selections=ids, weights=trace.weights[:, at], num_experts=max(one.num_experts for one in run.layers),
        domains=[trace.domains[one] for one in at], sequences=trace.sequences[at], layers=trace.layers,
        top_k=[one.top_k for one in run.layers],
    )  # fmt: skip


def same(found: Workload, expected: Workload) -> None:
    for name, value in vars(expected).items():
        np.testing.assert_array_equal(getattr(found, name), value, err_msg=name)


@pytest.mark.parametrize("phase", ["any", "prompt", "decode"])
def test_a_workload_is_the_trace_read_at_once(run: store.Run, phase: str) -> None:
    reading = Reading.of(run, phase=phase)
    expected = at_once(run, reading.numbers.tolist(), phase)
    same(workload_of(run, phase=phase), expected)
    for place in range(len(run.layers)):
        one = reading.workload([place], weights=False)
        np.testing.assert_array_equal(one.ids[0], expected.ids[place])
        np.testing.assert_array_equal(one.offsets, expected.offsets)
        assert one.weights is None and one.domains == expected.domains


def test_domains_take_turns(run: store.Run) -> None:
    """By place in their domain, those of one place in the order of the domains."""
    expected = []
    for order, name in enumerate(run.domains):
        mine = [number for number, domain in enumerate(DOMAINS) if domain == name]
        expected += [((place + 0.5) / len(mine), order, number) for place, number in enumerate(mine)]
    assert Reading.of(run).numbers.tolist() == [number for *_, number in sorted(expected)]


def test_parts_put_together_are_the_whole(run: store.Run) -> None:
    reading, whole = Reading.of(run), workload_of(run)
    for tokens, multiple in ((1, 1), (20, 2), (10**9, 3)):
        parts = list(reading.parts(tokens, multiple=multiple))
        assert [first for first, _ in parts] == np.cumsum([0, *(part.num_requests for _, part in parts)])[:-1].tolist()
        assert all(part.num_requests % multiple == 0 for _, part in parts[:-1])
        works = [part.workload() for _, part in parts]
        np.testing.assert_array_equal(np.concatenate([one.ids for one in works], axis=1), whole.ids)
        assert sum((one.domains for one in works), ()) == whole.domains


def test_nothing_left_is_refused(run: store.Run) -> None:
    with pytest.raises(PlanError, match="no token that uses an expert"):
        Reading.of(run).some([]).workload()
