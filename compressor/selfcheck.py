"""Whether a result, loaded, is what its plan says: keys, errors of weights, and logits beside our own reference.

A model whose experts are random, exchanged, or were never quantized loads without an error. Three looks find it: which
keys were missing when it was loaded; the error of every quantized matrix against the source's, which has to be one that
its width makes; and the logits beside those of the source as the plan leaves it in memory (:func:`compressor.edited`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compressor.checkpoint.widths import WidthReport, check_weights
from compressor.memory import edited
from compressor.plan import LayerKey, Plan
from compressor.plan.result import source_after
from compressor.replacement import read_shared, shared_names
from compressor.sites import Decoder, find_decoder
from compressor.weights import ExpertWeights

if TYPE_CHECKING:
    from compressor.edits.moments import LayerMoments

TOKENS = 64
"""Tokens that are enough to see a difference."""

NEAR = 0.05
"""Relative difference of logits up to which a result is the reference: types of weights round, nothing else does."""


FURTHER, SLACK = 1.5, 0.1
"""A result of another backend may move the model so many times as far as the reference does, and so many nats more."""


@dataclass(frozen=True)
class LogitsDifference:
    """Logits of a result beside those of the reference, on the same tokens.

    Attributes:
        tokens: how many.
        largest: of |result - reference|.
        relative: ||result - reference|| / ||reference||.
        kl: KL(reference || result) in nats, mean over tokens.
        moved: KL(source || result).
        meant: KL(source || reference): how far the plan itself moves the model.
    """

    tokens: int
    largest: float
    relative: float
    kl: float
    moved: float
    meant: float


@dataclass(frozen=True)
class SelfCheck:
    """What was found.

    Attributes:
        missing: keys that the result lacks: they would be random.
        unexpected: keys that nothing takes.
        mismatched: keys of another shape.
        weights: errors of all quantized matrices; None where they were not compared.
        logits: beside the reference; None where they were not compared.
        exact: the result has to be the reference, but for rounding; other backends choose other grids.
        not_checked: what was not looked at, and why.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    weights: WidthReport | None = None
    logits: LogitsDifference | None = None
    exact: bool = True
    not_checked: tuple[str, ...] = ()

    @property
    def failure(self) -> str:
        """What is wrong, in one sentence that names the worst; empty where nothing is."""
        for keys, words in ((self.missing, "lacks"), (self.mismatched, "has another shape of")):
            if keys:
                return f"the result {words} {keys[0]}" + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
        if self.weights is not None and not self.weights.passed:
            return self.weights.summary
        if self.logits is not None:
            if not torch.isfinite(torch.tensor([self.logits.relative, self.logits.kl])).all():
                return "the result's logits are no numbers"
            if self.exact and self.logits.relative > NEAR:
                return (
                    f"the result's logits differ from the plan's by {self.logits.relative:.2g} of their size, at most"
                    f" {NEAR:g} is rounding"
                )
            if not self.exact and self.logits.moved > FURTHER * self.logits.meant + SLACK:
                return (
                    f"the result's logits are {self.logits.moved:.2g} nats from the source's, where the plan's widths"
                    f" make {self.logits.meant:.2g}"
                )
        return ""

    @property
    def passed(self) -> bool:
        """Nothing of what was looked at is wrong."""
        return not self.failure

    def content(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {**asdict(self), "failure": self.failure, "passed": self.passed}


def self_check(
    source_model: nn.Module,
    result_model: nn.Module,
    plan: Plan,
    token_ids: Tensor,
    *,
    info: Mapping[str, Sequence[Any]] | None = None,
    moments: Mapping[LayerKey, LayerMoments] | None = None,
    exact: bool = True,
) -> SelfCheck:
    """Hold a loaded result against its source and its plan.

    Args:
        source_model: as the plan's source; edited for as long as the reference runs.
        result_model: with dense weights.
        plan: what was done.
        token_ids: (sequences, tokens), without padding.
        info: what loading the result said (``output_loading_info``); without, keys are not checked.
        moments: second moments, for merges by method ``subspace``.
        exact: the result comes from our own backend, whose grids are those of the reference.

    Raises:
        PlanError, ModelError: the plan is for another model.
    """
    stated = info or {}
    keys = {name: _names(stated.get(f"{name}_keys") or ()) for name in ("missing", "unexpected", "mismatched")}
    return SelfCheck(
        **keys,
        weights=weights_of_models(source_model, result_model, plan, moments=moments, published=not exact),
        logits=reference_difference(source_model, logits_of(result_model, token_ids), plan, token_ids, moments=moments),
        exact=exact,
        not_checked=() if info is not None else ("keys: loading said nothing of them",),
    )


def weights_of_models(
    source_model: nn.Module,
    result_model: nn.Module,
    plan: Plan,
    *,
    moments: Mapping[LayerKey, LayerMoments] | None = None,
    published: bool = False,
) -> WidthReport:
    """Errors of the quantized matrices of a loaded result; see :func:`compressor.checkpoint.widths.check_weights`."""
    before = find_decoder(source_model, plan.source)
    after = find_decoder(result_model, source_after(plan))
    return check_weights(
        plan,
        lambda layer, expert: before.sites[layer, 0].read(expert),
        lambda layer, expert: after.sites[layer, 0].read(expert),
        source_shared=lambda layer: _shared(before, layer),
        result_shared=lambda layer: _shared(after, layer),
        published=published,
        moments=moments,
    )


@torch.no_grad()
def logits_of(model: nn.Module, token_ids: Tensor) -> Tensor:
    """(sequences, tokens, vocabulary) float32 on the CPU."""
    device = next(model.parameters()).device
    logits: Tensor = model(token_ids.to(device)).logits
    return logits.float().cpu()


def reference_difference(
    source_model: nn.Module,
    logits: Tensor,
    plan: Plan,
    token_ids: Tensor,
    *,
    moments: Mapping[LayerKey, LayerMoments] | None = None,
) -> LogitsDifference:
    """Logits of a result beside those of the source as the plan leaves it, edited in memory."""
    source = logits_of(source_model, token_ids)
    with edited(source_model, plan, moments=moments):
        reference = logits_of(source_model, token_ids)
    return difference(source, reference, logits)


def difference(source: Tensor, reference: Tensor, found: Tensor) -> LogitsDifference:
    """Of three tensors of logits, (..., vocabulary)."""
    source, reference, found = (logits.double().flatten(0, -2) for logits in (source, reference, found))
    return LogitsDifference(
        tokens=len(reference),
        largest=float((found - reference).abs().max()),
        relative=float((found - reference).norm() / reference.norm().clamp_min(1e-30)),
        kl=_divergence(reference, found),
        moved=_divergence(source, found),
        meant=_divergence(source, reference),
    )


def _divergence(one: Tensor, two: Tensor) -> float:
    first, second = one.log_softmax(-1), two.log_softmax(-1)
    return float((first.exp() * (first - second)).sum(-1).mean())


def _shared(decoder: Decoder, layer: int) -> ExpertWeights:
    site = decoder.sites[layer, 0]
    assert site.shared is not None
    return read_shared(site.shared.module, shared_names(site))


def _names(keys: Sequence[Any]) -> tuple[str, ...]:
    return tuple(sorted(str(key[0] if isinstance(key, (tuple, list)) else key) for key in keys))
