"""The sweep: every rule, contrast, rerouting and search that was asked for, one after the other, kept as they come.

Whatever an earlier sweep of the same model and text has measured is taken from its document instead, so that a sweep
that was interrupted goes on where it was, and another value costs one more reading.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from compressor.routing import Rule
from moescope.errors import InputError
from profiler import evaluate
from profiler.capture.discovery import MoELayer, find_moe_layers
from profiler.metrics.divergence import mean_of_items
from profiler.sweep.clock import Clock, Tell
from profiler.sweep.contrast import Contrast, contrast
from profiler.sweep.estimates import plain
from profiler.sweep.items import Item, items_digest
from profiler.sweep.medians import ratio_medians
from profiler.sweep.rerouting import Rerouting, rerouting, work
from profiler.sweep.search import Search, search
from profiler.sweep.slimmability import slimmability
from profiler.sweep.study import Study
from profiler.sweep.text import Text
from profiler.sweep.trials import ODP, Trial, require_sense

Found = dict[str, Any]
"""The parts of a document: base, rules, slimmability, contrast, rerouting, search."""


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        trials: rules and values.
        plan_rules: of the trial ``plan``, per (layer, step).
        contrast, rerouting, search: None for those that are not asked for.
        items: of the search.
        seed: of what is drawn.
    """

    trials: Sequence[Trial]
    plan_rules: Mapping[tuple[int, int], Rule] | None = None
    contrast: Contrast | None = None
    rerouting: Rerouting | None = None
    search: Search | None = None
    items: Sequence[Item] = field(default=(), repr=False)
    seed: int = 0


@dataclass(frozen=True)
class Shape:
    """What of a model decides what can be tried on it.

    Attributes:
        layers: its MoE layers.
        top_k: the most experts per token that a layer is configured for.
        num_experts: the fewest that a layer chooses from.
        shared: whether a layer has shared experts.
    """

    layers: list[MoELayer] = field(repr=False)
    top_k: int
    num_experts: int
    shared: bool


def shape_of(model: nn.Module) -> Shape:
    """The shape of a model.

    Raises:
        ModelError: no language-model head, or no MoE layers.
    """
    evaluate.vocabulary_of(model)
    layers = find_moe_layers(model)
    return Shape(
        layers=layers,
        top_k=max(layer.top_k for layer in layers),
        num_experts=min(layer.num_experts for layer in layers),
        shared=any(layer.shared is not None and layer.shared.down is not None for layer in layers),
    )


def require(model: nn.Module, text: Text, options: Options) -> Shape:
    """Refuse what cannot be measured, before anything is.

    Raises:
        ModelError: a model without a head, MoE layers, or positions for the text.
        InputError: a value that cannot be tried on it.
    """
    shape = shape_of(model)
    for batch in (*text.judged, *text.calibration):
        evaluate.require_positions(model, batch.input_ids.shape[1])
    require_sense(options.trials, top_k=shape.top_k, num_experts=shape.num_experts, shared=shape.shared)
    if any(trial.value == ODP for trial in options.trials) and not text.calibration:
        raise InputError("--rule ratio=odp: its medians need text of their own; give more text or --calibration 0.2")
    if options.contrast is not None:
        options.contrast.require_sense(shape.num_experts)
    if options.rerouting is not None:
        options.rerouting.require_sense(shape.layers)
    if options.search is not None:
        options.search.require_sense(shape.num_experts)
    return shape


def sweep(
    model: nn.Module,
    text: Text,
    options: Options,
    *,
    known: Mapping[str, Any] | None = None,
    keep: Callable[[Found], None] | None = None,
    tell: Tell | None = None,
) -> Found:
    """Measure what was asked for and is not known.

    Args:
        model: the model; afterwards it is as it was.
        text: what is judged, and what calibrates.
        options: what is measured.
        known: the document of an earlier sweep of the same model on the same text.
        keep: called with all that there is after each part, so that an interrupt loses the part that it falls into.
        tell: told how far it is.

    Returns:
        ``base``, ``rules`` (those known, then the new ones), ``slimmability``, and ``contrast`` (rows per rank),
        ``rerouting``, ``search``: null where they were never asked for.

    Raises: as :func:`require`; RunError where the model puts out NaN or infinity.
    """
    shape = require(model, text, options)
    found: Found = {
        "base": None,
        "rules": list((known or {}).get("rules") or []),
        "slimmability": None,
        "contrast": (known or {}).get("contrast"),
        "rerouting": (known or {}).get("rerouting"),
        "search": (known or {}).get("search"),
    }
    todo = _todo(options, found)
    clock = Clock(_work(text, options, todo), tell)
    study = Study.of(model, text.judged, progress=clock.part("the model as it is"))
    found["base"] = _base(study)
    for trial in todo.trials:
        _try(study, text, options, trial, found, clock)
        found["slimmability"] = _slimmability(study, found)
        _kept(keep, found)
    found["slimmability"] = _slimmability(study, found)
    if options.contrast is not None:
        for rank, betas in todo.ranks:
            row = contrast(
                model, text.judged, rank=rank, betas=betas, alpha=options.contrast.alpha,
                progress=clock.part(f"contrast with rank {rank}"),
            )  # fmt: skip
            found["contrast"] = [*(one for one in found["contrast"] or [] if not _same_rank(one, row)), row]
            _kept(keep, found)
    if options.rerouting is not None and todo.rerouting:
        layers = options.rerouting.require_sense(shape.layers)
        part = rerouting(
            model, layers, text.judged, options.rerouting, seed=options.seed, progress=clock.part("rerouting")
        )
        found["rerouting"] = {"settings": _settings(options.rerouting), **part}
        _kept(keep, found)
    if options.search is not None and todo.search:
        own = _own_k(study)
        part = search(model, options.items, options.search, top_k=own, progress=clock.part("search over k"))
        found["search"] = {"settings": _search_settings(options), **part}
        _kept(keep, found)
    return found


