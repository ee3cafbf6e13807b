"""What to look at before a plan is used: said beside every candidate, from the plan, its run and what was measured."""

from __future__ import annotations

import polars as pl

import store
from compressor.plan import DropStep, MergeStep, QuantizeStep, SlimStep
from planner.recommendation import Candidate

REASONING_BITS = 3.0
"""Effective bits at and below which others saw reasoning suffer long before language."""

WORSE = 2.0
"""How many times the mean a domain has to cost to be named."""


def risks_of(candidate: Candidate, run: store.Run) -> tuple[str, ...]:
    """Sentences, the weightiest first."""
    found = []
    bits = candidate.plan.estimate.bits
    if bits is not None and bits <= REASONING_BITS:
        found.append(
            f"Reasoning: at {bits:.3g} bits others saw mathematics and code fall by a third and more where language"
            " fell by a twentieth (MC-MoE, Mixtral 8x7B, not measured here): try tasks of your own."
        )
    found += _worst_domain(candidate)
    price, elsewhere = candidate.prediction, candidate.elsewhere
    if price is not None and elsewhere is not None and elsewhere > WORSE * price.kl:
        found.append(
            f"Text unlike the run's: predicted to cost {elsewhere / price.kl:.1f} times as much on a domain that the"
            " plan was not made from."
        )
    slims = any(isinstance(step, SlimStep) for step in candidate.plan.steps)
    if slims and set(run.table("neuron_activation")["domain"].unique()) <= {""} and len(run.domains) > 1:
        found.append(
            "Text unlike the run's: the run keeps neurons pooled over domains, so nobody knows what slimming costs"
            " there. On the bundled model it cost a domain that the run had not seen up to five times as much as"
            " narrower widths did (benchmarks/README.md): record every kind of text that matters, with"
            " --vectors-per-domain."
        )
    found += _thin(candidate, run)
    found += _loading(candidate)
    return tuple(found)


def _worst_domain(candidate: Candidate) -> list[str]:
    measured = candidate.measurement
    if measured is None or len(measured.domains) < 2 or measured.kl <= 0:
        return []
    name, worst = max(measured.domains.items(), key=lambda item: (item[1].kl, item[0]))
    if worst.kl < WORSE * measured.kl:
        return []
    return [f"Domain {name} loses most: {worst.kl:.3g} nats, {worst.kl / measured.kl:.1f} times the mean."]


def _thin(candidate: Candidate, run: store.Run) -> list[str]:
    """Experts of which the run saw few tokens."""
    load = run.table("expert_load").filter(pl.col("kind") == "routed")
    seen = load.group_by("layer", "step", "expert").agg(pl.col("tokens").sum())
    whole = sum(layer.num_experts for layer in run.layers)
    thin = whole - seen.filter(pl.col("tokens") >= 128).height
    if not thin:
        return []
    return [f"Coverage: {thin} of {whole} experts were used by fewer than 128 tokens of the run; collect more text."]


def _loading(candidate: Candidate) -> list[str]:
    plan, found = candidate.plan, []
    if any(isinstance(step, QuantizeStep) and step.form == "packed" for step in plan.steps):
        found.append(
            "Loading: packed weights are that small on disk; compressor.load unpacks them to the source's type in"
            " memory, and only an engine with kernels for them keeps them small (docs/engines.md)."
        )
    forms = {step.form for step in plan.steps if isinstance(step, (DropStep, MergeStep, SlimStep))}
    if forms & {"per_layer", "shared"}:
        found.append("Loading: layers differ, or share experts, which compressor.load alone reads.")
    return found
