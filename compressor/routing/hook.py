"""Puts rules before the experts of a loaded model: they run what a rule makes of their router's choice.

::

    with rerouted(model, TopP(0.5)) as routing:
        model(**batch)
        routing.take()[3, 0].active          # (tokens,) experts that each token used in layer 3

Slots that a rule empties keep an id that exists and get weight 0, so every backend of the library runs them as it
always does. What watches the experts sees what they are called with.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compressor.families import find_router_outputs, flat
from compressor.routing.choice import Choice, Taken, compared
from compressor.routing.gates import Gate, Trial, require
from compressor.routing.places import Place, find_places
from compressor.routing.rules import Rule
from moescope.errors import ModelError

Key = tuple[int, int]
"""(layer, step)."""


class Reroute:
    """What stands before one experts module: hooks on it, its routers and its decoder layer.

    Args:
        place: where.
        rules: (layer, step) -> rule, for its calls; a call without one passes as it is.
        record: keep what the rules did.
    """

    def __init__(self, place: Place, rules: Mapping[Key, Rule], *, record: bool) -> None:
        self.place, self.rules, self._record = place, rules, record
        self._calls = 0
        self._shown: Any = None
        self.trials: dict[Key, Trial] = {}
        self.taken: dict[Key, list[Taken]] = defaultdict(list)

    @property
    def in_words(self) -> list[str]:
        """Its rules, each with the layer and step that it is for."""
        if isinstance(self.rules, _Every):
            return [f"all layers: {self.rules.rule}"]
        return [f"layer {layer}, step {step}: {rule}" for (layer, step), rule in sorted(self.rules.items())]

    def attach(self) -> list[RemovableHandle]:
        """Put the hooks on."""
        # Before a map of merged experts, whose ids are places and not rows of the router.
        handles = [self.place.experts.register_forward_pre_hook(self, prepend=True, with_kwargs=True)]
        handles.append(self.place.layer.register_forward_pre_hook(self._began))
        return handles + [router.register_forward_hook(self._routed) for router in self.place.routers]

    def _began(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._calls, self._shown = 0, None

    def _routed(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._shown = output

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The call of the experts with what the rule makes of it."""
        layer, step = self.place.key
        key = layer, step + self._calls * self.place.stride
        shown, self._shown, self._calls = self._shown, None, self._calls + 1
        rule = self.rules.get(key)
        if rule is None:
            return None
        _, ids, weights = (*args, *kwargs.values())[:3]
        before = Choice(flat(ids).long(), flat(weights), self._logits(shown, ids))
        after = self._after(key, rule, before)
        if after is before:
            new = ids, weights
        else:
            shape = *ids.shape[:-1], after.k
            new = after.ids.to(ids.dtype).reshape(shape), after.weights.to(weights.dtype).reshape(shape)
        if self._record:
            with torch.no_grad():
                self.taken[key].append(compared(before, after))
        return _called(args, kwargs, *new)

    def _after(self, key: Key, rule: Rule, before: Choice) -> Choice:
        need, where = rule.needs(before.k), self.place.words
        if need == "choice":
            return rule(before, _NoGate)  # type: ignore[arg-type]
        if before.logits is None:
            raise ModelError(f"{where} cannot be rerouted by {type(rule).__name__}: its router showed no scores")
        if need == "scores":
            return rule(before, _NoGate)  # type: ignore[arg-type]
        trial = self.trials.setdefault(key, Trial(self.place.known))
        with torch.no_grad():
            trial.see(before)
        gate = require(trial.gate, where, trial.reason)
        try:
            return rule(before, gate)
        except ModelError as error:
            raise ModelError(f"{where}: {error}") from error

    def _logits(self, shown: Any, ids: Tensor) -> Tensor | None:
        if shown is None:
            return None
        logits, _ = find_router_outputs(shown, logits_index=self.place.logits_index, top_k=ids.shape[-1])
        rows = ids.numel() // ids.shape[-1]
        if logits is None or logits.numel() % rows or logits.numel() // rows != logits.shape[-1]:
            return None
        logits = flat(logits)
        if self.place.holds_probabilities:
            logits = logits.float().clamp_min(torch.finfo(torch.float32).tiny).log()
        return logits


class _NoGate:
    """Stands where a rule needs no gate."""


