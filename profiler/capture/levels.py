"""What can be recorded, by the names that users give on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from moescope.errors import InputError

LEVELS = {
    "routing": "selections, gate weights and router scores of every token",
    "activations": "what the experts put out, their neurons, and the residual stream",
    "similarity": "all experts on the same sample of tokens, and how alike their weights are",
    "moments": "second moments of what enters the experts",
    "errors": "on a sample of its tokens, what narrower weights do to the output of each expert, per bit width",
    "lookahead": "the routers of later layers on this layer's input",
    "attention": "how much attention the first position draws",
    "predictions": "the token that the model holds most likely to come next, at every position of the text",
    "gradients": "one backward in the same pass: neurons by what the loss would lose",
}
"""The known levels, each with what it adds; every level implies ``routing``."""


@dataclass(frozen=True)
class RecordingOptions:
    """What is recorded beside the sums that a level always has.

    Attributes:
        levels: see :data:`LEVELS`.
        vectors_per_domain: keep vectors per neuron, channel and pair of experts apart by domain.
        router_scores: keep the largest router scores of every token: how many, 0 for none, -1 for k + 8.
        similarity_every: level similarity runs all experts on one token of so many.
        errors_every: level errors runs each expert with narrower weights on one of so many of its tokens.
        scores_every: router scores are kept of one of so many sequences, all of its tokens.
        keep_trace: False keeps the sums alone: no selection token by token.
        trace_every: selections are kept of one of so many sequences, all of its tokens.
    """

    levels: Sequence[str] = ("routing",)
    vectors_per_domain: bool = False
    router_scores: int = 0
    similarity_every: int = 16
    errors_every: int = 16
    scores_every: int = 1
    keep_trace: bool = True
    trace_every: int = 1

    def __post_init__(self) -> None:
        if self.router_scores and self.keep_trace and self.scores_every < self.trace_every:
            raise InputError(
                f"router scores of one of {self.scores_every} sequences, selections of one of {self.trace_every}:"
                f" scores say nothing without selections; give --scores-every {self.trace_every} or more"
            )

    def settings(self) -> dict[str, int | bool]:
        """What differs from the default, for table ``run``."""
        defaults = RecordingOptions()
        names = [field.name for field in fields(self) if field.name != "levels"]
        return {name: getattr(self, name) for name in names if getattr(self, name) != getattr(defaults, name)}


def parse_levels(text: str) -> tuple[str, ...]:
    """The levels named in a comma list, in the order of :data:`LEVELS`, with ``routing`` always among them.

    Raises:
        InputError: a level that is not known.
    """
    names = {part.strip() for part in text.split(",") if part.strip()}
    unknown = sorted(names - set(LEVELS))
    if unknown:
        raise InputError(f"level {unknown[0]!r} is not known: use a comma list of {', '.join(LEVELS)}")
    return tuple(level for level in LEVELS if level in names | {"routing"})
