"""What an evaluation says: the verdict in one sentence, and the document that is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from profiler.evaluate import Perplexity
from profiler.evaluation.compare import Evaluation
from profiler.evaluation.distribution import Divergence
from profiler.evaluation.generation import Generations, Measure
from profiler.evaluation.probes import TITLES, Probe
from profiler.evaluation.routing import Routing
from profiler.evaluation.speed import Speed
from profiler.metrics.flips import Flips
from profiler.metrics.perplexity import Estimate
from store.evaluations import VERSION, Document, number_or_none


def document(
    evaluation: Evaluation,
    *,
    model: Mapping[str, Any],
    base: Mapping[str, Any],
    data: Mapping[str, Any],
    plan: str | None = None,
    held_out: bool = True,
) -> Document:
    """The evaluation as a JSON document of kind ``evaluation``; what does not exist is null.

    Args:
        evaluation: what was measured.
        model: what names the model, such as its name and fingerprint.
        base: the same of what it was compared with.
        data: what describes the text.
        plan: digest of the plan that made the model.
        held_out: False where the text is the one that the plan was made from.
    """
    one = evaluation
    return {
        "kind": "evaluation",
        "version": VERSION,
        "model": dict(model),
        "base": dict(base),
        "data": dict(data),
        "plan": plan,
        "held_out": held_out,
        "divergence": _divergence(one.divergence),
        "perplexity": {
            "model": _perplexity(one.perplexity),
            "base": _perplexity(one.base_perplexity),
            "ratio": _estimate(one.divergence.ratio),
        },
        "routing": None if one.routing is None else _routing(one.routing),
        "generation": None if one.generation is None else _generation(one.generation),
        "probes": [_probe(found) for found in one.probes],
        "size": {"model": one.size.as_dict(), "base": one.base_size.as_dict()},
        "speed": {phase: _speed(found) for phase, found in one.speed.items()} or None,
        "lm_eval": one.harness,
        "notes": list(one.notes),
        "verdict": verdict(one, held_out=held_out),
    }


def verdict(evaluation: Evaluation, *, held_out: bool = True) -> str:
    """One sentence: what is lost, where most, and whether the text could say so."""
    found = evaluation.divergence
    if found.kl == 0:
        sentence = f"No difference: both models predict the same on {found.tokens:,} tokens."
    else:
        share = 100 * found.agreement.value
        sentence = (
            f"{_loss(found.ratio)}: KL {_text(found)} nats per token; the likeliest token is the same for {share:.1f} %"
            f"{_worst(found)}{_worst_probe(evaluation.probes)}."
        )
    return sentence if held_out else f"Not on held-out text, so the damage is understated: {sentence}"


def _loss(ratio: Estimate) -> str:
    change = f"x{ratio.value:.3g}{_ends(ratio, brackets=False)}"
    if math.isnan(ratio.low) or ratio.low <= 1.0 <= ratio.high:
        return f"Perplexity shows no clear change ({change}), but the predictions have moved"
    return f"Perplexity has {'risen' if ratio.value > 1 else 'fallen'} ({change})"


def _worst(found: Divergence) -> str:
    if len(found.per_domain) < 2:
        return ""
    domain, part = max(found.per_domain.items(), key=lambda item: item[1].kl)
    return f"; most is lost in {domain} (KL {part.kl:.3g}, perplexity x{part.ratio.value:.3g})"


def _worst_probe(probes: list[Probe]) -> str:
    """The probe that fell most, where its interval is below 0."""
    fallen = [one for one in probes if one.enough and one.difference.high < 0]
    if not fallen:
        return ""
    worst = min(fallen, key=lambda one: one.difference.value)
    return (
        f"; of the probes {worst.name} has lost most ({100 * worst.base_accuracy.value:.0f} % right before,"
        f" {100 * worst.accuracy.value:.0f} % now)"
    )


def _text(found: Divergence) -> str:
    return f"{found.kl:.3g}{_ends(found)}"


def _ends(found: Estimate | Divergence, *, brackets: bool = True) -> str:
    if math.isnan(found.low):
        return ""
    ends = f"95 % interval {found.low:.3g} to {found.high:.3g}"
    return f" ({ends})" if brackets else f", {ends}"


def _divergence(found: Divergence, *, domains: bool = True) -> Document:
    result: Document = {
        "kl": {"value": found.kl, "low": number_or_none(found.low), "high": number_or_none(found.high)},
        "agreement": _estimate(found.agreement),
        "ratio": _estimate(found.ratio),
        "tokens": found.tokens,
        "sequences": len(found.sequences),
    }
    if domains:
        result["per_domain"] = {name: _divergence(part, domains=False) for name, part in found.per_domain.items()}
    return result


def _perplexity(found: Perplexity) -> Document:
    parts = {name: _estimate(part) for name, part in found.per_domain.items() if part.tokens}
    return {**_estimate(found), "tokens": found.tokens, "per_domain": parts}


def _routing(found: Routing) -> Document:
    layers = [
        {"layer": key[0], "step": key[1], **_flips(part), "kl": _known(found.divergence.get(key))}
        for key, part in found.layers.items()
    ]
    return {
        "whole": _flips(found.whole),
        "layers": layers,
        "per_domain": {name: _flips(part) for name, part in found.domains.items()},
        "dropped_layers": found.dropped,
    }


def _known(found: Estimate | None) -> Document | None:
    return None if found is None else _estimate(found)


def _flips(found: Flips) -> Document:
    return dict(_plain(found))


def _generation(found: Generations, *, domains: bool = True) -> Document:
    result: Document = {
        "prompts": found.prompts,
        "common": _estimate(found.common),
        "identical": _estimate(found.identical),
        "measures": {name: _measure(part) for name, part in found.measures.items()},
    }
    if domains:
        result["per_domain"] = {name: _generation(part, domains=False) for name, part in found.per_domain.items()}
    return result


def _measure(found: Measure) -> Document:
    return {name: _estimate(getattr(found, name)) for name in ("model", "base", "difference")}


def _probe(found: Probe, *, domains: bool = True) -> Document:
    result: Document = {
        "name": found.name,
        "asks": TITLES[found.name],
        "items": found.items,
        "enough": found.enough,
        **{name: _estimate(getattr(found, name)) for name in ("accuracy", "base_accuracy", "difference")},
    }
    if domains:
        result["per_domain"] = {name: _probe(part, domains=False) for name, part in found.per_domain.items()}
    return result


def _speed(found: Speed) -> Document:
    return dict(_plain(found))


def _estimate(found: Estimate | Perplexity) -> Document:
    return {name: number_or_none(getattr(found, name)) for name in ("value", "low", "high")}


def _plain(value: Any) -> Any:
    """A flat dataclass as JSON values, intervals included."""
    if is_dataclass(value):
        return {one.name: _plain(getattr(value, one.name)) for one in fields(value)}
    return number_or_none(value) if isinstance(value, float) else value
