"""Additive rerouting: a vector per layer on the router's logits, fitted on a text so far, judged by what follows.

Each sequence stands for itself: the vectors are fitted on its beginning by gradient descent on its own loss, and again
at intervals on all text up to there; what counts is the loss of the tokens behind, which no fit has seen. Beside it:
no vector, vectors of the same norm in random directions, and the vectors that were fitted on another sequence.
Layers, steps and learning rate are ours: those of the publication were not verified.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressor.routing import Bias, rerouted
from moescope.errors import CorpusError, InputError, ModelError
from profiler.capture.discovery import MoELayer
from profiler.corpus import TokenBatch
from profiler.metrics.divergence import mean_of_items
from profiler.running import evaluating, input_device
from profiler.sweep.estimates import plain
from profiler.sweep.reading import Progress

Key = tuple[int, int]
Vectors = dict[Key, Tensor]
"""Per layer what is added to the logits, (E,) float32."""

FLOOR = 1e-6
"""Gradients below it hardly move a vector: Adam would make whole steps of the rounding that experts get which no token
uses."""

CONDITIONS = ("none", "fitted", "random", "other")


@dataclass(frozen=True)
class Rerouting:
    """What is tried.

    Attributes:
        layers: decoder layers with a vector; empty for all MoE layers.
        steps: of Adam, at each fit.
        rate: its learning rate, logits per step at first.
        prompt: part of each sequence on which the first vectors are fitted.
        interval: tokens after which they are fitted again on all text so far.
        sequences: at most so many, spread over the domains.
    """

    layers: tuple[int, ...] = ()
    steps: int = 5
    rate: float = 0.05
    prompt: float = 0.5
    interval: int = 64
    sequences: int = 16

    def require_sense(self, layers: Sequence[MoELayer]) -> list[MoELayer]:
        """The layers that get a vector.

        Raises:
            InputError: a value that cannot be tried.
            ModelError: a layer that the model lacks.
        """
        if not 0 < self.prompt < 1:
            raise InputError(f"--rerouting-prompt {self.prompt:g}: give a part of each sequence, such as 0.5")
        if not self.rate > 0:
            raise InputError(f"--rerouting-rate {self.rate:g}: give a learning rate above 0, such as 0.05")
        known = {layer.layer for layer in layers}
        missing = [layer for layer in self.layers if layer not in known]
        if missing:
            raise ModelError(
                f"--rerouting-layers {missing[0]}: the model has no MoE layer {missing[0]}; it has"
                f" {', '.join(map(str, sorted(known)))}"
            )
        return [layer for layer in layers if not self.layers or layer.layer in self.layers]


@dataclass(frozen=True)
class _Piece:
    """One sequence: its domain, its tokens (length,), and where each fit ends."""

    domain: str
    ids: Tensor
    ends: list[int]


def rerouting(
    model: nn.Module,
    layers: Sequence[MoELayer],
    batches: Sequence[TokenBatch],
    options: Rerouting,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fit and judge, sequence by sequence; see the module.

    Args:
        model: the model; its weights stay as they are and get no gradients.
        layers: those that get a vector.
        batches: the judged text.
        options: what is tried.
        seed: of the random vectors.
        progress: told how many tokens were read, a gradient counting as two more readings.

    Returns:
        ``sequences``, ``fits``, ``tokens`` judged; per condition of :data:`CONDITIONS` its ``loss`` (nats per token)
        and for all but ``none`` the ``change`` against none, paired over sequences; ``against_random`` and
        ``against_other``: the fitted vectors' loss less theirs, paired; ``fit``: the prompt's ``before`` and ``after``
        loss; ``norm``: mean length of a layer's vector; the same ``per_domain``.

    Raises:
        CorpusError: no sequence is long enough to have a beginning and an end.
        ModelError: a layer's gate cannot be rerouted.
    """
    pieces = _pieces(model, batches, options)
    tell = progress or (lambda tokens: None)
    keys = [layer.key for layer in layers]
    sizes = {layer.key: layer.num_experts for layer in layers}
    generator = torch.Generator().manual_seed(seed)
    found: list[list[Vectors]] = []
    fits: list[tuple[float, float, int]] = []
    with evaluating(model), _frozen(model):
        for piece in pieces:
            vectors = {key: torch.zeros(sizes[key], device=piece.ids.device) for key in keys}
            found.append([])
            for number, end in enumerate(piece.ends):
                vectors, before, after = _fit(model, piece.ids[:end], vectors, options)
                found[-1].append(vectors)
                tell(3 * options.steps * end)
                if not number:
                    fits.append((before, after, end - 1))
        rows = [
            _judged(model, piece, found[number], _others(pieces, found, number), options, generator, tell)
            for number, piece in enumerate(pieces)
        ]
    domains = [piece.domain for piece in pieces]
    sums = np.array([[row[name] for name in CONDITIONS] for row in rows])
    tokens = np.array([row["tokens"] for row in rows])
    return {
        "sequences": len(pieces),
        "fits": sum(len(piece.ends) for piece in pieces),
        "fit": _fit_summary(fits),
        "norm": float(np.mean([float(one.norm()) for each in found for vectors in each for one in vectors.values()])),
        **_summary(sums, tokens),
        "per_domain": {
            name: _summary(sums[inside], tokens[inside])
            for name in dict.fromkeys(domains)
            for inside in (np.array([domain == name for domain in domains]),)
        },
    }


