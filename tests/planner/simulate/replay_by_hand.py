"""Slow, obvious replays: every policy from its formula, over dictionaries and lists, one expert at a time."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.simulate.workload import Workload

Item = tuple[int, int]  # layer, expert
Score = Callable[[Item], float]


class Replay:
    """What every policy may look at, and the cache itself."""

    def __init__(self, workload: Workload, slots: int, *, shared: bool, warm: bool) -> None:
        self.work, self.slots, self.shared, self.warm = workload, slots, shared, warm
        self.layers = workload.num_layers
        self.order = 0
        self.empty()
        self.layer = self.at = self.token = 0

    def empty(self) -> None:
        self.resident: set[Item] = set()
        self.last: dict[Item, int] = defaultdict(lambda: -1)
        self.uses: dict[Item, int] = defaultdict(int)
        self.inside: dict[Item, int] = defaultdict(int)
        self.tokens: dict[Item, int] = defaultdict(int)

    def ahead(self, item: Item) -> int:
        """Layers until the item's layer runs, 0 for the current one."""
        return (item[0] - self.layer) % self.layers

    def next_use(self, item: Item) -> float:
        """Steps until the item is used after this step."""
        for at in range(self.at, self.work.num_passes):
            if (at, item[0]) > (self.at, self.layer) and item[1] in self.work.ids[item[0], at]:
                return (at - self.at) * self.layers + item[0] - self.layer
        return math.inf

    def steps(self) -> Any:
        """Every step: the objects that it needs, in order."""
        starts = set(self.work.offsets[:-1].tolist())
        for at in range(self.work.num_passes):
            self.token = 1 if at in starts else self.token + 1
            if at in starts and not self.warm:
                self.empty()
            for layer in range(self.layers):
                self.at, self.layer = at, layer
                yield [(layer, int(one)) for one in self.work.ids[layer, at] if one >= 0]

    def mine(self) -> list[Item]:
        """Residents of the cache that serves this layer."""
        return [item for item in self.resident if self.shared or item[0] == self.layer]

    def run(self, score: Score, *, keeps_best: bool = False, hits_first: bool = False) -> NDArray[np.bool_]:
        """(layers, passes, width) which of the needed were there."""
        there = np.zeros(self.work.ids.shape, np.bool_)
        for needed in self.steps():
            missing = [item for item in needed if item not in self.resident]
            there[self.layer, self.at] = [
                one >= 0 and (self.layer, int(one)) not in missing for one in self.work.ids[self.layer, self.at]
            ]
            ordered = sorted(needed, key=lambda item: (item in missing, item)) if hits_first else needed
            for item in ordered:
                self.order += 1
                self.last[item] = self.order
                self.uses[item] += 1
                self.inside[item] += 1
                self.tokens[item] += self.tokens_of(item)

            def worth(item: Item) -> tuple[float, int]:
                return score(item), self.last[item]

            if keeps_best and len(needed) > self.slots:
                kept = sorted({*self.mine(), *needed}, key=worth, reverse=True)[: self.slots]
                self.resident = {item for item in self.resident if item not in self.mine()} | set(kept)
                continue
            for item in missing:
                if len(self.mine()) >= self.slots:
                    victims = [other for other in self.mine() if other not in needed]
                    if not victims:
                        self.inside[item] = 0
                        continue
                    out = min(victims, key=worth)
                    self.resident.remove(out)
                    self.inside[out] = 0
                self.resident.add(item)
        return there

    def tokens_of(self, item: Item) -> int:
        place = self.work.ids[item[0], self.at].tolist().index(item[1])
        return int(self.work.tokens[item[0], self.at, place])


