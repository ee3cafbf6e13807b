"""How alike the experts of a layer answer the same tokens: table ``expert_similarity``.

All experts run on a sample of the tokens, routed to them or not, on the input that the layer really had. Per pair of
experts the sums of the cosine (Sub-MoE) and of the scalar product of both outputs (the Gram matrix behind kernel
k-means and linear kernels), per expert the sum of its outputs (HC-SMoE). Tokens outside the sample cost nothing: one
token of 16 costs as much as the model's own experts where E / k is 16.

For CKA, which asks whether two experts tell the same tokens apart, sampled tokens are compared in groups: those of one
forward, cut into parts of at most ``GROUP_TOKENS``. HSIC is summed over groups before the ratio is taken (Nguyen et al.
2020), each group with the weight of its tokens. A forward with fewer than ``LEAST_TOKENS`` sampled ones (decoding)
leaves them for the next forward of the same domain and phase; what is left at the end of a batch of a corpus, or when a
shard is written, is in no group.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import polars as pl
import torch
from torch import Tensor

from profiler.capture.batch import BlockBatch, LayerKey, Tokens
from profiler.capture.check_rows import CheckRow
from profiler.capture.discovery import MoELayer
from profiler.capture.hooks import Hooks
from profiler.capture.tap import ExpertsCall, TappedRows
from profiler.recorders.base import double_lists, token_parts
from profiler.recorders.pairs import MAX_EXPERTS
from profiler.recorders.staged import Staged
from profiler.recorders.weight_similarity import WeightSimilarityRecorder

if TYPE_CHECKING:
    from profiler.capture.observer import Observer

MAX_VALUES = 1 << 25
"""Outputs of all experts that are in memory at once; more tokens than fit are taken in turns."""

GROUP_TOKENS, LEAST_TOKENS = 256, 8
"""Tokens of one group at most and at least. Groups are smaller where outputs are wide (DeepSeek-V3: 18 tokens), at
least 16 before they are cut evenly, so that no part falls below the least."""

SimilarityKey = tuple[LayerKey, str, str]
"""((layer, step), domain, phase); the domain is empty where vectors are pooled."""

_MIX = (-7046029254386353131, -4417276706812531889, -7723592293110705685)
"""Odd 64-bit constants (of splitmix64 and xxHash), as signed numbers."""


def in_sample(sequence: Tensor, position: Tensor, every: int) -> Tensor:
    """(tokens,) bool: whether a token is in the sample, by a hash of its sequence and position.

    So the same text gives the same sample however it is cut into batches and shards.
    """
    mixed = (sequence + 1) * _MIX[0] + (position + 1) * _MIX[1]
    for shift in (29, 32):
        mixed = (mixed ^ (mixed >> shift)) * _MIX[2]
    return (mixed >> 33 & 0x3FFFFFFF) % every == 0


@dataclass
class _State:
    """Tokens, and the sums over them: outputs (experts, width), all others (experts, experts).

    HSIC is summed over groups, each times its tokens.
    """

    tokens: int
    outputs: Tensor
    cosines: Tensor
    products: Tensor
    groups: int
    group_tokens: int
    hsic: Tensor
    unbiased_hsic: Tensor

    def __add__(self, other: _State) -> _State:
        mine, others = vars(self), vars(other)
        return _State(**{name: mine[name] + others[name] for name in mine})


class SimilarityRecorder(Staged):
    """Runs all experts on sampled tokens, in the type of their weights, and sums in float64.

    Layers with more than ``MAX_EXPERTS`` experts are left out, as in ``expert_pair``.

    Args:
        every: one token of so many is in the sample.
        by_domain: keep domains apart.
    """

    needs_rows = False

    def __init__(self, every: int = 16, by_domain: bool = False) -> None:
        super().__init__()
        self._every, self._by_domain = every, by_domain
        self._observer: Observer | None = None
        self._sample: tuple[Tokens, Tensor] | None = None
        self._states: dict[SimilarityKey, _State] = {}
        self._left: dict[SimilarityKey, Tensor] = {}
        self._weights = WeightSimilarityRecorder()

    def attach(self, observer: Observer, hooks: Hooks, stack: ExitStack) -> None:
        """Remember whose forwards these are."""
        self._observer = observer

    def saw_experts(
        self, layer: MoELayer, call: ExpertsCall, rows: TappedRows | None, block: BlockBatch | None
    ) -> None:
        """Run all experts of the layer on the sampled tokens of the forward."""
        frame = self._observer.frame if self._observer is not None else None
        tokens = frame.tokens_of(layer, len(call.ids)) if frame is not None else None
        if tokens is None or layer.layout is None or layer.num_experts > MAX_EXPERTS:
            return
        self._weights.update(layer)
        device = call.hidden.device
        sample = self._places(tokens).to(device)
        if not len(sample):
            return
        place = sample if tokens.keep is None else tokens.keep.to(device)[sample]
        inputs = call.hidden.detach()[place]
        for domain, phase, chosen in token_parts(tokens, device, by_domain=self._by_domain):
            part = inputs if chosen is None else inputs[chosen[sample]]
            if len(part):
                self._compare(layer, call, (layer.key, domain, phase), part)

    def _compare(self, layer: MoELayer, call: ExpertsCall, key: SimilarityKey, inputs: Tensor) -> None:
        """Run the experts on the inputs of one domain and phase; few of them wait for those that come after."""
        # Taken out at once: a forward that fails loses them, and none is counted twice.
        earlier = self._left.pop(key, inputs[:0])
        joined = torch.cat([earlier, inputs])
        state = _compare(layer, call, joined, already=len(earlier))
        if len(joined) < LEAST_TOKENS:
            self.later(lambda: self._left.update({key: joined}))
        self.later(lambda: self._add(key, state))

    def _places(self, tokens: Tokens) -> Tensor:
        """(sampled,) indices into the tokens of the forward; worked out once for all layers."""
        if self._sample is None or self._sample[0] is not tokens:
            chosen = in_sample(tokens.sequence, tokens.position, self._every)
            self._sample = (tokens, chosen.nonzero()[:, 0])
        return self._sample[1]

    def _add(self, key: SimilarityKey, state: _State) -> None:
        self._states[key] = self._states[key] + state if key in self._states else state

    def commit(self) -> None:
        """The forward has ended well."""
        super().commit()
        self._sample = None

    def end_batch(self) -> None:
        """What comes is other text: groups do not go on with it."""
        self._left.clear()

    def begin_part(self, of_model: bool) -> None:
        """See :meth:`~profiler.recorders.staged.Staged.begin_part`."""
        self._weights.wanted = of_model

    def checks(self) -> list[CheckRow]:
        """Which layers' weights could not be compared, or not in all pairs."""
        return self._weights.checks()

    def drain(self) -> dict[str, pl.DataFrame]:
        """Table ``expert_similarity``, one row per expert, and ``expert_weight_similarity`` of layers seen first."""
        states, self._states = self._states, {}
        self._left.clear()
        frames = []
        for ((layer, step), domain, phase), state in states.items():
            frame = pl.DataFrame(
                {
                    "expert": range(len(state.cosines)),
                    "output_sum": double_lists(state.outputs),
                    "cosine_sum": double_lists(state.cosines),
                    "product_sum": double_lists(state.products),
                    "hsic_sum": double_lists(state.hsic),
                    "unbiased_hsic_sum": double_lists(state.unbiased_hsic),
                }
            )
            named = {"layer": layer, "step": step, "domain": domain, "phase": phase, "tokens": state.tokens}
            named |= {"groups": state.groups, "group_tokens": state.group_tokens}
            frames.append(frame.with_columns(**{name: pl.lit(value) for name, value in named.items()}))
        return ({"expert_similarity": pl.concat(frames)} if frames else {}) | self._weights.drain()