def work(batches: Sequence[TokenBatch], options: Rerouting) -> int:
    """Tokens that are read in all, a gradient counting as two more readings; for an estimate of the time."""
    total = 0
    for length in _lengths(batches, options):
        ends = _ends(length, options)
        total += length + sum(3 * options.steps * end for end in ends) + sum(3 * stop for stop in (*ends[1:], length))
    return total


def _fit(model: nn.Module, ids: Tensor, start: Vectors, options: Rerouting) -> tuple[Vectors, float, float]:
    """Vectors after some steps from ``start`` on the loss of a text (length,), and that loss before and after."""
    vectors = {key: one.clone().requires_grad_() for key, one in start.items()}
    descent = torch.optim.Adam(vectors.values(), lr=options.rate, eps=FLOOR)
    losses = []
    for _ in range(options.steps):
        descent.zero_grad()
        with torch.enable_grad(), rerouted(model, {key: Bias(one) for key, one in vectors.items()}):
            loss = _losses(model, ids).mean()
            loss.backward()
        losses.append(float(loss.detach()))
        descent.step()
    if any(one.grad is None for one in vectors.values()):
        raise ModelError("the loss has no gradient for the router of a layer: rerouting cannot be fitted to this model")
    fitted = {key: one.detach() for key, one in vectors.items()}
    with torch.no_grad(), rerouted(model, {key: Bias(one) for key, one in fitted.items()}):
        losses.append(float(_losses(model, ids).mean()))
    return fitted, losses[0], losses[-1]


def _judged(
    model: nn.Module,
    piece: _Piece,
    fitted: list[Vectors],
    others: list[Vectors],
    options: Rerouting,
    generator: torch.Generator,
    tell: Progress,
) -> dict[str, float]:
    """Sums of the loss behind each fit up to the next, per condition, and how many tokens that are."""
    sums = dict.fromkeys(CONDITIONS, 0.0)
    with torch.no_grad():
        plainly = _losses(model, piece.ids)
        tell(len(piece.ids))
        for number, end in enumerate(piece.ends):
            # Loss t is of token t + 1: the first token behind the fit is predicted at its last position.
            stop = piece.ends[number + 1] if number + 1 < len(piece.ends) else len(piece.ids)
            part = slice(end - 1, stop - 1)
            sums["none"] += float(plainly[part].sum(dtype=torch.float64))
            random = {key: _same_length(one, generator) for key, one in fitted[number].items()}
            other = others[min(number, len(others) - 1)]
            for name, vectors in (("fitted", fitted[number]), ("random", random), ("other", other)):
                with rerouted(model, {key: Bias(one) for key, one in vectors.items()}):
                    losses = _losses(model, piece.ids[:stop])
                sums[name] += float(losses[part].sum(dtype=torch.float64))
                tell(stop)
    return {**sums, "tokens": float(len(piece.ids) - piece.ends[0])}


