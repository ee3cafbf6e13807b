"""What the answer to "will caching pay?" rests on: figures in tables, as the command, the page and a file have them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from moescope.errors import PlanError
from planner.cache.verdict import SizePoint, Verdict


@dataclass(frozen=True)
class CurvePoint:
    """Hit rate of a policy with caches of one size per layer. control: ``observed``, or the name of a control."""

    policy: str
    control: str
    slots: int
    rate: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class WayFigures:
    """A way at the size asked for; low and high are of ``ms``, hit_low and hit_high of the hit rate, where there is no
    prefetching. ms is time by tokens, p95_ms of a whole pass, which gives each sequence one."""

    name: str
    title: str
    policy: str
    misses: str
    needs_trace: bool
    hit_rate: float
    ms: float
    low: float
    high: float
    p95_ms: float
    stalled: float
    loads_per_token: float
    wasted_per_token: float
    chance_ms: float | None
    layer_slots: tuple[int, ...]
    hit_low: float | None = None
    hit_high: float | None = None


@dataclass(frozen=True)
class DomainFigures:
    """The best way by domain; ``alone``: hit rate where nothing but this domain is served.

    Where several sequences are decoded together, requests of several domains share passes: then all figures are of the
    domain served alone.
    """

    domain: str
    tokens: int
    hit_rate: float
    ms: float
    alone: float


@dataclass(frozen=True)
class Study:
    """The answer, and what it rests on.

    Attributes:
        run: name.
        machine: name and title of the machine.
        tokens: replayed for judging; about as many were for fitting.
        requests: that they are from.
        layers: MoE layers; experts: E of one; slots: experts that the device holds; all_slots: experts of all layers.
        memory: bytes of the device by use: total, other, kv, activations, experts, slot.
        notes: what was assumed or estimated.
        curves: hit rates by policy, control and size.
        parts: policy -> what its hit rate at the size asked for is made of: random, popularity, topic, locality.
        points: times by size.
        ways: at the size asked for, the fastest first.
        domains: of the best way that goes by the trace.
        bound_ms: what no policy can beat at the size asked for.
        resident_ms: with all experts on the device, which runs them alone.
        srp: (value, its place, the highest first, among how many published figures); None where the run has none.
        sch: likewise.
        verdict: the answer.
        asked: settings of the study that were given.
    """

    run: str
    machine: tuple[str, str]
    tokens: int
    requests: int
    layers: int
    experts: int
    slots: int
    all_slots: int
    memory: Mapping[str, float]
    notes: tuple[str, ...]
    curves: tuple[CurvePoint, ...]
    parts: Mapping[str, Mapping[str, float]]
    points: tuple[SizePoint, ...]
    ways: tuple[WayFigures, ...]
    domains: tuple[DomainFigures, ...]
    bound_ms: float
    resident_ms: float
    srp: tuple[float, int, int] | None
    sch: tuple[float, int, int] | None
    verdict: Verdict
    asked: Mapping[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> WayFigures:
        """The fastest way."""
        return self.ways[0]

    def content(self) -> dict[str, Any]:
        """As plain data, for a file."""
        return {"kind": "caching", **asdict(self)}

    @staticmethod
    def of(content: Mapping[str, Any]) -> Study:
        """From plain data.

        Raises:
            PlanError: it is no study.
        """
        if not isinstance(content, Mapping) or content.get("kind") != "caching":
            raise PlanError("this is no study of caching by moescope: its kind is not 'caching'")
        try:
            given = {name: value for name, value in content.items() if name != "kind"}
            rows: dict[str, Callable[..., Any]] = {
                "curves": CurvePoint, "points": SizePoint, "ways": WayFigures, "domains": DomainFigures
            }  # fmt: skip
            made: dict[str, Any] = {name: tuple(kind(**row) for row in given.pop(name)) for name, kind in rows.items()}
            made["ways"] = tuple(replace(way, layer_slots=tuple(way.layer_slots)) for way in made["ways"])
            word = given.pop("verdict")
            srp, sch = given.pop("srp"), given.pop("sch")
            return Study(
                **made, verdict=Verdict(**{**word, "reasons": tuple(word["reasons"])}),
                srp=None if srp is None else tuple(srp), sch=None if sch is None else tuple(sch),
                machine=tuple(given.pop("machine")), notes=tuple(given.pop("notes")), **given,
            )  # fmt: skip
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise PlanError(f"this is no study of caching by moescope: {error}") from error
