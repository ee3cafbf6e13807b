"""What ways to serve share: budgets by hand, requests for fitting and for judging, and what is refused."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_settings import EXPERT, random_routes, setting_for, slow_machine, written_run
from workloads import drawn_workload, of_selections, sets_of

import planner
import store
from moescope.errors import PlanError
from planner.budget import memory_of
from planner.cache.setting import Setting, notes_of, setting_of
from planner.cache.ways import serve, way_of
from planner.estimate.memory import ExpertSizes, MemoryBudget, expert_sizes
from planner.machines import machine
from planner.simulate.controls import SHUFFLED_OVER_ALL, SHUFFLED_WITHIN, UNIFORM
from planner.simulate.workload import Workload, batched, workload_of

MIB = 2**20
SAMPLE = Path(__file__).parents[2] / "sample_data" / "runs" / "sample.duckdb"
FEW = 40_000
"""Layer-steps: enough to see, few enough to be quick."""


@pytest.fixture(scope="module")
def run() -> store.Run:
    return store.open_run(SAMPLE)


def made(folder: Path, *, layers: int = 3, requests: int = 6, **options: Any) -> store.Run:
    ids = random_routes(0, layers=layers, experts=options.get("experts", 16), k=2, requests=requests, length=8)
    return written_run(folder, ids, **options)


# --- budgets ---


def test_the_budget_by_hand(run: store.Run) -> None:
    found = setting_of(run, machine("rtx3060", vram=9 * MIB), context=512, batch=1, steps=FEW)
    hidden, inner, vocabulary, layers, experts = 128, 128, 4096, 6, 16
    expert = 3 * hidden * inner * 2
    assert found.slot_bytes == expert
    assert found.budget.kv == layers * 2 * hidden * 2 * 512  # as many key and value heads as heads
    attention = 4 * hidden * hidden
    layer = attention + experts * hidden + 2 * hidden
    assert found.budget.other == pytest.approx(2 * (2 * vocabulary * hidden + layers * layer), rel=1e-3)
    assert found.budget.left == 9 * MIB - found.budget.other - found.budget.kv - found.budget.activations
    assert found.slots == int(found.budget.left // expert) == 50
    assert found.all_slots == layers * experts
    assert found.least_slots == layers * 2
    two = setting_of(run, machine("rtx3060", vram=20 * MIB), context=256, batch=4, steps=FEW)
    assert two.budget.kv == 2 * found.budget.kv
    known = setting_of(run, machine("rtx3060", vram=9 * MIB), context=512, other_weights=MIB, steps=FEW)
    assert known.budget.left - found.budget.left == found.budget.other - MIB
    assert not known.budget.estimated


def test_everything_that_fits_is_held() -> None:
    """Experts of 3 and of 1 MB: as slots of the largest, 8 MB hold two; as they are, all four."""
    work = drawn_workload(0, layers=1, experts=4)
    setting = setting_for(work, work, size=[[3e6, 1e6, 1e6, 3e6]])
    for left, slots in ((8_000_000, 4), (7_999_999, 2), (3_000_000, 1)):
        assert replace(setting, budget=MemoryBudget(left, 0.0, 0.0, 0.0, False)).slots == slots


def test_notes_are_sentences(run: store.Run) -> None:
    for name in ("rtx3060", "cpu-desktop", "m4-max"):
        notes = notes_of(setting_of(run, machine(name), context=512, steps=FEW))
        assert notes and all(re.fullmatch(r"[A-Z][^\n]*[^.]\.", note) for note in notes), notes


def test_a_run_whose_configuration_says_nothing_needs_the_other_weights(tmp_path: Path) -> None:
    run = made(tmp_path, config={})
    with pytest.raises(PlanError, match="num_attention_heads"):
        setting_of(run, slow_machine())
    found = setting_of(run, slow_machine(vram=10 * EXPERT + 5), other_weights=5)
    assert (found.budget.left, found.slots) == (10 * EXPERT, 10)
    assert "Keys, values and activations are not known" in " ".join(notes_of(found))
    assert found.test_costs.dense.sum() == 0


def test_shared_experts_stay_on_the_device(tmp_path: Path) -> None:
    plain, shared = (made(tmp_path, name=f"shared{count}", shared=count) for count in (0, 2))
    without, found = (setting_of(one, slow_machine(vram=MIB), context=64) for one in (plain, shared))
    assert found.budget.other - without.budget.other == 3 * 2 * EXPERT  # two in each of three layers
    assert found.all_slots == without.all_slots == 48
    more = found.test_costs.dense - without.test_costs.dense
    np.testing.assert_allclose(more, 2 * EXPERT / 1e12, rtol=1e-6)


# --- widths ---


def test_other_widths(run: store.Run) -> None:
    found = setting_of(run, machine("rtx3060", vram=9 * MIB), context=512, steps=FEW)
    half = found.with_sizes(ExpertSizes(found.sizes.layers, found.sizes.bytes / 2, found.sizes.parameters))
    assert half.slot_bytes == found.slot_bytes / 2
    assert half.slots == min(2 * int(found.budget.left / found.slot_bytes * 2) // 2, half.all_slots) == 96
    assert half.budget == found.budget
    overhead = found.machine.device.overhead
    np.testing.assert_allclose(half.test_costs.expert - overhead, (found.test_costs.expert - overhead) / 2, rtol=1e-9)
    np.testing.assert_array_equal(half.test_costs.dense, found.test_costs.dense)


def test_the_widths_of_a_plan_are_what_experts_take(run: store.Run) -> None:
    plan = planner.make(run, preset="uniform_bits", bits=4.5, form="packed")
    found = setting_of(run, machine("rtx3060", vram=9 * MIB), context=512, plan=plan, steps=FEW)
    assert found.sizes.total == pytest.approx(expert_sizes(plan, source_bits=16).total)
    assert 0.2 < found.slot_bytes / (3 * 128 * 128 * 2) < 0.35


# --- requests ---


def test_requests_for_judging_are_others_and_of_every_domain(run: store.Run) -> None:
    found = setting_of(run, machine("rtx3060"), context=512, steps=FEW)
    train, test = found.train, found.test
    assert not set(train.sequences.tolist()) & set(test.sequences.tolist())
    fitted, judged = Counter(train.domains), Counter(test.domains)
    assert set(fitted) == set(judged) == set(run.domains)
    assert all(0 <= fitted[name] - judged[name] <= 1 for name in run.domains)
    one = setting_of(run, machine("rtx3060"), context=512, domains=["c"], steps=FEW)
    assert set(one.train.domains) == set(one.test.domains) == {"c"}


def test_phases_are_told_apart(tmp_path: Path) -> None:
    run = made(tmp_path, prompt=3)
    passes = {
        phase: setting_of(run, slow_machine(), phase=phase).test.num_passes for phase in ("any", "prompt", "decode")
    }
    assert passes == {"any": 24, "prompt": 9, "decode": 15}
    with pytest.raises(PlanError, match="no token"):
        setting_of(made(tmp_path, name="prompts"), slow_machine(), phase="decode")


@pytest.mark.parametrize(
    ("domains", "train", "test"),
    [("abcdef", "abc", "def"), ("aabcbd", "abc", "abd"), ("aaabbc", "aabc", "ab"), ("aaaaaa", "aaa", "aaa")],
)
def test_domains_of_one_request_are_halved_together(tmp_path: Path, domains: str, train: str, test: str) -> None:
    found = setting_of(made(tmp_path, domains=list(domains)), slow_machine())
    assert ("".join(sorted(found.train.domains)), "".join(sorted(found.test.domains))) == (train, test)
    assert not set(found.train.sequences.tolist()) & set(found.test.sequences.tolist())


def test_batches_need_the_union_of_their_tokens(run: store.Run) -> None:
    one = setting_of(run, machine("rtx3060"), context=512, steps=FEW)
    four = setting_of(run, machine("rtx3060"), context=512, batch=4, steps=FEW)
    assert four.apart is not None
    assert four.test.num_requests == -(-one.test.num_requests // 4)
    assert four.test.pass_tokens.sum() == one.test.num_passes
    for at in (0, 10, 40):  # of the first batch
        members = [one.test.offsets[request] + at for request in range(4)]
        for layer in range(6):
            wanted = set[int]().union(*(sets_of(one.test.ids[layer, member]) for member in members))
            assert sets_of(four.test.ids[layer, at]) == wanted
    assert four.least_slots == one.least_slots == 12  # what one token needs: more may pass through


# --- experts without weights, layers of different sizes ---


def test_experts_without_weights_take_no_room_and_no_time(tmp_path: Path) -> None:
    """The last four of eight experts of each layer hold nothing: what is left is a model of four."""
    ids = random_routes(1, layers=2, experts=8, k=3, requests=6, length=20)
    empty = [(layer, expert) for layer in range(2) for expert in range(4, 8)]
    found = setting_of(written_run(tmp_path, ids, experts=8, empty=empty), slow_machine())
    plain = setting_of(
        written_run(tmp_path, np.where(ids < 4, ids, -1), name="four", experts=4, top_k=[3, 3]), slow_machine()
    )
    assert found.all_slots == 8
    assert found.test.num_experts == 4
    ways = [way_of(name) for name in ("lru", "lru_split", "static_cpu", "half_pinned", "layers_load", "lru_shared")]
    for way in ways:
        one, other = (serve(setting, way, slots=6) for setting in (found, plain))
        assert one.outcome.hits.sum() == other.outcome.hits.sum()
        # Passes in which no token of the four was chosen count as tokens of the model all the same.
        assert one.clock.total == pytest.approx(other.clock.total, rel=1e-9)
    assert found.test.num_passes >= plain.test.num_passes


def test_random_experts_are_among_those_that_a_layer_has(tmp_path: Path) -> None:
    ids = np.concatenate([random_routes(1, layers=1, experts=count, k=2, requests=8, length=50) for count in (16, 4)])
    found = setting_of(written_run(tmp_path, ids, experts=[16, 4]), slow_machine())
    assert found.all_slots == 20
    drawn = found.controls(seed=0)[UNIFORM]
    for work in (drawn.train, drawn.test):
        counts = work.counts()
        assert (counts[0] > 0).all()
        assert (counts[1, :4] > 0).all()
        assert (counts[1, 4:] == 0).all()
        assert (work.needed == 2).all()
        assert all(len(set(row.tolist())) == 2 for layer in work.ids for row in layer)
    # Half of the experts of the second layer hit half of the time.
    served = serve(drawn, way_of("static_cpu"), slots=18)
    assert served.outcome.per_layer()[1] == pytest.approx(served.layer_slots[1] / 4, abs=0.08)


# --- controls ---


def _ordered(work: Workload) -> list[tuple[int, ...]]:
    """What every pass needs in the first layer."""
    return [tuple(sorted(sets_of(row))) for row in work.ids[0]]


@pytest.mark.parametrize("batch", [1, 3])
def test_controls_change_one_thing_each(batch: int) -> None:
    train, test = drawn_workload(1, experts=9, requests=6), drawn_workload(2, experts=9, requests=6)
    found = setting_for(train, test, batch=batch).controls(seed=4)
    assert list(found) == [SHUFFLED_WITHIN, SHUFFLED_OVER_ALL, UNIFORM]
    for name, setting in found.items():
        single = setting.test if setting.apart is None else setting.apart[1]
        assert single.num_passes == test.num_passes
        if name != UNIFORM:
            assert Counter(_ordered(single)) == Counter(_ordered(test)) and _ordered(single) != _ordered(test)
        if batch > 1:  # tokens move one by one, and only then run together
            np.testing.assert_array_equal(setting.test.ids, batched(single, size=batch).ids)
            assert setting.test_costs.expert.shape == setting.test.needed.shape
    for request in range(6):
        within = found[SHUFFLED_WITHIN]
        single = within.test if within.apart is None else within.apart[1]
        part = slice(int(test.offsets[request]), int(test.offsets[request + 1]))
        assert Counter(_ordered(single)[part]) == Counter(_ordered(test)[part])


def test_shuffled_batches_are_torn_apart() -> None:
    """Four copies of one sequence: together they need what one needs, shuffled they do not."""
    one = random_routes(3, layers=2, experts=12, k=2, requests=1, length=40)
    work = of_selections(np.repeat(one, 4, axis=1), 12)
    setting = setting_for(work, work, batch=4)
    assert (setting.test.needed == 2).all()
    shuffled = setting.controls(seed=0)
    assert shuffled[SHUFFLED_WITHIN].test.needed.mean() > 4
    assert shuffled[UNIFORM].test.needed.mean() == pytest.approx(12 * (1 - (5 / 6) ** 4), rel=0.05)


# --- refusals ---


def test_runs_that_cannot_be_replayed(tmp_path: Path) -> None:
    counts = made(tmp_path, name="counts", trace=False)
    with pytest.raises(PlanError, match="holds counts and no trace"):
        setting_of(counts, slow_machine())
    live = made(tmp_path, name="growing", finish=False)
    with pytest.raises(PlanError, match="still being collected"):
        setting_of(live, slow_machine())
    typeless = made(tmp_path, name="typeless", dtype="")
    with pytest.raises(PlanError, match="does not know the type .* import it with --config"):
        setting_of(typeless, slow_machine())
    single = made(tmp_path, name="single", requests=1)
    with pytest.raises(PlanError, match="'single' has one request alone"):
        setting_of(single, slow_machine())


def test_domains_that_are_not_there(run: store.Run) -> None:
    with pytest.raises(PlanError, match="no domain 'poems'; it has .*japanese"):
        setting_of(run, machine("rtx3060"), domains=["poems"])


@pytest.mark.parametrize(("options", "what"), [({"batch": 0}, "batch 0"), ({"context": 0}, "context 0")])
def test_numbers_that_are_none(run: store.Run, options: dict[str, int], what: str) -> None:
    with pytest.raises(PlanError, match=what):
        setting_of(run, machine("rtx3060"), **options)  # type: ignore[arg-type]


def test_plans_after_which_tokens_choose_others(run: store.Run, tmp_path: Path) -> None:
    for preset in ("frequency", "hc_smoe"):
        plan = planner.make(run, preset=preset, share=0.25)
        cut = plan.steps[0].step
        with pytest.raises(PlanError, match=f"the plan has a {cut} step, .*record the result"):
            setting_of(run, machine("rtx3060"), plan=plan)
    plan = planner.make(run, preset="uniform_bits", bits=4.5, form="packed")
    with pytest.raises(PlanError, match="of other layers or experts"):
        setting_of(made(tmp_path), slow_machine(), plan=plan)


def _enough(error: PlanError) -> int:
    found = re.search(r"give ([\d.,]+ [KMG]?i?B) or more", str(error))
    assert found, error
    return memory_of(found[1].replace(",", ""))


@pytest.mark.parametrize("vram", [1000, MIB, 3 * MIB, 4 * MIB + 400 * 1024])
def test_a_device_too_small_is_told_what_would_do(run: store.Run, vram: int) -> None:
    with pytest.raises(PlanError, match="too small") as refused:
        setting_of(run, machine("rtx3060", vram=vram), context=512, steps=FEW)
    assert "\n" not in str(refused.value)
    found = setting_of(run, machine("rtx3060", vram=_enough(refused.value)), context=512, steps=FEW)
    # Enough for caches in every layer, and no more than need be.
    assert found.least_slots <= found.slots <= found.least_slots + 1


@pytest.mark.parametrize(("other", "layers"), [(1_234_567, 1), (98_765, 1), (7, 4), (12_345_678_901, 1)])
def test_what_would_do_is_not_rounded_down(tmp_path: Path, other: int, layers: int) -> None:
    run = made(tmp_path, layers=layers, config={})
    with pytest.raises(PlanError) as refused:
        setting_of(run, slow_machine(vram=other + EXPERT), other_weights=other)
    assert setting_of(run, slow_machine(vram=_enough(refused.value)), other_weights=other).slots >= 2 * layers
    # One byte less than two experts is refused, two are not.
    with pytest.raises(PlanError, match="one token needs 2 experts"):
        setting_of(run, slow_machine(vram=other + 2 * EXPERT - 1), other_weights=other)
    assert setting_of(run, slow_machine(vram=other + 2 * EXPERT), other_weights=other).slots == 2


def test_a_device_that_may_be_too_small_still_holds_one_byte(run: store.Run) -> None:
    """Experts may become narrower; other weights do not."""
    with pytest.raises(PlanError, match="too small"):
        setting_of(run, machine("rtx3060", vram=3 * MIB), context=512, narrow=True, steps=FEW)
    found: Setting = setting_of(run, machine("rtx3060", vram=4_600_000), context=512, narrow=True, steps=FEW)
    assert 0 < found.budget.left < 2 * found.slot_bytes


def test_steps_bound_what_is_replayed(run: store.Run) -> None:
    whole = workload_of(run).num_passes
    few = setting_of(run, machine("rtx3060"), context=512, steps=FEW)
    assert 0.8 * FEW <= few.test.num_passes * 6 <= 1.2 * FEW < 0.3 * 6 * whole
