"""Every published importance score from a run's stored sums alone: no model, no torch, no second pass.

::

    import planner.importance as importance

    importance.score(run, "reap")                        # layer, step, expert, kind, value
    importance.score(run, "camera", alpha=0.9)           # the same with neuron
    importance.score(run, "easy_ep", domain="code")

One file per score, by its published name; ``registry`` lists them in order and ``docs/importance.md`` says what each
one is. A larger value always means: keep it.
"""

from planner.importance.entry import score
from planner.importance.registry import SCORES, Score, find
from planner.importance.selection import smallest_set
from planner.importance.set_error import output_gram, set_error
from planner.importance.statistics import CHANNEL, EXPERT, NEURON, Statistics

__all__ = [
    "CHANNEL",
    "EXPERT",
    "NEURON",
    "SCORES",
    "Score",
    "Statistics",
    "find",
    "output_gram",
    "score",
    "set_error",
    "smallest_set",
]