def _losses(model: Any, ids: Tensor) -> Tensor:
    """(length - 1,) losses of one text (length,), with a gradient where one is asked for."""
    logits = model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], use_cache=False).logits[0, :-1]
    return nn.functional.cross_entropy(logits.float(), ids[1:].to(logits.device), reduction="none")


def _same_length(one: Tensor, generator: torch.Generator) -> Tensor:
    """A vector as long, in a direction drawn at random."""
    drawn = torch.randn(one.shape, generator=generator).to(one)
    return drawn * (one.norm() / drawn.norm().clamp(min=1e-12))


def _others(pieces: list[_Piece], found: list[list[Vectors]], number: int) -> list[Vectors]:
    """The vectors of the next sequence of the same domain; where there is none, of the next of all."""
    order = [*range(number + 1, len(pieces)), *range(number)]
    same = [other for other in order if pieces[other].domain == pieces[number].domain]
    return found[(same or order)[0]]


def _pieces(model: nn.Module, batches: Sequence[TokenBatch], options: Rerouting) -> list[_Piece]:
    device = input_device(model)
    chosen = _chosen(batches, options)
    if len(chosen) < 2:
        raise CorpusError(
            "--rerouting takes two sequences at least that are long enough for a beginning and an end: give more text"
        )
    return [
        _Piece(domain, torch.from_numpy(ids).to(device), _ends(len(ids), options)) for domain, ids in chosen
    ]  # fmt: skip


def _chosen(batches: Sequence[TokenBatch], options: Rerouting) -> list[tuple[str, Any]]:
    """The first sequences of each domain in turn, at most as many as asked for."""
    queues: dict[str, list[tuple[int, Any]]] = {}
    for batch in batches:
        for row, domain in enumerate(batch.domains):
            ids = batch.input_ids[row, batch.attention_mask[row] == 1]
            if _ends(len(ids), options):
                queues.setdefault(domain, []).append((int(batch.sequences[row]), ids))
    ordered = [[(domain, ids) for _, ids in sorted(queue, key=lambda one: one[0])] for domain, queue in queues.items()]
    longest = max(map(len, ordered), default=0)
    return [queue[turn] for turn in range(longest) for queue in ordered if turn < len(queue)][: options.sequences]


def _lengths(batches: Sequence[TokenBatch], options: Rerouting) -> list[int]:
    return [len(ids) for _, ids in _chosen(batches, options)]


def _ends(length: int, options: Rerouting) -> list[int]:
    """Where the fits end: after the prompt, and every interval behind it; none where nothing would follow."""
    first = max(2, int(length * options.prompt))
    return list(range(first, length, options.interval))


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """While entered, no weight of the model takes a gradient."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)


def _fit_summary(fits: list[tuple[float, float, int]]) -> dict[str, Any]:
    before, after, items = (np.array(column, dtype=np.float64) for column in zip(*fits, strict=True))
    return {
        "before": plain(mean_of_items(sums=before * items, items=items)),
        "after": plain(mean_of_items(sums=after * items, items=items)),
    }


def _summary(sums: Any, tokens: Any) -> dict[str, Any]:
    """Of sums (sequences, conditions) over ``tokens`` (sequences,)."""
    none, fitted, random, other = sums.T

    def mean(values: Any) -> dict[str, float | None]:
        return plain(mean_of_items(sums=values, items=tokens))

    return {
        "tokens": int(tokens.sum()),
        "conditions": {
            name: {"loss": mean(values), "change": None if name == "none" else mean(values - none)}
            for name, values in zip(CONDITIONS, sums.T, strict=True)
        },
        "against_random": mean(fitted - random),
        "against_other": mean(fitted - other),
    }
