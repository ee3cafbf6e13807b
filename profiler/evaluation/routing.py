"""How the routing of a compressed model agrees with its base's on the same tokens.

Experts and decoder layers are numbered as in the base. ``kept`` says of which experts of the base each expert of the
model is made, ``kept_layers`` which decoder layers are left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from compressor.families import Routed, find_router_outputs
from moescope.errors import CaptureError, ModelError
from profiler.capture.batch import LayerKey
from profiler.capture.discovery import MoELayer, inspect_model
from profiler.capture.hooks import Hooks
from profiler.capture.tap import ExpertsCall, tapped
from profiler.evaluation.distribution import Chunks
from profiler.evaluation.router_shift import token_divergence
from profiler.metrics.divergence import mean_of_items
from profiler.metrics.flips import Flips, flips
from profiler.metrics.perplexity import Estimate

if TYPE_CHECKING:
    from profiler.corpus import TokenBatch

Kept = Mapping[LayerKey, Sequence[Sequence[int]]]
"""(layer, step) of the base -> for each expert of the model, the experts of the base that it is made of."""


@dataclass(frozen=True)
class Routing:
    """Agreement of the model's selections with its base's.

    Attributes:
        whole: over all layers that are left.
        layers: (layer, step) of the base -> the same of one layer.
        divergence: (layer, step) of the base -> nats per token by which the router's probabilities differ over the k
            likeliest experts (EAQuant, see :func:`profiler.evaluation.router_shift.token_divergence`); layers whose
            routers do not show them, or whose experts are merged, are left out.
        domains: domain -> the same over all layers.
        dropped: decoder layers of the base with experts that the model has no longer.
        counts: one row per sequence and layer: sequence, domain, layer, step, selections, agreed, gone, tokens,
            divergence (summed over tokens; null where it is not known).
    """

    whole: Flips
    layers: dict[LayerKey, Flips]
    divergence: dict[LayerKey, Estimate]
    domains: dict[str, Flips]
    dropped: list[int]
    counts: pl.DataFrame = field(repr=False)


class SelectionReader:
    """Writes down whom a model's tokens go to, forward by forward; one forward at a time.

    Attributes:
        layers: the MoE layers of the model.
        num_layers: decoder layers, dense ones included.
        selections: (layer, step) -> (rows, k) of the last forward, -1 = none.
        logits: (layer, step) -> (rows, experts) of the router in the last forward, where it shows them.
    """

    def __init__(self, model: nn.Module) -> None:
        found = inspect_model(model)
        self.layers, self.num_layers = found.layers, len(found.stack)
        self.selections: dict[LayerKey, Tensor] = {}
        self.logits: dict[LayerKey, Tensor] = {}
        self._routed: dict[LayerKey, Routed] = {}
        self._calls: Counter[LayerKey] = Counter()

    def first_of(self, chunks: Chunks) -> Chunks:
        """The same parts of a forward, with the selections of the forward that gives the first of them read."""
        self.selections, self.logits, self._routed, self._calls = {}, {}, {}, Counter()
        with self._watching():
            first = next(chunks)
        return chain([first], chunks)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        hooks = Hooks()
        with ExitStack() as stack:
            stack.callback(hooks.remove)
            for layer in self.layers:
                for router in layer.routers:
                    hooks.after(router, self._router_hook(layer), first=True)
            stack.enter_context(tapped([(layer.experts, self._watcher(layer)) for layer in self.layers]))
            yield

    def _router_hook(self, layer: MoELayer) -> Any:
        def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._routed[layer.key] = Routed(module, args[0] if args else None, output)

        return see

    def _watcher(self, layer: MoELayer) -> Any:
        def run(call: ExpertsCall) -> Any:
            call.adapter, call.last_routed = layer.adapter, lambda: self._routed.get(layer.key)
            call.run()
            now = layer.called(self._calls[layer.key])
            self._calls[layer.key] += 1
            ids = call.ids.detach().long()
            none = (ids < 0) | (ids >= layer.num_experts)
            if layer.traits.zero_weight_is_none:
                none |= call.weights.detach() == 0
            self.selections[now.key] = torch.where(none, -1, ids)
            logits = self._logits(layer)
            if logits is not None and len(logits) == len(ids):
                self.logits[now.key] = logits
            return call.result

        return run

    def _logits(self, layer: MoELayer) -> Tensor | None:
        """(rows, experts) what the router of a layer said last; None where it does not say."""
        routed = self._routed.get(layer.key)
        if routed is None:
            return None
        logits, _ = find_router_outputs(routed.output, logits_index=layer.logits_index, top_k=layer.top_k)
        if logits is None or logits.shape[-1] < layer.num_experts:
            return None
        return logits.detach().flatten(0, -2)


class RoutingCounts:
    """Counts of agreement between two readers, batch by batch.

    Args:
        model: reads the model.
        base: reads its base.
        kept: see :data:`Kept`; layers that are not named keep all experts.
        kept_layers: decoder layers of the base that are left, in order; None = all.

    Attributes:
        model: reads the model.
        base: reads its base.
        dropped: decoder layers of the base with experts that the model has no longer.

    Raises:
        ModelError: the layers or experts of the two do not fit; the message says what is missing.
    """

    def __init__(
        self,
        model: SelectionReader,
        base: SelectionReader,
        *,
        kept: Kept | None = None,
        kept_layers: Sequence[int] | None = None,
    ) -> None:
        self.model, self.base = model, base
        places = list(range(base.num_layers)) if kept_layers is None else list(kept_layers)
        if len(places) != model.num_layers:
            raise ModelError(
                f"the model has {model.num_layers} decoder layers where {len(places)} of the base's are left: without"
                " its plan it is not known which"
            )
        now = {layer: place for place, layer in enumerate(places)}
        ours = {layer.key: layer for layer in model.layers}
        self.dropped = sorted({layer.layer for layer in base.layers if layer.layer not in now})
        self._pairs: list[tuple[MoELayer, MoELayer, Tensor]] = []
        for layer in base.layers:
            if layer.layer in now:
                other = ours.get((now[layer.layer], layer.step))
                if other is None:
                    raise ModelError(f"the model has no MoE layer in place of the base's layer {layer.layer}")
                self._pairs.append((layer, other, _membership(layer, other, (kept or {}).get(layer.key))))
        self._rows: list[pl.DataFrame] = []

    @torch.no_grad()
    def add(self, batch: TokenBatch) -> None:
        """Compare what both readers saw of a batch.

        Raises:
            CaptureError: a layer saw other tokens than the batch has.
        """
        real = torch.from_numpy(batch.attention_mask == 1)
        for layer, other, membership in self._pairs:
            for key in [key for key in self.base.selections if _is_call_of(layer, key)]:
                step = (other.layer, key[1])
                before, after = self.base.selections[key], self.model.selections.get(step)
                if after is None or not len(before) == len(after) == real.numel():
                    raise CaptureError(f"the experts of layer {layer.layer} saw other tokens than the batch has")
                counts = _agreement(before.cpu(), after.cpu(), membership, real)
                columns = {name: values.numpy() for name, values in counts.items()}
                columns["divergence"] = self._divergence(layer, key, step, membership, real)
                rows = {"sequence": batch.sequences, "domain": batch.domains, **columns}
                self._rows.append(pl.DataFrame(rows).with_columns(layer=pl.lit(key[0]), step=pl.lit(key[1])))

    def _divergence(self, layer: MoELayer, key: LayerKey, step: LayerKey, membership: Tensor, real: Tensor) -> Any:
        """(batch,) sum over the tokens of each sequence; null where it is not known."""
        before, after = self.base.logits.get(key), self.model.logits.get(step)
        members = [row.nonzero().ravel().tolist() for row in membership]
        members = members[: max((place + 1 for place, row in enumerate(members) if row), default=0)]
        found = None
        if before is not None and after is not None and after.shape[-1] >= len(members):
            found = token_divergence(layer, before, after, members)
        if found is None:
            return pl.Series([None] * len(real), dtype=pl.Float64)
        return (found.view(real.shape) * real).sum(1).numpy()

    def result(self) -> Routing:
        """All counts together.

        Raises:
            CaptureError: nothing was read.
        """
        if not self._rows:
            raise CaptureError("no selection was seen: the experts of the base did not run")
        counts = pl.concat(self._rows)
        layers = counts.partition_by("layer", "step", as_dict=True, maintain_order=True)
        domains = counts.partition_by("domain", as_dict=True, maintain_order=True)
        return Routing(
            whole=_flips(counts),
            layers={(int(key[0]), int(key[1])): _flips(part) for key, part in sorted(layers.items())},
            divergence=_divergences(layers),
            domains={str(key[0]): _flips(part) for key, part in domains.items() if part["selections"].sum()},
            dropped=self.dropped,
            counts=counts,
        )


def _is_call_of(layer: MoELayer, key: LayerKey) -> bool:
    """Whether a selection is that of a layer, or of one of its further calls."""
    return key[0] == layer.layer and key[1] >= layer.step and (key[1] - layer.step) % layer.stride == 0


def _membership(base: MoELayer, model: MoELayer, kept: Sequence[Sequence[int]] | None) -> Tensor:
    """(experts of the model, experts of the base) bool: of whom each is made."""
    members = [[expert] for expert in range(base.num_experts)] if kept is None else kept
    if kept is None and base.num_experts != model.num_experts:
        raise ModelError(
            f"layer {base.layer} has {base.num_experts} experts in the base and {model.num_experts} in the model:"
            " without its plan it is not known which are left"
        )
    if len(members) > model.num_experts:
        raise ModelError(f"layer {base.layer} of the model has {model.num_experts} experts, its plan {len(members)}")
    result = torch.zeros(model.num_experts, base.num_experts, dtype=torch.bool)  # experts that only fill up have none
    for place, experts in enumerate(members):
        for expert in experts:
            if not 0 <= expert < base.num_experts:
                raise ModelError(f"layer {base.layer} of the base has no expert {expert}, of which the plan speaks")
            result[place, expert] = True
    return result


def _agreement(before: Tensor, after: Tensor, membership: Tensor, real: Tensor) -> dict[str, Tensor]:
    """(batch,) counts: selections of the base, how many agree, how many are of an expert that is gone; and tokens."""
    chosen, chosen_after = _one_hot(before, membership.shape[1]), _one_hot(after, membership.shape[0])
    reached = (chosen_after.float() @ membership.float()) > 0
    found = {"selections": chosen, "agreed": chosen & reached, "gone": chosen & ~membership.any(0)}
    counts = {name: (values.sum(1).view(real.shape) * real).sum(1) for name, values in found.items()}
    return {**counts, "tokens": real.sum(1)}


def _one_hot(ids: Tensor, experts: int) -> Tensor:
    """(rows, experts) bool; -1 selects nobody."""
    result = torch.zeros(len(ids), experts + 1, dtype=torch.bool)
    return result.scatter_(1, torch.where(ids < 0, experts, ids), True)[:, :experts]


def _divergences(layers: Mapping[Any, pl.DataFrame]) -> dict[LayerKey, Estimate]:
    found = {}
    for key, counts in sorted(layers.items()):
        if not counts["divergence"].null_count():
            sums = counts.group_by("sequence").agg(pl.sum("divergence", "tokens")).sort("sequence")
            found[int(key[0]), int(key[1])] = mean_of_items(
                sums=sums["divergence"].to_numpy(), items=sums["tokens"].to_numpy()
            )
    return found


def _flips(counts: pl.DataFrame) -> Flips:
    sums = counts.group_by("sequence").agg(pl.sum("selections", "agreed", "gone")).sort("sequence")
    return flips(**{name: np.asarray(sums[name]) for name in ("selections", "agreed", "gone")})
