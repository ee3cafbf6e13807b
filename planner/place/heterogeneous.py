"""Unequal devices: which variant of a model serves which domain of requests on which device, within limits.

After MoE^2 (arXiv 2501.09410, read second-hand, not verified), where experts are whole language models on edge nodes
and a subset is chosen so that cross-entropy is least under limits of delay per category and of energy. Its gating is
not modelled: each domain is served by one variant on one device. A variant here may be a model, a plan of it, or a set
of its experts; a routing trace does not say what it costs on another device, so all figures are given. Solved exactly,
by an integer program that HiGHS takes to no gap.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.errors import PlanError
from profiler.metrics._arrays import FloatArray

ROUNDING = 1e-9
"""Relative: a limit that is met up to this much is met."""


@dataclass(frozen=True)
class Choices:
    """What there is to choose from. Infinite limits and latencies are allowed: none, and "cannot run there".

    Attributes:
        loss: (variants, domains) cross-entropy of each variant on each domain, nats per token.
        latency: (variants, devices) seconds per token (or request: as the limits).
        energy: (variants, devices) joules per token (or request).
        memory: (variants,) bytes; a variant that serves several domains on a device is there once.
        share: (domains,) of the tokens (or requests); energies and losses are weighed by it.
        latency_limit: (domains,) seconds.
        energy_limit: (devices,) joules per token (or request) of all traffic, for what a device serves.
        memory_limit: (devices,) bytes.
        variants, domains, devices: their names, for messages; empty = numbered.
    """

    loss: FloatArray
    latency: FloatArray
    energy: FloatArray
    memory: FloatArray
    share: FloatArray
    latency_limit: FloatArray
    energy_limit: FloatArray
    memory_limit: FloatArray
    variants: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        models, kinds = np.shape(self.loss)
        machines = np.shape(self.latency)[-1]
        shapes = {
            "latency": (models, machines), "energy": (models, machines), "memory": (models,), "share": (kinds,),
            "latency_limit": (kinds,), "energy_limit": (machines,), "memory_limit": (machines,),
        }  # fmt: skip
        for name, shape in shapes.items():
            if np.shape(getattr(self, name)) != shape:
                raise PlanError(f"{name} has shape {np.shape(getattr(self, name))}; it is {shape}")
        for name in ("loss", *shapes):
            values = np.asarray(getattr(self, name), np.float64)
            if np.isnan(values).any() or values.min(initial=0) < 0:
                raise PlanError(f"{name} holds {values.min():g}: give numbers of 0 or more")
        for name in ("loss", "energy", "memory", "share"):
            if not np.isfinite(getattr(self, name)).all():
                raise PlanError(f"{name} holds an infinite number; where a variant cannot run, its latency says so")

    def name(self, what: str, index: int) -> str:
        """In words."""
        names: tuple[str, ...] = getattr(self, f"{what}s")
        return f"{what} {names[index]!r}" if names else f"{what} {index}"

    def allowed(self) -> NDArray[np.bool_]:
        """(domains, variants, devices) fast enough."""
        limit = np.asarray(self.latency_limit)[:, None, None] * (1 + ROUNDING)
        fast = np.asarray(self.latency)[None] <= limit
        allowed: NDArray[np.bool_] = fast & np.isfinite(self.latency)[None]
        return allowed


@dataclass(frozen=True)
class Assignment:
    """What serves what.

    Attributes:
        variant: (domains,) the variant that serves each domain.
        device: (domains,) where.
        loss: expected cross-entropy, nats per token, over all domains.
        energy: (devices,) used, in the unit of the limits.
        memory: (devices,) bytes used.
    """

    variant: tuple[int, ...]
    device: tuple[int, ...]
    loss: float
    energy: FloatArray
    memory: FloatArray


def assign(choices: Choices) -> Assignment:
    """The assignment of least expected cross-entropy. Of equally good ones, the one that the solver finds.

    Raises:
        PlanError: none meets the limits; the message names the limit that stands in the way.
    """
    slow = ~choices.allowed().any(axis=(1, 2))
    if slow.any():
        domain = int(np.flatnonzero(slow)[0])
        raise PlanError(
            f"{choices.name('domain', domain)} wants {choices.latency_limit[domain]:g} seconds and the fastest variant"
            f" takes {np.min(choices.latency):g}: allow more, or add a faster device or variant"
        )
    chosen = _solved(choices)
    if chosen is None:
        raise PlanError(_what_binds(choices))
    return described(choices, *chosen)


def described(choices: Choices, variant: tuple[int, ...], device: tuple[int, ...]) -> Assignment:
    """What an assignment costs."""
    energy, memory = np.zeros(len(choices.energy_limit)), np.zeros(len(choices.memory_limit))
    for domain, (model, machine) in enumerate(zip(variant, device, strict=True)):
        energy[machine] += choices.share[domain] * choices.energy[model, machine]
    for model, machine in set(zip(variant, device, strict=True)):
        memory[machine] += choices.memory[model]
    loss = float(np.dot(choices.share, choices.loss[list(variant), np.arange(len(variant))]) / choices.share.sum())
    return Assignment(variant, device, loss, energy, memory)


def feasible(choices: Choices, found: Assignment) -> bool:
    """Whether an assignment meets all limits."""
    allowed = choices.allowed()
    fast = all(
        allowed[domain, model, machine]
        for domain, (model, machine) in enumerate(zip(found.variant, found.device, strict=True))
    )
    return bool(
        fast
        and (found.energy <= choices.energy_limit * (1 + ROUNDING)).all()
        and (found.memory <= choices.memory_limit * (1 + ROUNDING)).all()
    )


def _solved(choices: Choices) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """(variant of each domain, device of each domain), or None where nothing meets the limits."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import lil_array

    allowed = choices.allowed()
    domains, models, machines = allowed.shape
    places = models * machines
    serve, there = domains * places, places  # variables: x[domain, variant, device], then y[variant, device]
    one = lil_array((domains, serve + there))
    held = lil_array((places, serve + there))
    energy, memory = lil_array((machines, serve + there)), lil_array((machines, serve + there))
    for domain in range(domains):
        one[domain, domain * places : (domain + 1) * places] = 1
    for place in range(places):
        model, machine = divmod(place, machines)
        held[place, [domain * places + place for domain in range(domains)]] = 1
        held[place, serve + place] = -domains
        memory[machine, serve + place] = choices.memory[model] / _scale(choices.memory_limit[machine])
        for domain in range(domains):
            cost = choices.share[domain] * choices.energy[model, machine]
            energy[machine, domain * places + place] = cost / _scale(choices.energy_limit[machine])
    cost = (np.asarray(choices.share)[:, None, None] * np.asarray(choices.loss).T[:, :, None]) * np.ones(machines)
    upper = np.append(allowed.reshape(-1).astype(float), np.ones(there))
    limits: list[Any] = [
        LinearConstraint(one.tocsr(), 1, 1), LinearConstraint(held.tocsr(), -np.inf, 0),
        LinearConstraint(energy.tocsr(), -np.inf, _scaled(choices.energy_limit)),
        LinearConstraint(memory.tocsr(), -np.inf, _scaled(choices.memory_limit)),
    ]  # fmt: skip
    answer = milp(
        np.append(cost.reshape(-1), np.zeros(there)), integrality=np.ones(serve + there), bounds=Bounds(0, upper),
        constraints=limits, options={"mip_rel_gap": 0.0},
    )  # fmt: skip
    if answer.x is None:
        return None
    best = np.argmax(answer.x[:serve].reshape(domains, places), axis=1)
    return tuple(int(one) for one in best // machines), tuple(int(one) for one in best % machines)


def _what_binds(choices: Choices) -> str:
    """The first limit without which it would work, in words."""
    for kind, unit in (("memory", "bytes"), ("energy", "joules")):
        limits = np.asarray(getattr(choices, f"{kind}_limit"), np.float64)
        for device in range(len(limits)):
            lifted = limits.copy()
            lifted[device] = np.inf
            found = _solved(replace(choices, **{f"{kind}_limit": lifted}))  # type: ignore[arg-type]
            if found is not None:
                need = getattr(described(choices, *found), kind)[device]
                return (
                    f"nothing meets all limits: {choices.name('device', device)} has {_figure(limits[device])} {unit}"
                    f" of {kind}, and with {_figure(need)} there would be a solution"
                )
        if _solved(replace(choices, **{f"{kind}_limit": np.full_like(limits, np.inf)})) is not None:  # type: ignore[arg-type]
            return f"nothing meets all limits: the {kind} of several devices is too small; give several of them more"
    return "nothing meets all limits: memory and energy stand in the way together; allow more of both, or more time"


def _figure(value: float) -> str:
    """Bytes in full, since a figure that is rounded down would not do; small figures as they are."""
    return f"{int(np.ceil(value)):,}" if value >= 1e6 else f"{value:g}"


def _scale(limit: float) -> float:
    return float(limit) if np.isfinite(limit) and limit > 0 else 1.0


def _scaled(limits: FloatArray) -> FloatArray:
    """Limits over their scale: 1, 0 or infinite."""
    values = np.asarray(limits, np.float64)
    return np.where(np.isfinite(values), np.where(values > 0, 1.0 + ROUNDING, 0.0), np.inf)
