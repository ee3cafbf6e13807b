"""A model and a text under study: read once as it is, then once for every rule, each as one row of plain JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compressor.routing import (
    MaskTop,
    NullExperts,
    Odp,
    Ratio,
    Rule,
    Threshold,
    TopK,
    TopP,
    rerouted,
)
from moescope.errors import InputError, ModelError
from profiler import evaluate
from profiler.ablation.experts import Expert
from profiler.ablation.switch import switched_off
from profiler.capture.discovery import MoELayer, find_moe_layers
from profiler.corpus import TokenBatch
from profiler.sweep.activity import Activity, Key
from profiler.sweep.difficulty import difficulty
from profiler.sweep.estimates import compared
from profiler.sweep.reading import MOST_BYTES, Progress, Reading, fits, read
from profiler.sweep.trials import ODP, SKIPPING, Trial, Weights

Rules = Rule | Mapping[Key, Rule]

_OF_A_NUMBER: dict[str, Callable[[float, Weights], Rule]] = {
    "top_p": TopP,
    "ratio": Ratio,
    "threshold": Threshold,
    "null_experts": NullExperts,
}

KEEPS_ALL = Ratio(0.0, "kept")
"""The rule under which every choice stands, by which the model as it is is watched."""


@dataclass(frozen=True)
class Study:
    """A model as it is on a text, beside which rules are measured.

    Attributes:
        model: the model; rules are put before its experts and taken away again.
        layers: its MoE layers.
        batches: the judged text.
        base: the reading of it by the model as it is.
        activity: the router's own choices in that reading.
        flops: of one routed expert of each layer on one token: two per parameter.
    """

    model: nn.Module = field(repr=False)
    layers: list[MoELayer] = field(repr=False)
    batches: list[TokenBatch] = field(repr=False)
    base: Reading = field(repr=False)
    activity: Activity = field(repr=False)
    flops: dict[Key, float] = field(repr=False)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        batches: Sequence[TokenBatch],
        *,
        most_bytes: int = MOST_BYTES,
        progress: Progress | None = None,
    ) -> Study:
        """Read the text once with the model as it is.

        Args:
            model: a model with a language-model head and MoE layers.
            batches: the text that is judged.
            most_bytes: of the base's log-probabilities; beyond that no row has a KL divergence.
            progress: told after each batch how many tokens it had.

        Raises:
            ModelError: it has no head, no MoE layers, or fewer positions than a sequence has tokens.
            RunError: it puts out NaN or infinity.
        """
        evaluate.vocabulary_of(model)
        layers = find_moe_layers(model)
        held = list(batches)
        evaluate.require_positions(model, max(batch.input_ids.shape[1] for batch in held))
        keep = fits(model, held, most_bytes)
        base, activity = _watched(model, held, KEEPS_ALL, keep=keep, progress=progress)
        missing = [layer.name for layer in layers if layer.key not in activity.counts]
        if missing:
            raise ModelError(f"{missing[0]} was not called with the router's choice: no rule can be put before it")
        flops = {layer.key: 2.0 * _parameters(layer) for layer in layers if layer.key in activity.counts}
        return cls(model, layers, held, base, activity, flops)

    @property
    def domains(self) -> list[str]:
        """Of the judged text."""
        return list(self.activity.domains)

    def trial(
        self,
        trial: Trial,
        *,
        medians: Mapping[Key, float] | None = None,
        rules: Rules | None = None,
        progress: Progress | None = None,
    ) -> dict[str, Any]:
        """Read the text once under a rule, and say what came of it.

        Args:
            trial: the rule and its value.
            medians: of second over first gate weight, per layer, for ODP: see :mod:`profiler.sweep.medians`.
            rules: of a plan, for trials of it.
            progress: told after each batch how many tokens it had.

        Returns:
            ``rule``, ``value``, ``weights``; ``loss``, ``change`` (nats per token, paired), ``kl``, ``agreement``,
            ``accuracy`` and ``base_accuracy`` with intervals, over all text and ``per_domain``; ``routing`` (see
            :meth:`Activity.summary`); ``difficulty`` for rules under which tokens differ in their number of experts;
            ``loss_sums`` per sequence in the base's order; ``medians`` of ODP; ``tokens_per_second``.
        """
        each = trial.rule in SKIPPING
        with ExitStack() as stack:
            stack.enter_context(self._shared_off(trial))
            rule = rules if rules is not None else self.rule_of(trial, medians)
            found, activity = _watched(self.model, self.batches, rule, base=self.base, each=each, progress=progress)
        return {
            "rule": trial.rule,
            "value": trial.value,
            "weights": trial.weights,
            "medians": [float(medians[key]) for key in sorted(self.flops)]
            if medians is not None and trial.value == ODP
            else None,
            **compared(self.base.sequences, found.sequences),
            "routing": activity.summary(self.flops, self.activity.means()),
            "difficulty": self._difficulty(activity) if each else None,
            "loss_sums": found.sequences["loss_sum"].to_list(),
            "tokens_per_second": _tokens(self.batches) / max(found.seconds, 1e-9),
        }

    def rule_of(self, trial: Trial, medians: Mapping[Key, float] | None = None) -> Rules:
        """The rule that a trial puts before the experts.

        Raises:
            InputError: ODP without text for its medians.
        """
        value, weights = trial.value, trial.weights
        if value == ODP:
            if medians is None:
                raise InputError("--rule ratio=odp: its medians need text of their own; give --calibration 0.2")
            return {key: Odp(median, weights) for key, median in medians.items()}
        if trial.rule == "shared":
            if value == "off":
                return KEEPS_ALL
            return {layer.key: TopK(self._experts(layer.key) + 1, weights) for layer in self._with_shared()}
        number = float(value)
        if trial.rule == "mask_top":
            return MaskTop(number)
        return TopK(int(number), weights) if trial.rule == "top_k" else _OF_A_NUMBER[trial.rule](number, weights)

    def _shared_off(self, trial: Trial) -> AbstractContextManager[None]:
        if trial.rule != "shared":
            return nullcontext()
        off = [Expert(layer.layer, layer.step, "shared") for layer in self._with_shared()]
        return switched_off(self.layers, off)

    def _with_shared(self) -> list[MoELayer]:
        return [layer for layer in self.layers if layer.shared is not None]

    def _experts(self, key: Key) -> int:
        """Experts per token that the router of a layer gives, the most."""
        return self.activity.counts[key].shape[1] - 1

    def _difficulty(self, activity: Activity) -> dict[str, Any]:
        losses, sequence, domain = self.tokens()
        active = {key: activity.numbers(key) for key in activity.tokens}
        return difficulty(losses=losses, active=active, sequence=sequence, domain=domain, domains=self.domains)

    def tokens(self) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
        """(tokens,) loss as the model is, sequence, and index of the domain, of every predicted token."""
        parts = zip(self.base.losses, self.base.counted, self.batches, strict=True)
        losses, sequences, domains = [], [], []
        for values, counted, batch in parts:
            losses.append(values[counted].double().numpy())
            row = counted.nonzero()[:, 0].numpy()
            sequences.append(batch.sequences[row])
            domains.append(_domain_ids(batch, self.domains)[row])
        return np.concatenate(losses), np.concatenate(sequences), np.concatenate(domains)


def _watched(
    model: nn.Module,
    batches: Sequence[TokenBatch],
    rules: Rules,
    *,
    base: Reading | None = None,
    keep: bool = False,
    each: bool = False,
    progress: Progress | None = None,
) -> tuple[Reading, Activity]:
    """One reading under rules, and what they did at the positions that predict."""
    activity = Activity(list(dict.fromkeys(domain for batch in batches for domain in batch.domains)))
    with rerouted(model, rules) as routing:

        def see(number: int, counted: Tensor) -> None:
            batch = batches[number]
            place = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
            place[:, :-1] = counted
            chosen = place.flatten()
            domain = _domain_ids(batch, activity.domains)[counted.nonzero()[:, 0].numpy()]
            for key, taken in routing.take().items():
                if len(taken.active) != len(chosen):
                    raise ModelError(
                        f"layer {key[0]} has routed {len(taken.active)} rows for {len(chosen)} tokens: they cannot be"
                        " told apart"
                    )
                activity.add(
                    key,
                    active=taken.active.cpu()[chosen].numpy(),
                    kept=taken.kept.cpu()[chosen].double().numpy(),
                    changed=taken.changed.cpu()[chosen].numpy(),
                    domain=domain,
                    each=each,
                )

        reading = read(model, batches, base=base, keep=keep, see=see, progress=progress)
    return reading, activity


def _domain_ids(batch: TokenBatch, domains: Sequence[str]) -> NDArray[np.int64]:
    """(sequences,) of a batch."""
    return np.array([domains.index(name) for name in batch.domains], dtype=np.int64)


def _parameters(layer: MoELayer) -> float:
    """Of one routed expert with weights."""
    count = layer.layout.num_weighted if layer.layout is not None else layer.num_experts
    return sum(parameter.numel() for parameter in layer.experts.parameters()) / max(1, count)


def _tokens(batches: Sequence[TokenBatch]) -> int:
    return sum(int(batch.attention_mask.sum()) for batch in batches)