def group_limit(experts: int, width: int) -> int:
    """Tokens that all experts run on at once."""
    return min(GROUP_TOKENS, max(2 * LEAST_TOKENS, MAX_VALUES // (experts * width)))


def _compare(layer: MoELayer, call: ExpertsCall, inputs: Tensor, *, already: int) -> _State:
    """Sums over tokens of what all experts put out and of how alike it is; (tokens, hidden) ``inputs``.

    The first ``already`` tokens count for HSIC only: their outputs have been added before.
    """
    assert layer.layout is not None, "refused before the run began"
    experts, width = layer.layout.num_experts, inputs.shape[1]
    inputs = inputs.to(layer.layout.down_weight(call.module, 0).dtype)
    total: _State | None = None
    for part in inputs.tensor_split(-(-len(inputs) // group_limit(experts, width))):
        outputs = inputs.new_empty((experts, len(part), width), dtype=torch.float32)
        for expert in range(experts):
            outputs[expert] = layer.layout.run_expert(call.module, expert, part)[1]
        torch.nan_to_num_(outputs, nan=0.0, posinf=0.0, neginf=0.0)  # shape: (experts, tokens, width)
        enough = len(part) >= LEAST_TOKENS
        hsic = _hsic(outputs) if enough else (outputs.new_zeros((2, experts, experts), dtype=torch.float64))
        outputs = outputs[:, already:] if already else outputs
        sums, flat = outputs.sum(1).double(), outputs.flatten(1)
        products = (flat @ flat.mT).double()
        # The sum over tokens of all cosines is one product of the directions, token beside token.
        flat = outputs.div_(_norm(outputs)).flatten(1)
        grouped = len(part) if enough else 0
        counted = len(part) - already
        state = _State(
            counted,
            sums,
            (flat @ flat.mT).double(),
            products,
            int(enough),
            grouped,
            grouped * hsic[0],
            grouped * hsic[1],
        )
        total, already = state if total is None else total + state, 0
    assert total is not None, "called without tokens"
    return total


def _norm(outputs: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(outputs, dim=2, keepdim=True)
    return norm.clamp_min(torch.finfo(outputs.dtype).tiny)


def _hsic(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """(experts, experts) biased and unbiased HSIC, as :func:`profiler.metrics.similarity.linear_hsic` says.

    One (experts, n x n) product; ``outputs`` (experts, n, width) stay as they are.
    """
    experts, n, _ = outputs.shape
    grams = outputs.new_empty((experts, n, n))
    for expert in range(experts):
        centred = outputs[expert] - outputs[expert].mean(0)
        torch.mm(centred, centred.mT, out=grams[expert])
    flat, diagonal = grams.flatten(1), torch.diagonal(grams, dim1=1, dim2=2).double()
    products, trace = (flat @ flat.mT).double(), diagonal.sum(1)
    inner = products - n / (n - 2) * diagonal @ diagonal.mT + torch.outer(trace, trace) / ((n - 1) * (n - 2))
    return products / (n - 1) ** 2, inner / (n * (n - 3))