def by_hand(workload: Workload, policy: str, slots: int, *, shared: bool, warm: bool, **parameters: Any) -> Any:
    """(layers, passes, width) which of the needed were there; slots of each cache."""
    hand = Replay(workload, slots, shared=shared, warm=warm)
    layers = hand.layers

    def edgemoe(item: Item) -> float:
        return hand.uses[item] / (hand.ahead(item) or layers)

    def edgemoe_printed(item: Item) -> float:
        back = (hand.layer - item[0]) % layers
        return hand.uses[item] / back if back else math.inf

    def window(item: Item) -> float:
        steps = hand.next_use(item)
        foresight = parameters.get("foresight")
        return -steps if foresight is None or steps <= foresight * layers else -math.inf

    if policy == "window":
        return hand.run(window, keeps_best=True)
    if policy == "edgemoe":
        return hand.run(edgemoe_printed if parameters.get("distance") == "printed" else edgemoe)
    if policy == "moe_infinity":
        return _moe_infinity(hand, **parameters)
    simple: dict[str, Score] = {
        "lru": lambda item: 0.0,
        "mixtral_offloading": lambda item: 0.0,
        "lfu": lambda item: hand.uses[item],
        "lfu_in_cache": lambda item: hand.inside[item],
        "weighted": lambda item: hand.tokens[item],
    }
    return hand.run(simple[policy], hits_first=policy == "mixtral_offloading")


def _moe_infinity(hand: Replay, *, train: Workload) -> NDArray[np.bool_]:
    work, layers, experts = hand.work, hand.layers, hand.work.num_experts
    matrices = []
    for request in range(train.num_requests):
        matrix = np.zeros((layers, experts))
        for layer in range(layers):
            for at in range(train.offsets[request], train.offsets[request + 1]):
                for one, tokens in zip(train.ids[layer, at], train.tokens[layer, at], strict=True):
                    if one >= 0:
                        matrix[layer, one] += tokens
        matrices.append(matrix)
    shares = [matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1) for matrix in matrices]

    def cosine(a: NDArray[Any], b: NDArray[Any]) -> float:
        return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))) if a.any() and b.any() else 0.0

    found: list[int] = []
    for request in range(work.num_requests):
        seen = np.zeros((layers, experts))
        for at in range(work.offsets[request], work.offsets[request + 1]):
            alike = [sum(cosine(seen[layer], matrix[layer]) for layer in range(layers)) for matrix in matrices]
            best = max(range(len(alike)), key=lambda one: round(alike[one], 9))
            found.append(len(matrices) if at == work.offsets[request] else best)
            for layer in range(layers):
                for one, tokens in zip(work.ids[layer, at], work.tokens[layer, at], strict=True):
                    if one >= 0:
                        seen[layer, one] += tokens
    shares.append(np.mean(shares, axis=0))

    def score(item: Item) -> float:
        decay = (layers + 1) / (layers + 1 - (hand.ahead(item) or layers))
        return float(hand.inside[item] * (shares[found[hand.at]][item] + 1e-6) / decay)

    return hand.run(score)


