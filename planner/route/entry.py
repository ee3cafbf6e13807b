"""The entry to plans that change routing: a run and a rule in, a checked plan out that says what the trace knows of it.

A trace knows what a rule does to the choice of experts; what it does to the loss only a live run says
(``moescope sweep MODEL --plan PLAN``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
from pydantic import ValidationError

import store
from compressor.plan import (
    Estimate,
    Evidence,
    LayerKey,
    LayerShape,
    LayerValues,
    Plan,
    Provenance,
    RouteLayer,
    RouteRule,
    RouteStep,
    RouteWeights,
    Source,
    Target,
)
from moescope import __version__
from moescope.cluster import Cluster
from moescope.errors import PlanError
from planner.entry import domains_of
from planner.estimate.parameters import active_parameters, expert_parameters, sizes_before
from planner.guard import Guard, Rule, guard_of
from planner.route.balance import ROUNDS, Balanced, balanced
from planner.route.evidence import Told, told
from planner.source import source_of

SILENCED = 0.5
"""A super expert that keeps less than this part of its selections is called silenced; ours."""

SKIPS = ("top_p", "ratio", "threshold", "null_experts")
"""Rules that make no sense where a token has one expert: there is none to leave out."""

Biases = Mapping[LayerKey, Sequence[float]]


def make(
    run: store.Run,
    *,
    rule: RouteRule,
    value: float | None = None,
    values: Mapping[LayerKey, float] | None = None,
    biases: Biases | None = None,
    weights: RouteWeights = "renormalized",
    layers: Sequence[LayerKey] | None = None,
    domains: Sequence[str] | None = None,
    guard: bool | Rule = True,
    allow_invalid: bool = False,
    limit_tokens: int | None = None,
    cluster: Cluster | None = None,
    tell: Callable[[str], None] | None = None,
    method: str = "",
    notes: Sequence[str] = (),
) -> Plan:
    """A plan with one route step. The same run and arguments give the same plan, byte for byte.

    Args:
        run: a finished run.
        rule: what decides; see :data:`compressor.plan.routing.RouteRule`.
        value: of the rule, in all ``layers``.
        values: of the rule, layer by layer, in place of ``value`` and ``layers``.
        biases: with rule ``bias``, what is added to the logits, one number per routed expert; layers of zeros alone are
            left as they are.
        weights: what becomes of the gate weights of the experts that stay.
        layers: (layer, step) of those that it changes; None = all that it can change.
        domains: whose text the evidence rests on, one or all of the run's.
        guard: refuse what silences a super expert, see :func:`planner.guard.guard_of`.
        allow_invalid: take a run whose checks failed.
        limit_tokens: of the trace that the evidence rests on at most; None = all.
        cluster: whose workers read the trace, layer by layer; None = this process.
        tell: told how far it is.
        method: by which planner or editor it was found; empty = the rule as it was asked for.
        notes: sentences that belong beside the evidence.

    Raises:
        PlanError: what cannot be, with the layer, the number and what would do.
    """
    source = routable(run, allow_invalid=allow_invalid)
    if rule not in get_args(RouteRule):
        raise PlanError(f"no rule {rule!r}; there are {', '.join(get_args(RouteRule))}")
    if weights not in get_args(RouteWeights):
        raise PlanError(f"weights {weights!r} are none of {', '.join(get_args(RouteWeights))}")
    if rule == "bias":
        if value is not None or values is not None or layers is not None:
            raise PlanError("rule bias takes one number per expert and layer (biases), and neither values nor layers")
        chosen = _biased(source, biases or {})
    else:
        if biases is not None:
            raise PlanError(f"rule {rule} takes one value, and no biases")
        chosen = _valued(source, rule, value, values, layers)
    step = _step(rule, weights, chosen, method)
    names = domains_of(run, domains)
    _require_one_or_all(run, names)
    domain = names[0] if len(names) == 1 < len(run.domains) else None
    found = told(run, step, domain=domain, limit_tokens=limit_tokens, cluster=cluster, tell=tell)
    watch = guard_of(run, guard)
    _require_loud(found, watch, chosen)
    return _plan(run, source, step, names, found, watch, tuple(notes)).checked()


def balance(
    run: store.Run,
    *,
    layers: Sequence[LayerKey] | None = None,
    rounds: int = ROUNDS,
    guard: bool | Rule = True,
    allow_invalid: bool = False,
    limit_tokens: int | None = None,
    cluster: Cluster | None = None,
    tell: Callable[[str], None] | None = None,
) -> Plan:
    """A plan of biases that even out the load of each layer, by :func:`planner.route.balance.balanced`; layers where
    they do not on text that they were not fitted on are left as they are.

    Raises:
        PlanError: as :func:`make`; no layer gains.
    """
    source = routable(run, allow_invalid=allow_invalid)
    keys = _known(source, layers)
    infos = {(one.layer, one.step): one for one in run.layers}
    found = [balanced(run, infos[key], rounds=rounds) for key in keys]
    gained = [one for one in found if one.after < one.before]
    if not gained:
        before, after = (float(np.mean([getattr(one, name) for one in found])) for name in ("before", "after"))
        raise PlanError(
            "no bias evens out the load on text that it was not fitted on: its coefficient of variation is"
            f" {before:.3f} as it is and {after:.3f} with biases. Collect more text with router scores, or leave it"
        )
    biases = {one.key: tuple(float(f"{value:.6g}") for value in one.bias.tolist()) for one in gained}
    return make(
        run, rule="bias", biases=biases, guard=guard, allow_invalid=allow_invalid, limit_tokens=limit_tokens,
        cluster=cluster, tell=tell, method="balance", notes=_balance_notes(found, gained),
    )  # fmt: skip


def routable(run: store.Run, *, allow_invalid: bool = False) -> Source:
    """The model of a run whose routing a plan can change.

    Raises:
        PlanError: the run is live, its checks failed, or its experts are no list of their own per layer.
    """
    if run.live:
        raise PlanError(f"run {run.name!r} is still being collected: plan when it is finished")
    if run.badge.status == "invalid" and not allow_invalid:
        raise PlanError(
            f"the checks of run {run.name!r} failed ({run.badge.reason}): collect it again, or allow an invalid run"
        )
    return source_of(run)


@dataclass(frozen=True)
class _Chosen:
    """One layer that the rule changes: its shape, and its value or its bias."""

    shape: LayerShape
    value: float | None = None
    bias: tuple[float, ...] = ()


def _known(source: Source, layers: Sequence[LayerKey] | None) -> list[LayerKey]:
    keys = [one.key for one in source.layers]
    if layers is None:
        return keys
    for key in layers:
        if key not in keys:
            raise PlanError(f"{source.model} has no MoE layer {_label(key)}; it has {_labels(keys)}")
    if not layers:
        raise PlanError("no layer is named: name one, or leave layers out for all")
    return sorted(set(layers))


def _biased(source: Source, biases: Biases) -> list[_Chosen]:
    keys = _known(source, list(biases) or None)
    chosen = []
    for key in keys:
        row, shape = tuple(map(float, biases.get(key, ()))), source.by_key[key]
        if not biases:
            break
        if len(row) != shape.num_experts:
            raise PlanError(f"layer {_label(key)} takes {shape.num_experts} biases, one per expert, not {len(row)}")
        if not np.isfinite(row).all():
            raise PlanError(f"a bias of layer {_label(key)} is no finite number")
        if shape.num_experts <= shape.top_k:
            raise PlanError(f"layer {_label(key)} uses all of its {shape.num_experts} experts: a bias changes none")
        if any(one != row[0] for one in row):  # the same for all changes nothing
            chosen.append(_Chosen(shape, bias=row))
    if not chosen:
        raise PlanError("no bias changes anything: give one other than 0 to some expert, and not the same to all")
    return chosen


def _valued(
    source: Source,
    rule: str,
    value: float | None,
    values: Mapping[LayerKey, float] | None,
    layers: Sequence[LayerKey] | None,
) -> list[_Chosen]:
    if (value is None) == (values is None):
        raise PlanError(f"rule {rule} takes one value for all layers, or one per layer: give one of the two")
    if values is not None and layers is not None:
        raise PlanError("values per layer name their layers: leave layers out")
    shapes = [source.by_key[key] for key in _known(source, list(values) if values is not None else layers)]
    single = [one for one in shapes if one.top_k == 1] if rule in SKIPS else []
    if single and (layers is not None or values is not None or len(single) == len(shapes)):
        raise PlanError(
            f"layer {_label(single[0].key)} uses one expert per token, and rule {rule} leaves experts out: there is"
            " none that could go"
        )
    chosen = []
    for shape in shapes:
        if shape in single:
            continue
        given = float(values[shape.key]) if values is not None else float(value or 0.0)
        if rule == "top_k" and given > shape.num_experts:
            raise PlanError(f"layer {_label(shape.key)} has {shape.num_experts} experts, not {given:g}")
        if rule != "top_k" or given != shape.top_k:
            chosen.append(_Chosen(shape, value=given))
    if not chosen:
        raise PlanError(f"{value or 0:g} experts per token is what every layer has: nothing would change")
    return chosen


def _step(rule: RouteRule, weights: RouteWeights, chosen: Sequence[_Chosen], method: str) -> RouteStep:
    try:
        return RouteStep(
            method=method or rule, rule=rule, weights=weights,
            layers=tuple(
                RouteLayer(layer=one.shape.layer, step=one.shape.step, value=one.value, bias=one.bias) for one in chosen
            ),
        )  # fmt: skip
    except ValidationError as error:
        raise PlanError(str(error.errors()[0]["msg"]).removeprefix("Value error, ")) from error


def _require_one_or_all(run: store.Run, names: Sequence[str]) -> None:
    if 1 < len(names) < len(run.domains):
        raise PlanError(f"evidence rests on one domain or on all {len(run.domains)}, not on {len(names)}")


def _require_loud(found: Told, guard: Guard, chosen: Sequence[_Chosen]) -> None:
    """Refuse a plan under which a super expert loses most of its tokens."""
    for one in chosen:
        for expert in sorted(guard.experts(one.shape.key)):
            before, after = found.selections(one.shape.key, expert)
            if before and after < SILENCED * before:
                raise PlanError(
                    f"super expert {expert} of layer {_label(one.shape.key)} would keep {after:,} of {before:,}"
                    " selections: leave it more, or switch the guard off"
                )


def _plan(
    run: store.Run, source: Source, step: RouteStep, names: Sequence[str], found: Told, guard: Guard,
    notes: tuple[str, ...],
) -> Plan:  # fmt: skip
    sizes = sizes_before(source)
    whole, active = expert_parameters(source, sizes), active_parameters(source, sizes)
    return Plan(
        provenance=Provenance(
            run=run.name, corpus=str(run.info.settings.get("corpus_sha256", "")), tokens=run.info.tokens,
            domains=tuple(names), badge=run.badge.status, tool_version=__version__,
        ),
        source=source,
        target=Target(engine="transformers", preset=step.method),
        steps=(step,),
        estimate=Estimate(
            expert_parameters=whole, expert_parameters_after=whole, active_parameters=active,
            active_parameters_after=max(0, active + found.change_of(source)), bytes_saved=0, kept_mass=found.kept_mass,
        ),
        evidence=(
            Evidence(
                score="load with the rule" if step.rule == "bias" else "mean active experts with the rule",
                unit="tokens" if step.rule == "bias" else "experts",
                source=found.source,
                layers=tuple(
                    LayerValues(layer=layer, step=number, values=values)
                    for (layer, number), values in found.layer_values(step).items()
                ),
                protected=guard.protected, guard=guard.active, notes=(*notes, *found.notes, *guard.notes),
            ),
        ),
    )  # fmt: skip


def _balance_notes(found: Sequence[Balanced], gained: Sequence[Balanced]) -> tuple[str, ...]:
    before, after, fitted = (
        float(np.mean([getattr(one, name) for one in gained])) for name in ("before", "after", "fitted")
    )
    left = [_label(one.key) for one in found if one not in gained]
    words = (
        f"Fitted on every other sequence of each domain, judged on the others ({gained[0].tokens:,} tokens): the"
        f" coefficient of variation of the load goes from {before:.3f} to {after:.3f}, mean over layers; on the text of"
        f" the fit it is {fitted:.3f}."
    )
    if not left:
        return (words,)
    every = [float(np.mean([getattr(one, name) for one in found])) for name in ("before", "after")]
    return (
        words,
        f"Left as they are, since biases do not help there: layers {', '.join(left)}. That was seen on the same text:"
        f" the gain is the most to expect; biases in all layers would go from {every[0]:.3f} to {every[1]:.3f}.",
    )


def _label(key: LayerKey) -> str:
    return str(key[0]) if not key[1] else f"{key[0]}.{key[1]}"


def _labels(keys: Sequence[LayerKey]) -> str:
    return ", ".join(map(_label, keys)) if len(keys) <= 12 else f"{_label(keys[0])} to {_label(keys[-1])}"
