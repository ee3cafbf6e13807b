"""Every policy that a replay takes: from where it is, and what it needs. Plain data."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

from moescope.errors import PlanError
from planner.simulate.policies.job import Served

Need = Literal["ids", "weights", "requests"]


@dataclass(frozen=True)
class Policy:
    """One way to choose which expert makes room.

    Attributes:
        name: how it is asked for.
        title: its section in docs/caching.md.
        target: module and function, ``module:function``.
        source: where it was published, or whose code it is.
        needs: what the trace must hold beside which experts were used: gate weights, or where requests begin and end.
        fitted: it learns from a training workload, whose requests must not be those that it is scored on: from
            ``train``, or for ``hobbit`` by ``fit_hobbit``, whose weights are then a parameter.
        engine: which engine ships it; empty = none that we know of.
        bound: it knows the future: what no engine can do, and none can beat.
        differs: ours differs from what was published or is not verified, and the function says how.
    """

    name: str
    title: str
    target: str
    source: str
    needs: tuple[Need, ...] = ("ids",)
    fitted: bool = False
    engine: str = ""
    bound: bool = False
    differs: bool = False

    @property
    def function(self) -> Callable[..., Served]:
        """``function(job, **parameters)`` -> Served."""
        module, name = self.target.split(":")
        found = getattr(importlib.import_module(f"planner.simulate.policies.{module}"), name)
        return cast(Callable[..., Served], found)

    @property
    def docs_anchor(self) -> str:
        """Anchor of the policy's section in docs/caching.md."""
        return "".join(letter for letter in self.title.lower().replace(" ", "-") if letter.isalnum() or letter in "-_")


_I: tuple[Need, ...] = ("ids",)
_R: tuple[Need, ...] = ("ids", "requests")
_WR: tuple[Need, ...] = ("ids", "weights", "requests")
_MI = "arXiv 2401.14361 and its code"

# fmt: off
POLICIES: tuple[Policy, ...] = (
    Policy("static", "Static placement", "static:static", "KTransformers", _I, True, "KTransformers"),
    Policy("lru", "Least recently used", "ranked:lru", "standard", _I, False, "mixtral-offloading"),
    Policy("lfu", "Least frequently used", "ranked:lfu", "standard", _I),
    Policy("lfu_in_cache", "Least frequently used while cached", "ranked:lfu_in_cache", "standard", _I, False,
           "MoE-Infinity"),
    Policy("weighted", "Least used by tokens", "ranked:weighted", "DALI", _I, differs=True),
    Policy("arc", "ARC", "lists:arc", "Megiddo and Modha, FAST 2003", _I),
    Policy("mixtral_offloading", "Mixtral offloading", "ranked:mixtral_offloading", "arXiv 2312.17238 and its code", _I,
           False, "mixtral-offloading"),
    Policy("moe_infinity", "MoE-Infinity", "moe_infinity:moe_infinity", _MI, _R, True, "MoE-Infinity", differs=True),
    Policy("hobbit", "HOBBIT", "hobbit:hobbit", "arXiv 2411.01433", _WR, True, differs=True),
    Policy("edgemoe", "EdgeMoE", "ranked:edgemoe", "arXiv 2308.14352", _I, differs=True),
    Policy("fate", "Fate", "lists:fate", "arXiv 2502.12224", _I, differs=True),
    Policy("window", "Known window", "ranked:window", "Read-ME, arXiv 2410.19123", _I, bound=True, differs=True),
    Policy("min_set", "Best possible with sets", "ranked:min_set", "Belady, 1966, for sets; ours", _I, bound=True),
)
# fmt: on


def policy(name: str) -> Policy:
    """The policy of that name.

    Raises:
        PlanError: there is none.
    """
    found = next((one for one in POLICIES if one.name == name), None)
    if found is None:
        names = [one.name for one in POLICIES]
        close = difflib.get_close_matches(name, names, 1)
        raise PlanError(f"no cache policy is called {name!r}; {f'did you mean {close[0]!r}? ' if close else ''}"
                        f"There are {', '.join(names)}")  # fmt: skip
    return found
