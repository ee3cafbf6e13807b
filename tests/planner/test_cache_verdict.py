"""Verdicts on points of known times, and on runs of which the answer is known beforehand."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_settings import EXPERT, random_routes, slow_machine, sticky_routes, written_run

from moescope.errors import PlanError
from planner.cache.study import Study
from planner.cache.verdict import GAIN, SizePoint, Verdict, judge
from planner.caching import study
from planner.machine import Link, Machine
from planner.machines import machine

GIB = 2**30
WHOLE = 16 * GIB


def point(gib: float, ms: float, *, plain: float = 10.0, chance: float = 11.0, spread: float = 0.1, bound: float = 1.0):
    return SizePoint(
        bytes=round(gib * GIB), slots=round(gib), way="LRU caches", ms=ms, low=ms - spread, high=ms + spread,
        plain=plain, chance=chance, bound=bound,
    )  # fmt: skip


END = point(16, 1.0, plain=1.0, chance=1.0, spread=0.0)
"""The whole model: everything is alike."""


def verdict(*points: SizePoint, asked: float, **options: Any) -> Verdict:
    return judge([*points, END], asked=round(asked * GIB), whole=WHOLE, **options)


# --- constructed points ---


def test_everything_fits() -> None:
    found = verdict(point(4, 5.0), asked=16)
    assert (found.word, found.above) == ("fits", None)
    assert found.sentence == "all experts fit: nothing is to be cached"
    assert found.reasons == ("All experts take 16 GiB, and the device has 16 GiB for them.",)
    true = judge([END], asked=WHOLE, whole=WHOLE, room=40 * GIB, total=9 * GIB)
    assert true.reasons == ("All experts take 9 GiB, and the device has 40 GiB for them.",)


def test_caching_pays_at_the_size_that_was_asked_for() -> None:
    found = verdict(point(4, 8.0), point(8, 5.0, bound=2.0), asked=8)
    assert (found.word, found.sentence) == ("pays", "caching pays")
    assert found.above == 4 * GIB  # and already there
    first, gain, bound = found.reasons
    assert first == (
        "With 8 GiB for experts, the fastest way that goes by the trace takes 5 ms per token (4.9 to 5.1): LRU caches."
        " Without a trace, whole layers on the device take 10 ms; the same way on random experts, 11 ms."
    )
    assert gain == "That is 2.00 times as fast as the better of these."
    assert bound == "No way at all could take less than 2 ms there: the fastest way takes 2.50 times that."


def test_the_whole_model_does_not_count() -> None:
    """Where all experts fit nothing is gained, which says nothing of sizes below."""
    found = verdict(point(4, 10.0), point(6, 9.5), point(8, 5.0), point(12, 2.0), asked=4)
    assert (found.word, found.above) == ("pays above", 8 * GIB)
    assert found.sentence == "caching pays only from 8 GiB for experts on"
    assert found.reasons[-1] == "With 8 GiB it pays: 5 ms against 10 ms."


def test_sizes_at_which_it_pays_only_now_and_then_are_not_named() -> None:
    found = verdict(point(4, 10.0), point(6, 5.0), point(8, 9.9), point(12, 2.0), asked=4)
    assert (found.word, found.above) == ("pays above", 12 * GIB)


def test_caching_does_not_pay() -> None:
    found = verdict(point(4, 10.5), point(8, 10.0), asked=4)
    assert (found.word, found.above, found.sentence) == ("does not pay", None, "caching does not pay")
    assert found.reasons[1] == "Knowing the routing gains nothing."
    hopeless = verdict(point(4, 10.0, bound=9.5), asked=4)
    assert hopeless.reasons[-1] == (
        "Not even a policy that knew the future could save so much: it would take 9.5 ms or more."
    )


def test_where_it_pays_with_less_only() -> None:
    found = verdict(point(4, 5.0), point(15, 1.9, plain=2.0, chance=2.1), asked=15)
    assert found.word == "does not pay"
    assert found.reasons[-1] == "With less memory it pays, as with 4 GiB: 5 ms against 10 ms."


@pytest.mark.parametrize(("ms", "spread", "plain", "chance", "pays"), [
    (9.0, 0.0, 10.0, 11.0, True), (9.01, 0.0, 10.0, 11.0, False),  # a tenth, at least
    (8.9, 0.2, 10.0, 11.0, False), (8.7, 0.2, 10.0, 11.0, True),  # for sure
    (5.0, 0.0, 10.0, 5.1, False),  # random experts would give the same
])  # fmt: skip
def test_what_paying_is(ms: float, spread: float, plain: float, chance: float, pays: bool) -> None:
    given = point(8, ms, plain=plain, chance=chance, spread=spread)
    assert given.pays is pays
    found = verdict(given, asked=8)
    assert (found.word == "pays") is pays
    if not pays and chance > plain:
        assert found.reasons[1] == (
            "That does not surely save the 10% of the time from which on caching is said to pay."
        )
    elif not pays:
        assert "random experts would gain almost as much" in found.reasons[1]
    assert GAIN == 0.9


def test_further_reasons_come_last() -> None:
    found = verdict(point(4, 10.0), asked=4, told=["Because."])
    assert found.reasons[-1] == "Because."


# --- runs ---

SHAPE = {"layers": 4, "experts": 16, "k": 2, "requests": 24, "length": 60}
LONG = {**SHAPE, "length": 600}
"""Sticky tokens of a request choose anew often enough to have been everywhere."""


def domains_of(ids: np.ndarray) -> list[str]:
    return [("a", "b", "c")[at % 3] for at in range(ids.shape[1])]


def told(folder: Path, ids: np.ndarray, given: Machine, *, share: float = 0.5, **options: Any) -> Study:
    """The study where the device holds so much of all experts."""
    run = written_run(folder, ids, domains=domains_of(ids), config={}, **options)
    vram = round(share * 64 * EXPERT)
    return study(run, replace(given, vram=vram), other_weights=0)


@pytest.mark.parametrize("seed", range(2))
def test_random_experts_must_not_pay(tmp_path: Path, seed: int) -> None:
    for link, cpu in ((1e9, 1e8), (1e8, 1e9), (1e9, 1e9)):
        found = told(tmp_path, random_routes(seed, **SHAPE), slow_machine(link=link, cpu=cpu), name=f"{link}-{cpu}")
        assert (found.verdict.word, found.verdict.above) == ("does not pay", None)
        parts = found.parts["lru"]
        assert parts["random"] == pytest.approx(0.5, abs=0.03)
        for name in ("popularity", "topic", "locality"):
            assert abs(parts[name]) < 0.02, name


def test_sticky_tokens_pay_and_locality_is_why(tmp_path: Path) -> None:
    ids = sticky_routes(0, stay=0.9, **LONG)
    found = told(tmp_path, ids, slow_machine(link=1e9, cpu=1e8))
    assert found.verdict.word == "pays"
    assert found.best.name.startswith(("lru", "lfu", "half"))
    parts = found.parts["lru"]
    assert parts["locality"] > 0.3
    assert abs(parts["popularity"]) < 0.03
    # A tenth of the tokens choose anew, and half of what they choose is there.
    assert sum(parts.values()) == pytest.approx(0.95, abs=0.01)


def test_without_their_order_sticky_tokens_have_no_locality(tmp_path: Path) -> None:
    ids = sticky_routes(0, stay=0.9, **LONG)
    flat = ids.reshape(4, -1, 2)
    ids = flat[:, np.random.default_rng(1).permutation(flat.shape[1])].reshape(ids.shape)
    found = told(tmp_path, ids, slow_machine(link=1e9, cpu=1e8))
    assert abs(found.parts["lru"]["locality"]) < 0.02
    assert found.verdict.word == "does not pay"


def test_topics_are_told_from_neighbours(tmp_path: Path) -> None:
    """Every request draws from four experts of its own, token by token anew."""
    generator = np.random.default_rng(5)
    own = np.argsort(generator.random((4, 300, 16)), axis=-1)[..., :4]
    drawn = np.argsort(generator.random((4, 300, 60, 4)), axis=-1)[..., :2]
    ids = np.take_along_axis(own[:, :, None], drawn, axis=-1)
    parts = told(tmp_path, ids, slow_machine(link=1e9, cpu=1e8)).parts["lru"]
    assert parts["topic"] > 0.3
    assert abs(parts["locality"]) < 0.02
    assert abs(parts["popularity"]) < 0.03


def test_popular_experts_pay_and_lie_still(tmp_path: Path) -> None:
    generator = np.random.default_rng(2)
    noise = generator.gumbel(size=(4, 24, 60, 16)) - 0.6 * np.arange(16)
    found = told(tmp_path, np.argsort(-noise, axis=-1)[..., :2], slow_machine(link=1e8, cpu=1e9))
    assert found.verdict.word == "pays"
    assert found.best.name == "static_cpu"
    parts = found.parts["lru"]
    assert parts["popularity"] > 0.2
    assert abs(parts["locality"]) < 0.02
    assert abs(parts["topic"]) < 0.02


def test_where_memory_is_shared_there_is_nothing_to_cache(tmp_path: Path) -> None:
    ids = sticky_routes(0, stay=0.9, **SHAPE)
    for name in ("m4-max", "cpu-desktop"):
        found = told(tmp_path, ids, machine(name), name=name)
        assert (found.verdict.word, found.verdict.above) == ("does not pay", None)
        assert len(found.verdict.reasons) == 1
        assert found.verdict.reasons[0].startswith(
            "Device and CPU share one memory: what is in it is never copied, so there is nothing to cache."
        )
        assert all(way.misses == "load" for way in found.ways)
        assert any("read from disk" in note for note in found.notes)
    # Not even room for a step of every layer.
    small = told(tmp_path, ids, machine("m4-max"), share=0.05, name="small")
    assert small.slots < 8
    assert small.verdict.word == "does not pay"
    fits = told(tmp_path, ids, machine("m4-max"), share=1.0, name="fits")
    assert fits.verdict.word == "fits"


@pytest.mark.parametrize(
    ("share", "options"), [(0.04, {}), (0.1, {}), (0.3, {"batch": 3}), (0.9, {}), (1.0, {}), (0.5, {"phase": "prompt"})]
)
def test_sentences_are_sentences(tmp_path: Path, share: float, options: dict[str, Any]) -> None:
    ids = sticky_routes(1, stay=0.7, **SHAPE)
    run = written_run(tmp_path, ids, domains=domains_of(ids), config={})
    given = slow_machine(link=2e9, cpu=5e8, vram=round(share * 64 * EXPERT), ram=64 * EXPERT)
    found = study(run, given, other_weights=0, **options)
    for text in (*found.verdict.reasons, *found.notes):
        assert re.fullmatch(r"[A-Z].*[^.]\.", text), text
        assert not re.search(r"nan|inf\b|None|-0\b|  |%%|\b1 experts|\be[+-]\d", text), text
    assert not found.verdict.sentence.endswith(".")
    assert any("as in decoding: --chunk" in note for note in found.notes) is ("phase" in options)
    assert any("Sequences run 3 at a time" in note for note in found.notes) is ("batch" in options)


def test_what_host_memory_cannot_hold_is_said(tmp_path: Path) -> None:
    ids = random_routes(0, **SHAPE)
    enough = told(tmp_path, ids, slow_machine(ram=32 * EXPERT))
    assert not any("disk" in note for note in enough.notes)
    short = told(tmp_path, ids, slow_machine(ram=20 * EXPERT), name="short")
    note = next(note for note in short.notes if "disk" in note)
    assert "144 KiB would have to be read from disk" in note  # 12 experts of 12 KiB


def test_runs_whose_checks_failed_are_doubted(tmp_path: Path) -> None:
    found = told(tmp_path, random_routes(0, **SHAPE), slow_machine(), failed="outputs differ")
    assert found.notes[0] == "The checks of the run failed, so that all of this may be wrong: made: outputs differ."


def test_a_model_with_one_layer_has_nothing_to_foresee(tmp_path: Path) -> None:
    ids = sticky_routes(0, stay=0.9, **{**SHAPE, "layers": 1})
    run = written_run(tmp_path, ids, domains=domains_of(ids), config={})
    found = study(run, slow_machine(link=1e9, cpu=1e8, vram=8 * EXPERT), other_weights=0)
    assert found.verdict.word == "pays"
    assert not any("+" in way.name for way in found.ways)
    with pytest.raises(PlanError, match="give 24.1 KiB or more"):
        study(run, slow_machine(vram=EXPERT), other_weights=0)


def test_a_fast_link_leaves_nothing_to_save(tmp_path: Path) -> None:
    ids = sticky_routes(0, stay=0.9, **SHAPE)
    given = replace(slow_machine(cpu=1e9), link=Link("fast", 1e13, 0.0))
    found = told(tmp_path, ids, given)
    assert found.verdict.word == "does not pay"
    assert found.bound_ms > GAIN * found.best.ms


@pytest.mark.parametrize("requests", [1, 2, 3])
def test_few_requests_say_nothing(requests: int) -> None:
    times = {"ms": 1.0, "low": 1.0, "high": 1.0, "plain": 9.0, "chance": 9.0, "bound": 0.5}
    point = SizePoint(bytes=10, slots=1, way="w", requests=requests, **times)
    found = judge([point], asked=10, whole=20)
    assert (found.word == "pays") is (requests == 3)
    assert found.reasons[0].startswith("Only") is (requests < 3)
