"""The methods by name: what each asks of the run, what its values mean, and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from planner.simulate.what_if.outcome import Certainty, Refused

Needs = Literal["gate weights", "router scores", "scores of all experts"]


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        name: as ``what_if`` takes it.
        title: as people read it.
        source: the paper.
        rule: what it does, in one sentence.
        value: what its values are.
        needs: what the run must hold; with ``gate weights`` every token counts.
        certainty: the best that a trace can give.
        skips: it only makes sense where a token has several experts.
        values: the values that are tried where none are given; empty where they follow from the run.
        low: the least value that it takes.
        high: the largest.
    """

    name: str
    title: str
    source: str
    rule: str
    value: str
    needs: Needs
    certainty: Certainty
    skips: bool
    values: tuple[float, ...]
    low: float = 0.0
    high: float = 1.0


METHODS: tuple[Method, ...] = (
    Method(
        "top_p", "Top-p routing", "Dynamic_MoE, arXiv 2403.07652",
        "the fewest experts whose router probability adds up to more than p", "p",
        "gate weights", "exact", True, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95),
    ),
    Method(
        "ratio", "Ratio skipping", "MC-MoE (ODP), arXiv 2410.06270; NAEE, arXiv 2402.14800",
        "of the chosen experts, those with at least so large a part of the largest gate weight", "part of the largest",
        "gate weights", "exact", True, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    ),
    Method(
        "threshold", "Threshold on gate weights", "formula of this project",
        "of the chosen experts, those with at least so large a gate weight", "gate weight",
        "gate weights", "exact", True, (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5), high=float("inf"),
    ),
    Method(
        "null_experts", "Null experts of constant logit", "AdaMoE, arXiv 2406.13233",
        "of the chosen experts, those whose router logit is above b, as if k experts without output had logit b",
        "logit b; mean experts left, where it is fitted", "router scores", "exact", True, (),
        low=float("-inf"), high=float("inf"),
    ),
    Method(
        "top_k", "Another k", "Dynamic Experts Search, arXiv 2509.22572; SMoE-Dropout, ICLR 2023",
        "as many experts as k says, by their router scores", "k", "gate weights", "exact", False, (),
        low=1.0, high=float("inf"),
    ),
    Method(
        "tiers", "Precision tiers", "HOBBIT, arXiv 2411.01433",
        "an expert below whom so much of the gate weight has gone already comes in low precision, or not at all",
        "T1: gate weight above, up to which precision is high", "gate weights", "exact", True,
        (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    ),
    Method(
        "bias", "Additive rerouting", "Rewiring Experts on the Fly, arXiv 2510.14853",
        "the largest of the router's logits plus a vector, as many as before", "factor on the vector",
        "router scores", "exact", False, (0.25, 0.5, 1.0, 2.0), low=float("-inf"), high=float("inf"),
    ),
    Method(
        "smoothing", "Neighbour smoothing", "Similarity- and attention-aware SMoE, arXiv 2505.00792",
        "router probabilities mixed with those of like tokens before", "lambda: share of the token's own",
        "router scores", "proxy", False, (0.9, 0.7, 0.5, 0.3),
    ),
    Method(
        "sinkhorn", "Sinkhorn balance", "Selective Sinkhorn Routing, arXiv 2511.08972",
        "the largest entries of the transport plan that gives all experts of a batch the same mass", "tokens per batch",
        "scores of all experts", "exact", False, (1024.0,), low=2.0, high=float("inf"),
    ),
)  # fmt: skip


def method_named(name: str) -> Method:
    """A method by its name.

    Raises:
        Refused: there is none of that name.
    """
    for one in METHODS:
        if one.name == name:
            return one
    raise Refused(f"no method {name!r}; there are {', '.join(one.name for one in METHODS)}")