def hobbit_by_hand(
    workload: Workload, slots: int, narrow_slots: int, *, shared: bool, warm: bool, weights: tuple[float, ...],
    thresholds: tuple[float, float] | None, paper: bool,
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:  # fmt: skip
    """(layers, passes) missing, narrow and skipped."""
    layers = workload.num_layers
    missing, narrow, skipped = (np.zeros(workload.ids.shape[:2], int) for _ in range(3))
    full_cache: set[Item] = set()
    narrow_cache: set[Item] = set()
    last: dict[Item, int] = defaultdict(lambda: -1)
    order = token = 0
    for at in range(workload.num_passes):
        token += 1
        if at in workload.offsets[:-1]:
            recent: dict[Item, int] = defaultdict(int)
            uses: dict[Item, int] = defaultdict(int)
            in_full: dict[Item, int] = defaultdict(int)
            token = 1
            if not warm:
                full_cache, narrow_cache, last = set(), set(), defaultdict(lambda: -1)
        for layer in range(layers):
            needed = [(layer, int(one)) for one in workload.ids[layer, at] if one >= 0]
            gates = [float(one) for one in workload.weights[layer, at, : len(needed)]]  # type: ignore[index]
            form = ["full"] * len(needed)
            if thresholds is not None:
                for rank in range(len(needed)):
                    before = sum(gates[:rank]) / sum(gates)
                    form[rank] = "full" if before <= thresholds[0] else "narrow" if before <= thresholds[1] else "skip"
            load: list[tuple[Item, set[Item], int]] = []
            for item, version in zip(needed, form, strict=True):
                order += 1
                whole = item in full_cache
                if not whole and (version == "full" or item not in narrow_cache):
                    missing[layer, at] += 1
                    narrow[layer, at] += version == "narrow"
                    skipped[layer, at] += version == "skip"
                    if version != "skip":
                        load.append(
                            (item, full_cache, slots) if version == "full" else (item, narrow_cache, narrow_slots)
                        )
                last[item] = order
                recent[item], uses[item] = token, uses[item] + 1
                in_full[item] += whole or version == "full"

            def score(item: Item, layer: int = layer) -> tuple[float, int]:
                ahead = (item[0] - layer) % layers
                distance = ahead if paper or ahead else layers
                counts = weights[0] * recent[item] + weights[1] * uses[item] + weights[2] * in_full[item]  # noqa: B023
                return counts / token + weights[3] * (1 - distance / layers), last[item]  # noqa: B023

            for item, cache, room in load:
                mine = [other for other in cache if shared or other[0] == layer]
                if len(mine) >= room:
                    victims = [other for other in mine if other not in needed]
                    if not victims:
                        continue
                    cache.remove(min(victims, key=score))
                cache.add(item)
    return missing, narrow, skipped


def arc_by_hand(workload: Workload, rooms: list[int], *, shared: bool, warm: bool) -> NDArray[np.int64]:
    """(layers, passes) missing; the lists are Python lists, the newest last."""
    missing = np.zeros(workload.ids.shape[:2], int)
    caches: list[_Arc] = []
    for at in range(workload.num_passes):
        if at == 0 or (not warm and at in workload.offsets[:-1]):
            caches = [_Arc(room) for room in rooms]
        for layer in range(workload.num_layers):
            cache = caches[0 if shared else layer]
            needed = [(layer, int(one)) for one in workload.ids[layer, at] if one >= 0]
            missing[layer, at] = sum(item not in cache.t1 and item not in cache.t2 for item in needed)
            for item in needed:
                cache.request(item, needed)
    return missing


class _Arc:
    """Megiddo and Modha's figure 4; the last argument: what may not be evicted."""

    def __init__(self, room: int) -> None:
        self.room, self.p = room, 0.0
        self.t1: list[Item] = []
        self.t2: list[Item] = []
        self.b1: list[Item] = []
        self.b2: list[Item] = []

    def request(self, item: Item, pinned: list[Item]) -> None:
        if item in self.t1 or item in self.t2:
            (self.t1 if item in self.t1 else self.t2).remove(item)
            self.t2.append(item)
        elif item in self.b1:
            self.p = min(self.room, self.p + max(1.0, len(self.b2) / len(self.b1)))
            if self.replace(pinned, from_b2=False):
                self.b1.remove(item)
                self.t2.append(item)
        elif item in self.b2:
            self.p = max(0.0, self.p - max(1.0, len(self.b1) / len(self.b2)))
            if self.replace(pinned, from_b2=True):
                self.b2.remove(item)
                self.t2.append(item)
        else:
            known = True
            if len(self.t1) + len(self.b1) >= self.room:
                if len(self.t1) < self.room and self.b1:
                    self.b1.pop(0)
                else:
                    known = False
            elif len(self.t1 + self.t2 + self.b1 + self.b2) >= 2 * self.room and self.b2:
                self.b2.pop(0)
            if self.replace(pinned, from_b2=False, known=known):
                self.t1.append(item)

    def replace(self, pinned: list[Item], *, from_b2: bool, known: bool = True) -> bool:
        """Make room if there is none; False if nothing may go."""
        if len(self.t1) + len(self.t2) < self.room:
            return True
        recent = bool(self.t1) and (len(self.t1) > self.p or (from_b2 and len(self.t1) == self.p))
        first, second = (self.t1, self.t2) if recent or not known else (self.t2, self.t1)
        for source in (first, second):
            for victim in source:
                if victim not in pinned:
                    source.remove(victim)
                    if known:
                        (self.b1 if source is self.t1 else self.b2).append(victim)
                    return True
        return False
