"""How many experts tokens used while a rule was in force, per layer and domain: sums, and each token's on wish."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Key = tuple[int, int]
"""(layer, step)."""


@dataclass
class Activity:
    """Sums over the tokens of a text.

    Attributes:
        domains: by which they are kept apart.
        counts: per layer (domains, most + 1): tokens that used 0, 1, 2, ... experts.
        kept: per layer (domains,): gate weight that stayed with the router's own experts, over what it gave, summed.
        changed: per layer (domains,): tokens whose set of experts is another than the router's own.
        tokens: per layer and batch each token's number of experts, where they were asked for.
    """

    domains: Sequence[str]
    counts: dict[Key, NDArray[np.int64]] = field(default_factory=dict)
    kept: dict[Key, NDArray[np.float64]] = field(default_factory=dict)
    changed: dict[Key, NDArray[np.int64]] = field(default_factory=dict)
    tokens: dict[Key, list[NDArray[np.int16]]] = field(default_factory=dict)

    def add(
        self,
        key: Key,
        *,
        active: NDArray[np.int64],
        kept: NDArray[np.float64],
        changed: NDArray[np.bool_],
        domain: NDArray[np.int64],
        each: bool = False,
    ) -> None:
        """The counted tokens of one batch in one layer, all arrays (tokens,); ``each`` keeps their numbers."""
        width = int(active.max(initial=0)) + 1
        before = self.counts.get(key, np.zeros((len(self.domains), 0), np.int64))
        wide = np.zeros((len(self.domains), max(width, before.shape[1])), np.int64)
        wide[:, : before.shape[1]] = before
        np.add.at(wide, (domain, active), 1)
        self.counts[key] = wide
        empty = np.zeros(len(self.domains))
        self.kept[key] = self.kept.get(key, empty) + np.bincount(domain, weights=kept, minlength=len(empty))
        moved = np.bincount(domain[changed], minlength=len(empty))
        self.changed[key] = self.changed.get(key, empty.astype(np.int64)) + moved
        if each:
            self.tokens.setdefault(key, []).append(active.astype(np.int16))

    def numbers(self, key: Key) -> NDArray[np.int16]:
        """(tokens,) of a layer, in the order in which they were added."""
        return np.concatenate(self.tokens[key])

    def summary(self, flops: Mapping[Key, float], base: Mapping[Key, float]) -> dict[str, Any]:
        """Per layer and domain, and over all layers, as plain JSON.

        Args:
            flops: of one expert of a layer on one token.
            base: mean experts per token that the router itself gives, per layer.

        Returns:
            ``layers``: names; ``all`` and per domain ``mean``, ``p95``, ``kept`` and ``changed``, one value per layer;
            ``flops_share``: of the routed experts' work under the router's own choice, per domain and ``all``.
        """
        keys = sorted(self.counts)
        rows = {domain: [index] for index, domain in enumerate(self.domains)}
        whole = list(range(len(self.domains)))
        own = sum(base[key] * flops[key] for key in keys)
        found: dict[str, Any] = {"layers": [{"layer": layer, "step": step} for layer, step in keys], "per_domain": {}}
        for domain, chosen in ((None, whole), *rows.items()):
            part: dict[str, Any] = {name: [self._of(name, key, chosen) for key in keys] for name in _MEASURES}
            part["flops_share"] = sum(mean * flops[key] for mean, key in zip(part["mean"], keys, strict=True)) / own
            if domain is None:
                found["all"] = part
            else:
                found["per_domain"][domain] = part
        return found

    def means(self) -> dict[Key, float]:
        """Mean experts per token, per layer."""
        return {key: self._of("mean", key, list(range(len(self.domains)))) for key in self.counts}

    def _of(self, measure: str, key: Key, chosen: list[int]) -> float:
        counts = self.counts[key][chosen].sum(0)
        tokens = max(1, int(counts.sum()))
        if measure == "mean":
            return float(counts @ np.arange(len(counts)) / tokens)
        if measure == "p95":
            return float(np.searchsorted(np.cumsum(counts), 0.95 * tokens))
        return float((self.kept if measure == "kept" else self.changed)[key][chosen].sum() / tokens)


_MEASURES = ("mean", "p95", "kept", "changed")
