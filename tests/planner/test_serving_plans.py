"""How to run a model on a machine: offers against direct replays, brute force, prices of their own, and budgets."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import store
from compressor.exporters import EXPORTERS
from compressor.plan import CacheStep, Plan, QuantizeStep, Source, Target
from moescope.errors import PlanError
from planner.cache import trials
from planner.cache.chosen import chosen_plan
from planner.cache.offer import Offer, plan_of
from planner.cache.setting import Setting, setting_of
from planner.cache.ways import RESIDENT, WAYS, Served, serve
from planner.candidates import Request
from planner.estimate.memory import expert_sizes
from planner.estimate.prediction import predict
from planner.estimate.storage import expert_bytes
from planner.machine import Machine
from planner.machines import as_json, machine
from planner.serving import HARDLY, MOVING, PREFETCHES, SLOWER, Serving, serving
from planner.task import Task
from tests.planner.collected import collected, sample
from tests.profiler.capture.tiny import build

MIB = 2**20
EXPERT = 3 * 128 * 128 * 2
"""Bytes of an expert of the sample."""

CONTEXT = 512
STEPS = 20_000
ROOM = 5.5
"""MiB of a device that holds 13 experts as they are, and not all in any width."""

CACHES = [one.name for one in EXPORTERS if one.step == "cache" and one.name != "ktransformers"]  # which refuses olmoe
WORDS = {way.title: way for way in (*WAYS, RESIDENT)}


def ask(run: store.Run, *, vram: float, name: str = "rtx3060", ram: float = 1024, **more: Any) -> Serving:
    """Sizes in MiB."""
    disk = {"disk": more.pop("disk")} if "disk" in more else {}
    on = machine(name, vram=int(vram * MIB), ram=int(ram * MIB), **disk)
    return serving(run, on, **{"context": CONTEXT, "steps": STEPS, **more})


@pytest.fixture(scope="module", autouse=True)
def few_widths() -> Iterator[None]:
    """Half of the time: widths of each kind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trials, "PAIRS", ((8, 8), (8, 4), (4, 4), (4, 2), (3, 3)))
        patch.setattr(trials, "MIXED", (4.0,))
        yield


@pytest.fixture(scope="module")
def run() -> Iterator[store.Run]:
    with sample() as opened:
        yield opened


@pytest.fixture(scope="module")
def task(run: store.Run) -> Task:
    return replace(Request(run=run, memory=0, guard=True).task(), form="packed", bits=16.0)


@pytest.fixture(scope="module")
def setting(run: store.Run) -> Setting:
    return setting_of(run, machine("rtx3060", vram=int(ROOM * MIB)), context=CONTEXT, steps=STEPS, narrow=True)


@pytest.fixture(scope="module")
def roomy(run: store.Run) -> Serving:
    """A device that holds some experts, and host memory that holds them all."""
    return ask(run, vram=ROOM)


@pytest.fixture(scope="module")
def tight(run: store.Run) -> Serving:
    """Neither the device nor host memory holds the experts: some lie on disk."""
    return ask(run, vram=ROOM, ram=3)


@pytest.fixture(params=["roomy", "tight"])
def found(request: pytest.FixtureRequest) -> Serving:
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


def cache_of(offer: Offer) -> CacheStep:
    (step,) = (one for one in offer.plan.steps if isinstance(one, CacheStep))
    return step


def widths_in(offer: Offer) -> QuantizeStep | None:
    return next((one for one in offer.plan.steps if isinstance(one, QuantizeStep)), None)


def without_cache(offer: Offer, task: Task) -> Plan | Source:
    """The plan of its widths alone; the model as it is, if it has none."""
    step = widths_in(offer)
    if step is None:
        return task.source
    return plan_of(task, (step,), target=Target(preset="t"), selections={}, notes=())