def _called(
    args: tuple[Any, ...], kwargs: dict[str, Any], ids: Tensor, weights: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with others in the places of the second and third, by position or name."""
    values = [*args, *kwargs.values()]
    values[1:3] = ids, weights
    return tuple(values[: len(args)]), dict(zip(kwargs, values[len(args) :], strict=True))


class Routing:
    """Rules that stand in a model.

    Attributes:
        handles: of all hooks.
    """

    def __init__(self, reroutes: list[Reroute]) -> None:
        self._reroutes = reroutes
        self.handles: list[RemovableHandle] = []

    def take(self) -> dict[Key, Taken]:
        """(layer, step) -> what the rules did since the last time, one forward behind the other; for layers with a rule
        that ran."""
        found = {}
        for reroute in self._reroutes:
            for key, parts in reroute.taken.items():
                columns = (torch.cat([getattr(part, name) for part in parts]) for name in ("active", "changed", "kept"))
                found[key] = Taken(*columns)
            reroute.taken.clear()
        return dict(sorted(found.items()))

    @property
    def gates(self) -> dict[Key, Gate]:
        """(layer, step) -> the gate that was found, where a rule asked for it."""
        trials = {key: trial for reroute in self._reroutes for key, trial in reroute.trials.items()}
        return {key: trial.gate for key, trial in sorted(trials.items()) if trial.gate is not None}

    def remove(self) -> None:
        """Take the hooks off; may be called twice."""
        while self.handles:
            self.handles.pop().remove()


def install(model: nn.Module, rules: Rule | Mapping[Key, Rule], *, record: bool = False) -> Routing:
    """Put rules before the experts of a model, until :meth:`Routing.remove`.

    Args:
        model: of transformers, loaded.
        rules: by (layer, step), or one for all.
        record: keep what they do for :meth:`Routing.take`.

    Raises:
        ModelError: a model, layer or family whose choice cannot be changed, or one that is rerouted already.
    """
    places = find_places(model)
    reroutes = []
    for key, place in places.items():
        if reroute_of(place.experts) is not None:
            raise ModelError(f"{place.words} is rerouted already: take the first rules off, or load the source")
        own: Mapping[Key, Rule] = _of_place(rules, key, place) if isinstance(rules, Mapping) else _Every(rules)
        if own:
            reroutes.append(Reroute(place, own, record=record))
    asked = set(rules) if isinstance(rules, Mapping) else set()
    unknown = sorted(asked - {key for one in reroutes for key in one.rules})
    if unknown:
        raise ModelError(f"the model has no MoE layer {unknown[0][0]}, step {unknown[0][1]}, whose choice could change")
    routing = Routing(reroutes)
    try:
        for reroute in reroutes:
            routing.handles += reroute.attach()
    except BaseException:
        routing.remove()
        raise
    return routing


@contextmanager
def rerouted(model: nn.Module, rules: Rule | Mapping[Key, Rule]) -> Iterator[Routing]:
    """While entered, the experts of a model run what rules make of their routers' choices; afterwards it is as it was,
    whatever happened.

    A model that was compiled runs as it is written for the while: hooks on a compiled one would be ignored.

    Args:
        model: of transformers, loaded.
        rules: by (layer, step), or one for all layers.

    Raises:
        ModelError: as :func:`install`; and in a forward, where a rule needs more than the layer's router shows.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        routing = install(model, rules, record=True)
        stack.callback(routing.remove)
        yield routing


def reroute_of(experts: Any) -> Reroute | None:
    """What stands before an experts module; None where its router's choice goes straight to it."""
    hooks = getattr(experts, "_forward_pre_hooks", {}).values()
    return next((hook for hook in hooks if isinstance(hook, Reroute)), None)


class _Every(Mapping[Key, Rule]):
    """One rule for all calls."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule

    def __getitem__(self, key: Key) -> Rule:
        return self.rule

    def __iter__(self) -> Iterator[Key]:
        return iter(())

    def __len__(self) -> int:
        return 1


def _of_place(rules: Mapping[Key, Rule], key: Key, place: Place) -> dict[Key, Rule]:
    return {
        one: rule
        for one, rule in rules.items()
        if one[0] == key[0] and one[1] >= key[1] and (one[1] - key[1]) % place.stride == 0
    }
