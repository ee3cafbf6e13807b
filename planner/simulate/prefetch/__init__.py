"""Prefetching: experts foreseen for a layer while an earlier one runs, how often that is right, and what it saves.

::

    train, test = work.halves()                            # whatever is fitted is fitted on other requests
    foreseen = find("transitions").predict(test, train=train, ahead=1, width=10)
    score(foreseen, test, slots=16).recall_of_missing      # of the experts that a cache lacks
    replay_prefetch(test, foreseen, slots=16).outcome      # the same cache, with the predictions fetched

Every method is one file with ``predict(workload, *, train, ahead, width, ...) -> Predicted`` and one line here.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from moescope.errors import PlanError

if TYPE_CHECKING:
    from planner.simulate.prefetch.predicted import Predicted


@dataclass(frozen=True)
class Method:
    """What one way to foresee experts is.

    Attributes:
        name: how it is asked for; also the name of its module.
        title: in words.
        source: where it was published.
        needs: arguments that it takes beside ``train``, ``ahead`` and ``width`` and cannot do without.
        drawn: it foresees nothing itself: true routes are corrupted, at a rate that was measured or is given.
    """

    name: str
    title: str
    source: str
    needs: tuple[str, ...] = ()
    drawn: bool = False

    @property
    def predict(self) -> Callable[..., Predicted]:
        """``predict(workload, *, train, ahead, width, ...)``."""
        module = importlib.import_module(f"planner.simulate.prefetch.{self.name}")
        return cast("Callable[..., Predicted]", module.predict)


METHODS: tuple[Method, ...] = (
    Method("popularity", "Popular experts", "baseline"),
    Method("previous_token", "Experts of the token before", "baseline"),
    Method("transitions", "Transition tables", "EdgeMoE, arXiv 2308.14352; ours: back-off"),
    Method("activation_matrix", "Activation matrices", "MoE-Infinity, arXiv 2401.14361"),
    Method("token_frequency", "Frequencies by token id", "ours", ("tokens", "train_tokens")),
    Method("cross_layer_gate", "The next layers' routers", "HOBBIT, arXiv 2411.01433; Fate, arXiv 2502.12224",
           ("recorded",), True),
    Method("corrupted", "Routes of a given accuracy", "ExpertFlow, arXiv 2410.17954; Read-ME, arXiv 2410.19123",
           ("accuracy",), True),
)  # fmt: skip
"""All of them, baselines first."""


def find(name: str) -> Method:
    """The method of that name.

    Raises:
        PlanError: there is none; the message names the nearest.
    """
    known = {one.name: one for one in METHODS}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
        raise PlanError(f"no way to prefetch {name!r}: {hint}")
    return known[name]
