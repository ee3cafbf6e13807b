"""A budget in, plans over all methods and mixtures out, the best first, or the advice to leave the model as it is.

Everything is priced from the run's sums first. Where a callable that measures plans is given, some plans of the model
are measured to correct these prices, then the finalists, and a search goes on from the best (:mod:`planner.search`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import store
from compressor.plan import Plan
from moescope.errors import PlanError
from planner.budget import memory_of, value_bytes_of
from planner.candidates import Request, candidates, with_elsewhere
from planner.curve import quick as few
from planner.entry import domains_of, require_usable
from planner.estimate.parameters import expert_parameters, sizes_before
from planner.estimate.prediction import Calibration, Turns, calibrate, predict
from planner.estimate.stream import stream_turns
from planner.finalists import Measurement
from planner.guard import Rule
from planner.presets import find as find_preset
from planner.probing import probes
from planner.recommendation import CARE, LEAVE, Candidate, Recommendation, Verdict
from planner.risks import risks_of
from planner.search import search

FINALISTS = 6
"""Plans that are measured, the best of each mix among them."""

PRICED_ELSEWHERE = 12
"""Plans whose cost on text that they were not made from is worked out."""

QUICK_ELSEWHERE = 4
"""As many in a first look."""

Measure = Callable[[Plan], Measurement]


def recommend(
    run: store.Run,
    *,
    memory: int | str,
    other_weights: int = 0,
    engine: str | None = None,
    quality: float | None = None,
    domains: Sequence[str] | None = None,
    guard: bool | Rule = True,
    allow_invalid: bool = False,
    measure: Measure | None = None,
    calibration: Calibration | None = None,
    finalists: int = FINALISTS,
    generations: int = 0,
    quick: bool = False,
    tell: Callable[[str], None] | None = None,
) -> Recommendation:
    """The best plans for a budget.

    Args:
        run: a finished run at level activations; with level errors widths are priced by what they were seen to cost.
        memory: bytes that all weights may take, or such as ``12GiB``.
        other_weights: bytes of the weights beside experts, which a run does not know; counted in ``memory``.
        engine: ``any`` = only what every engine loads; see :func:`planner.make`.
        quality: largest KL divergence, nats per token, that is acceptable; None = ours, :data:`LEAVE`.
        domains: whose text counts; None = all.
        guard: protect super experts.
        allow_invalid: take a run whose checks failed.
        measure: runs the model with and without a plan on calibration text; None = nothing is measured.
        calibration: of earlier measurements; None = by ``measure`` where it is given, else typical factors.
        finalists: plans that are measured.
        generations: of the search from the best finalists; 0 = no search. It takes ``measure``.
        quick: a first look, for which few presets are tried (:data:`planner.curve.QUICK_PRESETS`).
        tell: told in a sentence what is being done.

    Raises:
        PlanError: a budget that other weights alone exceed, a run of which nothing can be priced, or another argument
            that cannot be.
    """
    say = tell or (lambda text: None)
    request = Request(
        run=run, memory=memory_of(memory), other_weights=other_weights, engine=engine, domains=domains, guard=guard,
        allow_invalid=allow_invalid,
    )  # fmt: skip
    request, elsewhere = (few(request), QUICK_ELSEWHERE) if quick else (request, PRICED_ELSEWHERE)
    require_usable(run, find_preset("error_bits"), allow_invalid)
    if domains is not None:
        domains_of(run, domains)
    before = _bytes_before(request)
    if before <= request.memory:
        why = f"The weights take {before:,} bytes and fit into {request.memory:,}: nothing has to be done."
        return Recommendation("leave it", (why,), (), request.memory, before)
    say("pricing every method and mixture from the run's sums")
    found, refused = candidates(request, calibration)
    if not found:
        return _nothing(request, before, refused)
    evidence = [_priced_by(calibration)]
    if measure is not None and calibration is None:
        calibration = _calibrated(request, found, measure, say)
        found = [replace(one, prediction=predict(one.plan, request.task(), calibration)) for one in found]
        evidence = [*([] if calibration.count else evidence), _corrected_by(calibration)]
    found.sort(key=lambda one: (one.score, one.plan.digest))
    found = [with_elsewhere(request, one, calibration) for one in found[:elsewhere]] + found[elsewhere:]
    found.sort(key=lambda one: (one.score, one.plan.digest))
    if measure is not None:
        found = _measured(found, measure, finalists, say)
        if generations:
            found = search(request, found, measure, calibration=calibration, generations=generations, tell=say)
        evidence.append("The first ones were measured on calibration text, edited in memory; the others were not.")
    ranked = tuple(replace(one, risks=risks_of(one, run)) for one in found)
    verdict, reasons = _verdict(ranked, quality)
    return Recommendation(
        verdict, reasons, ranked, request.memory, before, refused, calibration or Calibration(), tuple(evidence)
    )


def _bytes_before(request: Request) -> int:
    source, size = request.task().source, value_bytes_of(request.task())
    if request.other_weights >= request.memory:
        raise PlanError(
            f"the other weights alone take {request.other_weights:,} of {request.memory:,} bytes: nothing is left for"
            " the experts"
        )
    return request.other_weights + expert_parameters(source, sizes_before(source)) * size


def _nothing(request: Request, before: int, refused: dict[str, str]) -> Recommendation:
    """Nothing reaches the size: say what would."""
    reasons = [f"No plan takes {request.memory:,} bytes or less; the weights take {before:,} now."]
    for memory in (before * part // 100 for part in (15, 20, 25, 30, 40, 50, 60, 70, 80, 90)):
        if memory <= request.memory:
            continue
        tried, _ = candidates(replace(request, memory=memory))
        if tried:
            reasons.append(f"The nearest that can be reached is {min(one.bytes for one in tried):,} bytes.")
            break
    return Recommendation("leave it", tuple(reasons), (), request.memory, before, refused)


def _calibrated(
    request: Request, found: Sequence[Candidate], measure: Measure, say: Callable[[str], None]
) -> Calibration:
    """Factors by layer and kind of change, from plans that are measured for it."""
    task = request.task()
    pairs: list[tuple[Turns, float]] = []
    tokens = 0
    plans = probes(task, found)
    for number, plan in enumerate(plans, 1):
        turns = stream_turns(plan, task)
        if turns is None:
            continue
        say(f"measuring {number} of {len(plans)} plans that correct the prices")
        result = measure(plan)
        pairs.append((turns, result.kl))
        tokens = result.tokens
    return calibrate(pairs, tokens=tokens)


def _measured(found: list[Candidate], measure: Measure, count: int, say: Callable[[str], None]) -> list[Candidate]:
    """The finalists measured and in their order, the others behind them."""
    chosen = _finalists(found, count)
    done = []
    for number, one in enumerate(chosen, 1):
        say(f"measuring finalist {number} of {len(chosen)}: {one.name}")
        done.append(replace(one, measurement=measure(one.plan)))
    done.sort(key=lambda one: (one.score, one.plan.digest))
    digests = {one.plan.digest for one in done}
    return done + [one for one in found if one.plan.digest not in digests]


def _finalists(found: Sequence[Candidate], count: int) -> list[Candidate]:
    """The best by price, and the best of each mix; plans that nobody can price only where all are such."""
    priced = [one for one in found if one.kl is not None] or list(found)
    best_of_mix: dict[str, Candidate] = {}
    for one in priced:
        best_of_mix.setdefault(one.mix, one)
    limit = 3 * priced[0].score
    mixes = [one for one in best_of_mix.values() if one.score <= limit]
    chosen = {one.plan.digest: one for one in [*priced[: max(count - len(mixes), 1)], *mixes]}
    for one in priced:
        if len(chosen) >= count:
            break
        chosen.setdefault(one.plan.digest, one)
    return list(chosen.values())


def _verdict(ranked: Sequence[Candidate], quality: float | None) -> tuple[Verdict, tuple[str, ...]]:
    best = ranked[0]
    if best.kl is None:
        return "with care", ("Nobody can say what these plans cost: the run did not see the residual stream.",)
    how = "measured" if best.measurement is not None else "predicted"
    cost = f"{best.name} ({best.mix}) is {how} to cost {best.kl:.3g} nats per token"
    limit = LEAVE if quality is None else quality
    asked = "" if quality is None else ", more than was allowed"
    if best.kl > limit:
        return "leave it", (f"The best plan, {cost}{asked or f', more than {limit:g}'}: leave the model as it is, or"
                            " allow more memory.",)  # fmt: skip
    reasons = [f"Plan {cost}."]
    if len(ranked) > 1 and ranked[1].kl is not None:
        reasons.append(_against(best, ranked[1]))
    if best.elsewhere is not None and best.prediction is not None:
        reasons.append(
            f"On a domain that it was not made from, it is predicted to cost {best.elsewhere:.3g} nats against"
            f" {best.prediction.kl:.3g} on others; plans are ranked by both."
        )
    return ("apply" if best.kl <= (CARE if quality is None else limit) else "with care"), tuple(reasons)


def _against(best: Candidate, second: Candidate) -> str:
    one, two = best.measurement, second.measurement
    if one is None or two is None:
        return f"Next is {second.name} ({second.mix}) with {second.kl:.3g}, by prediction."
    apart = "apart" if one.high < two.low or two.high < one.low else "not apart"
    text = f"Next is {second.name} ({second.mix}) with {two.kl:.3g}; their intervals are {apart}"
    if two.kl < one.kl:
        text += "; it comes second for what it is predicted to cost on text unlike the run's"
    return f"{text}."


def _priced_by(calibration: Calibration | None) -> str:
    if calibration is None or not calibration.count:
        return "Prices are the run's own sums times a factor that is typical of models; no plan was measured for them."
    return _corrected_by(calibration)


def _corrected_by(calibration: Calibration) -> str:
    if not calibration.count:
        return "Too few measured plans could be priced to correct the prices."
    return (
        f"Prices were corrected by measured plans, on {calibration.tokens:,} tokens; {calibration.count} of them, left"
        f" out in turn, were missed by a factor of {math.exp(calibration.spread):.2f} (one standard deviation)."
    )
