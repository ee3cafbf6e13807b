"""What-if routing: rules that change how many experts a token uses, or which, tried on a recorded trace.

No model runs: every layer is asked what the rule would make of the inputs that it had. What a change in one layer does
to the inputs of the next, and to the loss, only a live run says.
"""

from planner.simulate.what_if.advice import Advice, advice
from planner.simulate.what_if.outcome import Certainty, Refused, WhatIf
from planner.simulate.what_if.registry import METHODS, Method, method_named
from planner.simulate.what_if.trial import refusal, what_if

__all__ = [
    "METHODS",
    "Advice",
    "Certainty",
    "Method",
    "Refused",
    "WhatIf",
    "advice",
    "method_named",
    "refusal",
    "what_if",
]
