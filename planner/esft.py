"""ESFT: which experts to fine-tune for a domain. It is no plan: nothing is cut.

Source: "Let the expert stick to his last" (arXiv 2407.01906) and its published code, whose configuration files these
are: ``{"experts": {"1": [8, 26]}, "shared_experts": false, "non_expert_modules": false}``, decoder layers as text,
experts in descending score.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import planner.importance as importance
import store
from moescope.errors import PlanError

PUBLISHED = {"token": 0.2, "gate": 0.1}
"""p by score: that of the token ratio stands in the code's README; that of the gate score is unverified."""


def esft(
    run: store.Run,
    *,
    domain: str | None = None,
    score: Literal["token", "gate"] = "token",
    share: float | None = None,
    shared_experts: bool = False,
    non_expert_modules: bool = False,
) -> dict[str, Any]:
    """The fewest experts of each layer that reach p of its tokens or gate weights, as ESFT's code reads them.

    Args:
        run: a run of level routing.
        domain: the text that counts; None = all of the run's.
        score: ``token`` = token ratio, ``gate`` = gate score.
        share: p, above 0 and at most 1; None = the published one.
        shared_experts: train them too.
        non_expert_modules: train everything else too.

    Raises:
        PlanError: another score, a share outside (0, 1], or a domain that the run has not.
    """
    if score not in PUBLISHED:
        raise PlanError(f"score {score!r} is not known to ESFT: use token or gate")
    scores = importance.score(run, f"esft_{score}", domain=domain)
    chosen = importance.smallest_set(scores, share=PUBLISHED[score] if share is None else share)
    chosen = chosen.filter("chosen").sort(["layer", "value", "expert"], descending=[False, True, False])
    experts = {str(layer): part["expert"].to_list() for (layer,), part in chosen.group_by("layer", maintain_order=True)}
    every: dict[str, list[int]] = {str(one.layer): [] for one in run.layers}
    return {
        "experts": {**every, **experts}, "shared_experts": shared_experts, "non_expert_modules": non_expert_modules,
    }  # fmt: skip


def save(configuration: dict[str, Any], path: str | Path) -> None:
    """Write a configuration where ESFT's code looks for it: ``expert_cfg.json`` of an adapter folder.

    Raises:
        PlanError: it cannot be written.
    """
    try:
        Path(path).write_text(json.dumps(configuration) + "\n", encoding="utf-8")
    except OSError as error:
        raise PlanError(f"{path} cannot be written: {error.strerror or error}") from error
