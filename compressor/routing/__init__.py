"""Other experts than the router chose, on a loaded model: the rules, and the hooks that put them before the experts.

The rules that a sweep tries are the rules that ``compressor.load`` applies: one list.
"""

from compressor.routing.choice import Choice, Taken
from compressor.routing.gates import Gate
from compressor.routing.hook import Reroute, Routing, install, reroute_of, rerouted
from compressor.routing.rules import Bias, MaskTop, NullExperts, Odp, Rank, Ratio, Rule, Threshold, TopK, TopP
from compressor.routing.steps import put_before, rules_of, stated_route

__all__ = [
    "Bias",
    "Choice",
    "Gate",
    "MaskTop",
    "NullExperts",
    "Odp",
    "Rank",
    "Ratio",
    "Reroute",
    "Routing",
    "Rule",
    "Taken",
    "Threshold",
    "TopK",
    "TopP",
    "install",
    "put_before",
    "reroute_of",
    "rerouted",
    "rules_of",
    "stated_route",
]