@dataclass(frozen=True)
class _Todo:
    """What is asked for and not known: trials, (rank, strengths) of the contrast, rerouting, search."""

    trials: list[Trial]
    ranks: list[tuple[int, tuple[float, ...]]]
    rerouting: bool
    search: bool


def _todo(options: Options, found: Found) -> _Todo:
    known = {(row["rule"], row["value"], row["weights"]) for row in found["rules"]}
    ranks = []
    if options.contrast is not None:
        for rank in dict.fromkeys(options.contrast.ranks):
            there = {
                part["beta"]
                for row in found["contrast"] or []
                if (row["rank"], row["alpha"]) == (rank, options.contrast.alpha)
                for part in row["betas"]
            }
            if not set(options.contrast.betas) <= there:
                ranks.append((rank, tuple(sorted({*there, *options.contrast.betas}))))
    return _Todo(
        trials=[trial for trial in options.trials if (trial.rule, trial.value, trial.weights) not in known],
        ranks=ranks,
        rerouting=options.rerouting is not None
        and (found["rerouting"] or {}).get("settings") != _settings(options.rerouting),
        search=options.search is not None and (found["search"] or {}).get("settings") != _search_settings(options),
    )


def _work(text: Text, options: Options, todo: _Todo) -> int:
    """Tokens that will be read."""
    total = text.tokens * (1 + len(todo.trials) + 2 * len(todo.ranks))
    total += text.calibration_tokens if any(trial.value == ODP for trial in todo.trials) else 0
    if options.rerouting is not None and todo.rerouting:
        total += work(text.judged, options.rerouting)
    if options.search is not None and todo.search:
        tokens = sum(len(item.prompt) + len(item.answer) for item in options.items)
        total += tokens * (1 + len(set(options.search.counts)))
    return total


def _try(study: Study, text: Text, options: Options, trial: Trial, found: Found, clock: Clock) -> None:
    medians = None
    if trial.value == ODP:
        medians = ratio_medians(study.model, text.calibration, progress=clock.part("medians of ODP"))
    rules = options.plan_rules if trial.rule == "plan" else None
    found["rules"].append(study.trial(trial, medians=medians, rules=rules, progress=clock.part(trial.name)))


def _base(study: Study) -> dict[str, Any]:
    """The model as it is, as plain JSON."""
    table = study.base.sequences
    routing = study.activity.summary(study.flops, study.activity.means())

    def loss(inside: Any) -> dict[str, Any]:
        part = table.filter(inside)
        items = part["predictions"].to_numpy()
        if not items.sum():
            return {"tokens": 0, "loss": None}
        return {
            "tokens": int(items.sum()),
            "loss": plain(mean_of_items(sums=part["loss_sum"].to_numpy(), items=items)),
            "accuracy": plain(mean_of_items(sums=part["right"].to_numpy(), items=items)),
        }

    seconds = max(study.base.seconds, 1e-9)
    return {
        **loss(table["predictions"] >= 0),
        "per_domain": {name: loss(table["domain"] == name) for name in study.domains},
        "routing": routing,
        "flops": [study.flops[key] for key in sorted(study.flops)],
        "sequences": {
            "domain": table["domain"].to_list(),
            "predictions": table["predictions"].to_list(),
            "loss_sums": table["loss_sum"].to_list(),
        },
        "kl": bool(study.base.log_probabilities),
        "tokens_per_second": sum(int(batch.attention_mask.sum()) for batch in study.batches) / seconds,
    }


def _slimmability(study: Study, found: Found) -> dict[str, Any] | None:
    return slimmability(
        found["rules"], predictions=study.base.sequences["predictions"].to_list(), own=float(_own_k(study))
    )


def _own_k(study: Study) -> int:
    """The most experts per token that the router itself gives."""
    return max(counts.shape[1] - 1 for counts in study.activity.counts.values())


def _settings(options: Rerouting) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(options).items()}


def _search_settings(options: Options) -> dict[str, Any]:
    assert options.search is not None
    return {
        "counts": sorted(set(options.search.counts)),
        "temperature": options.search.temperature,
        "items": items_digest(options.items),
    }


def _same_rank(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return (one["rank"], one["alpha"]) == (other["rank"], other["alpha"])


def _kept(keep: Callable[[Found], None] | None, found: Found) -> None:
    if keep is not None:
        keep(found)
