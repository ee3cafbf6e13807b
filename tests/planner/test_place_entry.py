"""The entry: every method on the bundled run, the same bytes again, counts alone, the verdict, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import store
from compressor.plan import PlaceStep, Plan
from moescope.errors import PlanError
from planner.place.lpt import lpt
from planner.place.methods import METHODS
from planner.place.score import score
from planner.place.slots import contiguous
from planner.place.stream import uniform
from planner.place.verdict import saved, sentence, verdict
from planner.placing import place, placement_of, text_of
from planner.simulate.workload import decode
from planner.source import source_of
from tests.planner.collected import sample

ASKED: dict[str, dict[str, Any]] = {
    "eplb": {"redundant": 4},
    "lpt": {"redundant": 4},
    "moetuner": {"solver_experts": 0},
    "hecate": {"attention": 2e-5, "bandwidth": 10e9, "free_slots": 4},
}


@pytest.fixture(scope="module")
def run() -> Iterator[store.Run]:
    with sample() as opened:
        yield opened


@pytest.mark.parametrize("method", [one.name for one in METHODS])
def test_every_method_makes_a_plan_and_the_same_again(run: store.Run, method: str) -> None:
    asked = ASKED.get(method, {})
    plan = place(run, method=method, devices=4, **asked)
    assert Plan.parse(plan.text()) == plan and place(run, method=method, devices=4, **asked).text() == plan.text()
    step = plan.steps[0]
    assert isinstance(step, PlaceStep) and step.method == method and plan.target.devices == 4
    # 2e-5 s at 10 GB/s carry 200 kB: two experts of 98,304 bytes for each of the 4 devices
    assert step.slots == 16 + {"eplb": 4, "lpt": 4, "hecate": 8}.get(method, 0)
    assert plan.estimate.bytes_saved == 0 and plan.estimate.expert_parameters_after == plan.estimate.expert_parameters
    fit, later = (
        text_of(run, plan.source, domains=run.domains).fit,
        text_of(run, plan.source, domains=run.domains).later,
    )
    assert fit is not None and later is not None
    assert [list(one.values) for one in plan.evidence[0].layers] == fit.counts().tolist()
    expected = score(later, placement_of(plan)).mean_balancedness
    assert plan.estimate.balancedness == pytest.approx(expected, rel=1e-5)


def test_counts_alone_are_placed_and_what_is_not_known_is_said(run: store.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = text_of(run, source_of(run), domains=run.domains)
    assert whole.fit is not None and whole.later is not None
    with sample() as counts:
        monkeypatch.setitem(counts.__dict__, "has_trace", False)
        plan = place(counts, devices=4, redundant=4)
        np.testing.assert_array_equal(
            np.array([one.values for one in plan.evidence[0].layers]), whole.fit.counts() + whole.later.counts()
        )
        assert plan.estimate.balancedness is None
        assert "on later text, per forward pass, across devices and by affinity it is not known" in " ".join(
            plan.evidence[0].notes
        )
        for method in ("moetuner", "affinity"):
            with pytest.raises(PlanError, match="needs a trace and the run holds counts: use eplb or lpt"):
                place(counts, method=method, devices=4)
        with pytest.raises(PlanError, match="holds counts and no trace: what a placement is worth"):
            verdict(counts, plan)


def test_domains_limit_the_text(run: store.Run) -> None:
    plan = place(run, devices=4, domains=["python"])
    assert plan.provenance.domains == ("python",)
    every = sum(sum(one.values) for one in place(run, devices=4).evidence[0].layers)  # type: ignore[arg-type]
    mine = sum(sum(one.values) for one in plan.evidence[0].layers)  # type: ignore[arg-type]
    assert 0 < mine < every / 2


def test_the_verdict_on_the_sample_is_no(run: store.Run) -> None:
    found = verdict(run, place(run, devices=4, redundant=4))
    assert found.sentence.startswith("No: expert parallelism is balanced enough as experts lie")
    assert abs(found.gain) < 0.05 and set(found.domains) == set(run.domains)
    assert found.domains[found.worst_domain].pass_balancedness <= found.after.pass_balancedness
    assert found.bytes_changed == found.changed_slots * found.expert_bytes > found.bytes_copied > 0
    # three quarters of uniformly drawn experts of 4 devices are remote; replicas at home make it less
    assert found.before.remote_share == pytest.approx(0.75, abs=0.02) and found.after.remote_share < 0.72
    same = verdict(run, place(run, devices=4, method="contiguous"))
    assert same.gain == 0 and same.changed_slots == 0 and "as much to do" in same.sentence


def test_a_skewed_model_gets_a_yes_and_replicas_are_judged_for_themselves() -> None:
    rng = np.random.default_rng(0)
    popular = np.sort(rng.normal(size=16))[::-1] * 2  # the busiest experts lie side by side
    ids = np.argsort(-(popular + rng.gumbel(size=(1, 64, 20, 16))), axis=-1)[..., :2].astype(np.int16)
    work = decode(selections=ids, num_experts=16)
    before = score(work, contiguous(num_layers=1, num_experts=16, devices=4))
    packed = score(work, lpt(load=work.counts(), devices=4))
    more = score(work, lpt(load=work.counts(), devices=4, redundant=8))
    chance = before
    assert saved(before, packed) > 0.3
    assert sentence(before, packed, packed, chance, 0).startswith("Yes: per pass")
    assert sentence(before, packed, packed, chance, 8).startswith("Yes, but without replicas")
    # a placement that does not help while LPT does, and text on which nothing helps, are no "balanced enough"
    assert "With 1 redundant slot per layer the busiest device has as much to do" in sentence(
        before, packed, packed, chance, 1
    )
    assert "% more to do than with these" in sentence(before, before, packed, chance, 8)  # replicas that cost
    assert sentence(before, before, packed, chance, 0).startswith("Not this placement: per pass")
    even = score(uniform(work), contiguous(num_layers=1, num_experts=16, devices=4))
    assert sentence(before, before, before, even, 0).startswith("No: later text loads other experts")
    assert sentence(even, even, even, even, 0).startswith("No: expert parallelism is balanced enough")
    assert saved(packed, more) > 0.05 and "by 8 redundant slots" in sentence(before, more, packed, chance, 8)


def test_experts_that_only_replicas_make_divisible(run: store.Run) -> None:
    plan = place(run, devices=5, redundant=4)
    found = verdict(run, plan, max_tokens=20_000)
    assert found.before.load.shape[-1] == 5 and "redundant" not in found.sentence
    assert found.before.pass_pairs.sum() == found.after.pass_pairs.sum()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"devices": 17}, "17 devices are more than the 16 slots of a layer: use at most 16 devices, or add 1"),
        ({"devices": 5}, "16 slots cannot be divided among 5 devices: 20 slots would do"),
        ({"devices": 4, "redundant": 3}, "19 slots cannot be divided among 4 devices: 16 or 20 slots would do"),
        ({"devices": 4, "redundant": -4}, "-4 redundant experts cannot be"),
        ({"devices": 4, "nodes": 3}, "4 devices cannot be divided among 3 nodes: 2 or 4 nodes would do"),
        ({"devices": 4, "groups": 3}, "16 experts cannot be divided into 3 groups: 2 or 4 groups would do"),
        ({"devices": 0}, "0 devices cannot be: give at least 1"),
        ({"devices": 4, "method": "epbl"}, "there is no placement 'epbl': did you mean 'eplb'"),
        ({"devices": 4, "slack": 1}, "placement 'eplb' has no option 'slack': it takes none"),
        ({"devices": 4, "method": "affinity", "slak": 1}, "no option 'slak': did you mean 'slack'"),
        ({"devices": 4, "method": "moetuner", "redundant": 4}, "gives each expert one slot: leave redundant out"),
        ({"devices": 4, "train_part": 1.5}, "part 1.5 is outside"),
        ({"devices": 4, "domains": ["pyton"]}, "has no domain 'pyton': did you mean 'python'"),
    ],
)
def test_what_cannot_be_is_refused(run: store.Run, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        place(run, **asked)
