"""Predicted costs: planted factors are found again, intervals hold what they say, and little data says little."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest
from scipy.stats import t as student

from planner.estimate.prediction import COVERAGE, SPREAD, TYPICAL, Calibration, Turns, calibrate
from planner.estimate.stream import Turned

KINDS = ("cut", "slimmed", "bits")
LAYERS = 6
PLANTED = {(layer, kind): TYPICAL * 2.0 ** ((layer + 2 * place) % 3 - 1) for layer in range(LAYERS)
           for place, kind in enumerate(KINDS)}  # fmt: skip
"""A half, once and twice the typical factor."""


def turned(draw: np.random.Generator, layers: Sequence[int], kinds: Sequence[str] = KINDS) -> Turns:
    """What a plan changes: between 0.1 and 1 % of each layer's stream, by each kind."""
    return {layer: Turned(**{kind: float(10 ** draw.uniform(-3, -2)) for kind in kinds}) for layer in layers}


def cost(turns: Turns) -> float:
    """What it costs by the planted factors, written down again."""
    return sum(PLANTED[layer, kind] * getattr(one, kind) for layer, one in turns.items() for kind in KINDS)


def experiment(seed: int, noise: float, *, whole: int = 12) -> list[tuple[Turns, float]]:
    """A plan of each layer and kind, and whole plans of all layers, measured with lognormal noise."""
    draw = np.random.default_rng(seed)
    plans = [turned(draw, [layer], [kind]) for layer, kind in PLANTED]
    plans += [turned(draw, range(LAYERS)) for _ in range(whole)]
    return [(turns, cost(turns) * float(np.exp(noise * draw.standard_normal()))) for turns in plans]


def test_planted_factors_are_found() -> None:
    found = calibrate(experiment(0, 0.0), tokens=1000)
    assert set(found.factors) == set(PLANTED)
    for key, factor in found.factors.items():
        # Twice the typical is measured well by a plan of its own: pulled by less than a tenth.
        assert factor == pytest.approx(PLANTED[key], rel=0.12), key
    assert (found.tokens, found.count) == (1000, 12)
    assert found.spread == pytest.approx(0.12)  # nothing narrower is believed
    fresh = turned(np.random.default_rng(9), range(LAYERS))
    assert found.kl(fresh) == pytest.approx(cost(fresh), rel=0.06)
    assert abs(np.log(Calibration().kl(fresh) / cost(fresh))) > 0.1


def test_what_was_not_measured_is_typical() -> None:
    """Three layers that cost four times the usual: the others are predicted to cost what those do typically."""
    draw = np.random.default_rng(1)
    plans = [turned(draw, [layer], ["bits"]) for layer in (0, 1, 2) for _ in range(4)]
    found = calibrate([(one, 4 * TYPICAL * sum(t.bits for t in one.values())) for one in plans], tokens=10)
    assert set(found.factors) == {(layer, "bits") for layer in (0, 1, 2)}
    assert 2.5 * TYPICAL < found.typical < 4 * TYPICAL
    unseen = {5: Turned(cut=0.01)}
    assert found.kl(unseen) == pytest.approx(0.01 * found.typical)
    assert Calibration().kl(unseen) == pytest.approx(0.01 * TYPICAL)


def test_a_factor_that_little_tells_of_stays_near_the_typical_one() -> None:
    """Of one plan's two changes the small one could be anything."""
    draw = np.random.default_rng(2)
    plans: list[tuple[Turns, float]] = []
    for _ in range(6):
        large = float(draw.uniform(0.01, 0.02))
        plans.append(({0: Turned(bits=large), 1: Turned(cut=large / 1e4)}, TYPICAL * large))
    found = calibrate(plans, tokens=10)
    assert found.factors[1, "cut"] == pytest.approx(found.typical, rel=0.01)
    assert found.factors[0, "bits"] == pytest.approx(TYPICAL, rel=0.01)


@pytest.mark.parametrize("noise", [0.25, 0.5])
def test_the_spread_is_that_of_the_noise(noise: float) -> None:
    """Root mean square over experiments: plans left out are missed by their own noise and that of the factors."""
    spreads = [calibrate(experiment(seed, noise), tokens=1).spread for seed in range(8)]
    assert noise * 0.85 < np.sqrt(np.mean(np.square(spreads))) < noise * 1.6