def flags(offer: Offer, what: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
    result = np.zeros((6, 16), np.bool_)
    for row, layer in enumerate(cache_of(offer).layers):
        result[row, list(getattr(layer, what))] = True
    return result


def served_again(setting: Setting, task: Task, offer: Offer) -> Served:
    """The offer's way, replayed by what its plan says alone."""
    sizes = expert_sizes(without_cache(offer, task), source_bits=16)
    disk = flags(offer, "disk")
    return serve(setting.with_sizes(sizes), WORDS[offer.way], slots=cache_of(offer).slots, disk=disk)


# --- memory ---


def test_no_memory_holds_more_than_it_has(found: Serving, task: Task) -> None:
    assert {cache_of(one).policy for one in found.offers} == {"lru", "static"} and len(found.offers) > 8
    ram = found[0].target.ram
    assert ram in (3 * MIB, 1024 * MIB)
    rest = found.memory["other"] + found.memory["kv"] + found.memory["activations"]
    for offer in found.offers:
        speed = offer.plan.estimate.speed
        assert speed is not None
        assert speed.peak_bytes == pytest.approx(rest + offer.bytes[0], abs=1) and speed.peak_bytes <= ROOM * MIB
        assert offer.bytes[1] <= ram
        sizes = expert_sizes(without_cache(offer, task), source_bits=16).bytes
        step = cache_of(offer)
        pinned, below = flags(offer, "pinned"), flags(offer, "disk")
        moving = step.slots - int(pinned.sum())
        assert offer.bytes[0] == pytest.approx(sizes[pinned].sum() + moving * sizes.max())
        assert offer.bytes[2] == pytest.approx(sizes[below].sum())
        # what is pinned, what lies in host memory and what lies on disk are all experts, and their bytes those stored
        assert int(pinned.sum()) + offer.experts[1] + offer.experts[2] == 96 and offer.experts[0] == step.slots
        stored = expert_bytes(offer.plan, source_bits=16)
        assert sizes[pinned].sum() + offer.bytes[1] + offer.bytes[2] == pytest.approx(stored, abs=1)
        assert (stored == 96 * EXPERT) == (offer.kl == 0.0)


def test_the_cpu_runs_nothing_that_host_memory_does_not_hold(roomy: Serving, tight: Serving) -> None:
    assert any(cache_of(one).misses == "cpu" for one in roomy.offers)
    for offer in tight.offers:
        assert cache_of(offer).misses == "load" or offer.experts[2] == 0
    words = [text for way, text in tight.refused.items() if "as they are" in way and "CPU" in way]
    assert words and all("of host memory, and the CPU runs experts from host memory" in one for one in words)


def test_without_a_disk_nothing_goes_and_the_answer_says_why(run: store.Run) -> None:
    found = ask(run, vram=6, ram=3, disk="none", keep_widths=True)
    assert (found.word, len(found)) == ("leave it", 0)
    assert any("3 MiB of host memory" in one and "no disk" in one for one in found.reasons)
    assert all("9 MiB of experts" in one or "host memory" in one for one in found.refused.values())
    assert found.front == () and Serving.of(json.loads(json.dumps(found.content()))) == found


def test_a_disk_costs_time(run: store.Run) -> None:
    held, below = (ask(run, vram=6, ram=ram, keep_widths=True) for ram in (64, 3))
    by_way = {one.way: one.ms for one in held.offers}
    assert len(below) >= 3
    for offer in below.offers:
        assert offer.experts[2] > 0 and offer.ms > by_way[offer.way]
    assert _tells_domain(below)  # what one domain uses lies on disk more often
    slower = ask(run, vram=6, ram=3, keep_widths=True, disk="sata")
    assert slower.offers[0].ms > below.offers[0].ms


# --- what is offered ---


def test_times_are_those_of_the_same_way_replayed(setting: Setting, found: Serving, task: Task) -> None:
    seen = set()
    for offer in found.offers:
        if offer.way not in WORDS:  # prefetching
            continue
        again = served_again(setting, task, offer)
        assert offer.ms == pytest.approx(again.ms, rel=1e-12)
        assert (offer.low, offer.high) == again.interval(coverage=0.95)
        assert offer.low * (1 - 1e-9) <= offer.ms <= offer.high * (1 + 1e-9)
        assert {row.domain: row.ms for row in offer.domains} == {
            name: ms for name, (_, ms) in again.by_domain().items()
        }
        seen.add(offer.way)
    assert len(seen) >= 4


def test_no_offer_beats_its_bound_or_a_device_that_holds_all(found: Serving) -> None:
    for offer in found.offers:
        speed = offer.plan.estimate.speed
        assert speed is not None
        assert speed.bound_ms <= speed.ms_per_token * (1 + 1e-4) and speed.ms_per_token == pytest.approx(
            offer.ms, rel=1e-3
        )
        assert speed.low <= speed.hit_rate <= speed.high and speed.machine == "rtx3060"


def test_costs_are_those_of_the_widths_alone(found: Serving, task: Task) -> None:
    unchanged = 0
    for offer in found.offers:
        if widths_in(offer) is None:
            assert offer.kl == 0.0
            unchanged += 1
            continue
        alone = without_cache(offer, task)
        assert isinstance(alone, Plan)
        expected = predict(alone, task)
        assert expected is not None and offer.kl == expected.kl > 0
    assert unchanged and unchanged < len(found)


def test_plans_can_be_followed_and_read_back(found: Serving) -> None:
    digests = [one.plan.digest for one in found.offers]
    assert len(set(digests)) == len(digests)
    for offer in found.offers:
        plan = offer.plan.checked()
        assert Plan.parse(plan.text(), "again") == plan
        narrow = widths_in(offer) is not None
        assert plan.target.engine == ("transformers" if narrow else "any")
        assert (plan.target.machine, plan.target.vram) == ("rtx3060", ROOM * MIB)
        assert [one.step for one in plan.steps] == (["quantize", "cache"] if narrow else ["cache"])
        assert plan.evidence[0].score == "selections" and all(sum(row.values) > 0 for row in plan.evidence[0].layers)
        assert Offer.of(json.loads(json.dumps(offer.content()))) == offer


def test_the_evidence_is_how_often_each_expert_was_chosen(run: store.Run, roomy: Serving) -> None:
    rows = run.table("expert_load").filter(kind="routed").select("layer", "expert", "tokens").rows()
    for layer in roomy.offers[0].plan.evidence[0].layers:
        expected = [sum(tokens for place, expert, tokens in rows if (place, expert) == (layer.layer, one))
                    for one in range(16)]  # fmt: skip
        assert list(layer.values) == expected


def test_widths_by_place_follow_what_stays_on_the_device(found: Serving) -> None:
    mixed = [one for one in found.offers if "on the device and" in one.widths]
    assert mixed
    for offer in mixed:
        near, far = (int(word) for word in offer.widths.split() if word.isdigit())
        step, pinned = widths_in(offer), flags(offer, "pinned")
        assert step is not None and near > far and pinned.any() and not pinned.all()
        for layer in step.layers:
            for entry in layer.experts:
                assert entry.up == (near if pinned[layer.layer, entry.expert] else far)


def test_the_same_run_gives_the_same_bytes(run: store.Run, roomy: Serving) -> None:
    again = ask(run, vram=ROOM)
    assert json.dumps(again.content()) == json.dumps(roomy.content())
    assert [one.text() for one in again] == [one.text() for one in roomy]


def test_an_answer_is_a_sequence_that_can_be_kept(found: Serving) -> None:
    assert len(found) == len(found.offers) and list(found) == [one.plan for one in found.offers]
    assert found[0] is found.offers[0].plan and found[:2] == [one.plan for one in found.offers[:2]]
    back = Serving.of(json.loads(json.dumps(found.content())))
    assert back.content() == found.content()
    assert [one.plan for one in back.offers if one in found.offers] == list(back)
    assert {found.offers[at] for at in found.front} <= set(back.offers)
    for broken in ({}, {**found.content(), "offers": [{}]}, {**found.content(), "quality": "much"}):
        with pytest.raises(PlanError, match="by moescope|of moescope"):
            Serving.of(broken)


# --- order ---


def test_the_front_is_what_nothing_beats(found: Serving) -> None:
    known = [(one.ms, one.kl) for one in found.offers if one.kl is not None]
    assert len(known) == len(found)
    expected = {
        at for at, (ms, kl) in enumerate(known)
        if not any(other != (ms, kl) and other[0] <= ms and other[1] <= kl for other in known)
    }  # fmt: skip
    assert {known[at] for at in found.front} == {known[at] for at in expected}
    assert [known[at][0] for at in found.front] == sorted(known[at][0] for at in found.front)


@pytest.mark.parametrize("quality", [1e-6, 0.02, 10.0])
def test_what_is_within_the_quality_comes_first(run: store.Run, quality: float) -> None:
    found = ask(run, vram=ROOM, quality=quality)
    within = [one for one in found.offers if one.kl is not None and one.kl <= quality]
    assert list(found.offers[: len(within)]) == [found.offers[0], *(one for one in found.offers if one in within[1:])]
    fastest = min(one.ms for one in within)
    best = found.offers[0]
    assert best in within and best.ms <= HARDLY * fastest
    assert best.kl == min(one.kl for one in within if one.ms <= HARDLY * fastest)  # type: ignore[type-var]
    assert [one.ms for one in found.offers[1 : len(within)]] == sorted(one.ms for one in found.offers[1 : len(within)])
    beyond = [one.kl for one in found.offers[len(within) :]]
    assert beyond == sorted(beyond) and found.word == "serve"  # type: ignore[type-var]
    if quality < 1e-4:
        assert best.kl == 0.0 and "no weight changes" in " ".join(found.reasons)


def test_more_than_was_allowed_is_said(run: store.Run) -> None:
    """Nothing unchanged fits: neither host memory nor a disk takes the experts."""
    found = ask(run, vram=6, ram=1.5, disk="none", quality=1e-6)
    assert found.word == "with care" and all(one.kl and one.kl > 1e-6 for one in found.offers)
    assert [one.kl for one in found.offers] == sorted(one.kl for one in found.offers)  # type: ignore[type-var]
    assert any("more than the 1e-06 that were allowed" in one for one in found.reasons)


def test_all_that_fits_is_left_as_it_is(run: store.Run) -> None:
    found = ask(run, vram=64)
    assert found.word == "as it is" and "nothing has to be cached" in " ".join(found.reasons)
    best = found.offers[0]
    assert (best.kl, best.widths, best.experts) == (0.0, "as they are", (96, 0, 0))
    assert cache_of(best).slots == 96 and found[0].estimate.bytes_saved == 0
    assert all(one.way == RESIDENT.title for one in found.offers)
    least = min(found.offers, key=lambda one: one.ms)
    assert ("would be faster" in " ".join(found.reasons)) == (least.ms <= 0.9 * best.ms)


def test_faster_narrow_experts_are_told_but_do_not_displace_what_fits(run: store.Run) -> None:
    """A device so slow at reading that narrower experts count."""
    slow = machine("rtx3060", vram=64 * MIB)
    slow = replace(slow, device=replace(slow.device, bandwidth=5e8))
    found = serving(run, slow, context=CONTEXT, steps=STEPS)
    assert found.word == "as it is" and found.offers[0].kl == 0.0
    assert min(one.ms for one in found.offers) < 0.9 * found.offers[0].ms
    assert "would be faster" in found.reasons[-1]


def test_widths_can_be_kept(run: store.Run) -> None:
    found = ask(run, vram=6, keep_widths=True)
    assert found.offers and all(widths_in(one) is None and one.kl == 0.0 for one in found.offers)
    assert {WORDS[one.way].name for one in found.offers} <= {"layers_cpu", "static_cpu", "half_pinned", *MOVING}
    assert found.front == (min(range(len(found)), key=lambda at: found.offers[at].ms),)


def test_the_slowest_domain_comes_first(found: Serving) -> None:
    for offer in found.offers:
        times = [row.ms for row in offer.domains]
        assert times == sorted(times, reverse=True) and offer.worst is offer.domains[0]
        tokens = sum(row.tokens for row in offer.domains)
        assert sum(row.ms * row.tokens for row in offer.domains) / tokens == pytest.approx(offer.ms)
    assert _tells_domain(found) == (found.offers[0].worst.ms > SLOWER * found.offers[0].ms)


def _tells_domain(found: Serving) -> bool:
    return any(f"The slowest domain is {found.offers[0].worst.domain}" in one for one in found.reasons)


def test_one_domain_may_be_asked_for(run: store.Run) -> None:
    found = ask(run, vram=6, domains=("german",), keep_widths=True)
    assert {row.domain for one in found.offers for row in one.domains} == {"german"}
    assert found[0].provenance.domains == ("german",)


def test_batches_are_slower_per_pass_and_told_by_domain(run: store.Run) -> None:
    one, four = (ask(run, vram=9, context=64, batch=size, keep_widths=True) for size in (1, 4))
    single = {offer.way: offer.ms for offer in one.offers}
    domains = {row.domain for row in one.offers[0].domains}
    for offer in four.offers:
        assert offer.ms < single[offer.way] < 4 * offer.ms  # time by tokens, of which a pass gives four
        assert [row.domain for row in offer.domains] != ["mixed"] and {row.domain for row in offer.domains} == domains
        assert offer.plan.estimate.speed is not None and offer.plan.estimate.speed.batch == 4
    with pytest.raises(PlanError, match="keys and values"):
        ask(run, vram=5, context=512, batch=16)


# --- budgets ---


def test_more_memory_is_never_slower(run: store.Run) -> None:
    found = {(vram, ram): ask(run, vram=vram, ram=ram).offers for vram in (4.5, 6, 10) for ram in (2, 64)}
    for quality in (1e-6, 0.02, 0.1):
        best = {
            at: min((one.ms for one in offers if one.kl is not None and one.kl <= quality), default=np.inf)
            for at, offers in found.items()
        }
        assert np.isfinite(best[10, 64])
        for (vram, ram), (more, other) in product(found, found):
            if more >= vram and other >= ram:
                assert best[more, other] <= best[vram, ram] * 1.0001


def test_other_weights_may_be_given(run: store.Run) -> None:
    given_ = ask(run, vram=12, other_weights=5 * MIB, keep_widths=True)
    assert given_.memory["other"] == 5 * MIB
    assert given_.memory["experts"] == 12 * MIB - 5 * MIB - given_.memory["kv"] - given_.memory["activations"]


def test_prefetching_is_tried_beside_the_best_cache(run: store.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where caches are fastest, as with a CPU that is of no use; what it gives is offered, whatever it is."""
    weak = machine("rtx3060", vram=6 * MIB)
    weak = replace(weak, cpu=replace(weak.cpu, bandwidth=1e7, flops=1e7))
    found = serving(run, weak, context=CONTEXT, steps=STEPS, keep_widths=True)
    assert cache_of(found.offers[0]).policy == "lru"
    tried = {cache_of(one).prefetch for one in found.offers} - {"none"}
    refused = {name for name in PREFETCHES if any(name.replace("_", " ") in way for way in found.refused)}
    assert tried | refused == set(PREFETCHES) and tried
    for one in found.offers:
        assert (cache_of(one).prefetch == "none") == ("prefetching by" not in one.way)


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("half_pinned+transitions", "LRU caches per layer alone prefetch"),
        ("lru_shared+transitions", "LRU caches per layer alone prefetch"),
        ("resident", "experts as they are do not all fit"),
    ],
)
def test_ways_that_are_not_what_was_replayed_are_refused(run: store.Run, way: str, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        chosen_plan(run, machine("rtx3060", vram=6 * MIB), way=way, context=CONTEXT, steps=STEPS)


def test_memory_that_is_shared_has_no_copies_and_no_second_processor(run: store.Run) -> None:
    found = ask(run, vram=6, name="m4-max", ram=0, keep_widths=True)
    assert found.word == "serve"
    for offer in found.offers:  # what is not in the one memory lies on disk
        assert offer.experts[1] == 0 and offer.experts[2] > 0 and cache_of(offer).misses == "load"
    none = ask(run, vram=6, name="cpu-desktop", ram=0, disk="none", keep_widths=True)
    assert none.word == "leave it"


def test_a_measured_machine_is_taken_from_its_file(run: store.Run, tmp_path: Path) -> None:
    own: Machine = replace(machine("rtx3060", vram=6 * MIB), name="mine", title="my machine", measured=("link",))
    (tmp_path / "machine.json").write_text(as_json(own))
    read = machine(file=tmp_path / "machine.json")
    found, known = (serving(run, one, context=CONTEXT, steps=STEPS, keep_widths=True) for one in (read, own))
    assert found == known and found.machine == ("mine", "my machine")
    assert found[0].target.machine == "mine"


# --- runs that know less ---


def bare(folder: Path, level: str) -> store.Run:
    return collected(build("olmoe", num_hidden_layers=2), folder, level=level)


def test_a_run_that_prices_nothing_puts_narrower_experts_behind(tmp_path: Path) -> None:
    with bare(tmp_path, "routing") as opened:
        device = machine("rtx3060", vram=10**9)
        rest = serving(opened, device, context=8, keep_widths=True)
        whole = sum(shape.num_experts * shape.width for shape in opened_source(opened)) * 3 * opened_size(opened) * 4
        room = int(rest.memory["total"] - rest.memory["experts"] + 0.6 * whole)
        slow = machine("rtx3060", vram=room)
        slow = replace(slow, device=replace(slow.device, bandwidth=1e9), cpu=replace(slow.cpu, bandwidth=1e8))
        found = serving(opened, slow, context=8)
        costs = [one.kl for one in found.offers]
        assert {kl for kl in costs if kl is not None} == {0.0} and None in costs
        first = costs.index(None)
        assert first > 0 and all(kl is None for kl in costs[first:])
        assert not any("on average" in one.widths for one in found.offers)  # nobody knows which experts may be narrow
        assert all(at < first for at in found.front)
        fastest = min(found.offers, key=lambda one: one.ms)
        assert fastest.kl is None and found.word == "serve"  # and is told, not taken
        told = found.reasons[-1]
        assert told.startswith("Experts in 8 bits") and "cannot price" in told  # the widest of those that are faster
        assert any(f"{one.ms:.3g} ms, {one.way}" in told for one in found.offers if one.widths == "in 8 bits")
        back = Serving.of(json.loads(json.dumps(found.content())))
        assert back.content() == found.content()
        tiny = machine("rtx3060", vram=room, ram=int(0.2 * whole), disk="none")
        blind = serving(opened, tiny, context=8)
        assert blind.word == "with care" and "cannot price narrower experts" in blind.reasons[-1]


def opened_source(run: store.Run) -> Any:
    from planner.source import source_of

    return source_of(run).layers


def opened_size(run: store.Run) -> int:
    from planner.source import source_of

    return source_of(run).expert_size


def test_a_run_whose_checks_failed_is_refused_unless_asked(run: store.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = run.badge.__class__(**{**vars(run.badge), "status": "invalid", "reason": "a check failed"})
    monkeypatch.setattr(type(run), "badge", property(lambda self: broken))
    with pytest.raises(PlanError, match="checks of run 'sample' failed"):
        ask(run, vram=6, keep_widths=True)
    assert ask(run, vram=6, keep_widths=True, allow_invalid=True).offers


# --- engines ---


@pytest.mark.parametrize("engine", CACHES)
def test_the_best_plan_goes_to_engines(roomy: Serving, tight: Serving, engine: str) -> None:
    format_ = next(one for one in EXPORTERS if one.name == engine)
    for offer in (roomy.offers[0], tight.offers[0]):
        exported = format_.export(offer.plan)
        step = cache_of(offer)
        narrow = widths_in(offer) is not None
        assert narrow == any("quantize: apply it first" in one for one in exported.left_out)
        if engine == "llama.cpp":
            words = exported.text.split()
            assert words[:3] == ["-ngl", "999", "-ncmoe"] and 0 < int(words[3]) <= 6
            assert (6 - int(words[3])) * 16 <= step.slots < (7 - int(words[3])) * 16  # as many whole layers as it holds
        elif engine == "sglang-kt":
            counts = torch.load(io.BytesIO(exported.content), weights_only=True)["logical_count"]
            assert counts.shape == (1, 6, 16)
            held = torch.zeros(6 * 16).scatter(0, counts[0].flatten().topk(step.slots).indices, 1.0).bool()
            pinned = torch.from_numpy(flags(offer, "pinned"))
            assert bool(held.view(6, 16)[pinned].all())
        elif engine == "moe-infinity":
            share = json.loads(exported.text)["device_memory_ratio"]
            assert 0 < share < 1 and share == pytest.approx(offer.bytes[0] / (ROOM * MIB), abs=0.01)
        else:
            rows = [line.split(",") for line in exported.text.splitlines()]
            assert len(rows) >= 6 and len({row[0] for row in rows} - {"layer"}) >= 1


@pytest.mark.parametrize(("near", "far"), trials.PAIRS)
def test_pairs_of_widths_are_not_wider_elsewhere(near: int, far: int) -> None:
    assert near >= far


def test_what_stays_fills_the_device(roomy: Serving, task: Task) -> None:
    """Experts of a mixture differ in size: the next most used one, or the next layer, would not fit."""
    seen = set()
    for offer in roomy.offers:
        way = WORDS.get(offer.way)
        if way is None or way.name not in ("layers_cpu", "static_cpu") or "elsewhere" in offer.widths:
            continue
        sizes = expert_sizes(without_cache(offer, task), source_bits=16).bytes
        pinned, left = flags(offer, "pinned"), roomy.memory["experts"]
        if way.name == "layers_cpu":
            assert offer.bytes[0] + sizes[int(pinned.all(axis=1).sum())].sum() > left
        else:
            assert offer.bytes[0] + sizes[~pinned].max() > left
        seen.add((way.name, "on average" in offer.widths))
    assert {("static_cpu", True), ("static_cpu", False), ("layers_cpu", False)} <= seen