def test_each_kind_has_the_spread_that_it_was_measured_with() -> None:
    """Bits measured almost without noise, cuts with much: plans of one kind are missed by their own kind's noise."""
    draw, noise = np.random.default_rng(6), {"bits": 0.02, "cut": 0.7}
    plans: list[tuple[Turns, float]] = []
    for kind, sigma in noise.items():
        for layers in [*([layer] for layer in range(LAYERS)), *([range(LAYERS)] * 12)]:
            turns = turned(draw, layers, [kind])
            plans.append((turns, cost(turns) * float(np.exp(sigma * draw.standard_normal()))))
    found = calibrate(plans, tokens=1)
    assert found.spreads["bits"] < 0.15 and 0.4 < found.spreads["cut"] < 1.1
    bits, cut = ({0: Turned(**{kind: 0.01})} for kind in noise)
    assert found.spread_of(bits) == found.spreads["bits"] and found.spread_of(cut) == found.spreads["cut"]
    both = {0: Turned(bits=0.01, cut=0.01)}
    parts = {kind: found.factors[0, kind] for kind in noise}
    wanted = sum(part * found.spreads[kind] for kind, part in parts.items()) / sum(parts.values())
    assert found.spread_of(both) == pytest.approx(wanted)
    narrow, wide = (price.high / price.low for price in (found.predict(bits), found.predict(cut)))
    assert narrow < 2 < wide
    # What no plan changed has the spread of all.
    assert "slimmed" not in found.spreads and found.spread_of({0: Turned(slimmed=1.0)}) == found.spread


def test_intervals_hold_nine_of_ten_new_measurements() -> None:
    inside, draws = 0, 0
    for seed in range(8):
        found = calibrate(experiment(100 + seed, 0.3), tokens=1)
        draw = np.random.default_rng(1000 + seed)
        for _ in range(40):
            turns = turned(draw, range(LAYERS))
            price = found.predict(turns)
            measured = cost(turns) * float(np.exp(0.3 * draw.standard_normal()))
            inside, draws = inside + (price.low <= measured <= price.high), draws + 1
    assert price.coverage == COVERAGE == 0.9 and price.basis == "measured plans" and price.plans == 12
    assert 0.85 <= inside / draws <= 0.98  # 320 draws that share 8 calibrations


def test_without_measurements_the_interval_is_the_usual_one() -> None:
    turns = {0: Turned(cut=0.02), 3: Turned(bits=0.01, slimmed=0.005)}
    price = Calibration().predict(turns)
    width = np.exp(student.ppf(0.95, 30) * SPREAD)
    assert price.kl == pytest.approx(TYPICAL * 0.035, rel=1e-5)
    assert (price.low, price.high) == (
        pytest.approx(price.kl / width, rel=1e-5), pytest.approx(price.kl * width, rel=1e-5)
    )  # fmt: skip
    assert (price.basis, price.plans) == ("sums", 0)
    assert Calibration().predict({}).kl == 0


def test_few_plans_say_nothing() -> None:
    one = ({0: Turned(bits=0.01)}, 0.5)
    nothing = [({0: Turned()}, 0.3), ({0: Turned(bits=0.01)}, 0.0), ({}, 0.2)]
    assert calibrate([], tokens=5) == calibrate([one, one, *nothing], tokens=5) == Calibration()
    assert calibrate([one, one, one], tokens=5).count == 3


def test_one_wild_measurement_does_not_spoil_the_rest() -> None:
    plans = experiment(3, 0.0)
    turns, kl = plans[0]
    found = calibrate([(turns, 50 * kl), *plans[1:]], tokens=1)
    fresh = turned(np.random.default_rng(4), range(1, LAYERS))
    assert found.kl(fresh) == pytest.approx(cost(fresh), rel=0.1)


def test_a_file_gives_it_back() -> None:
    found = calibrate(experiment(5, 0.3), tokens=77)
    assert Calibration.of(json.loads(json.dumps(found.content()))) == found
    assert Calibration.of(json.loads(json.dumps(Calibration().content()))) == Calibration()
    with pytest.raises(KeyError):
        Calibration.of({"factors": []})
