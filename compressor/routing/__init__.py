"""Other experts than the router chose, on a loaded model: the rules, and the hooks that put them before the experts.

The rules that a sweep tries are the rules that ``compressor.load`` applies: one list.
"""

from compressor.routing.choice import Choice, Taken
from compressor.routing.gates import Gate
from compressor.routing.hook import Routing, install, rerouted
from compressor.routing.rules import Odp, Ratio, Rule, Threshold, TopK

__all__ = ["Choice", "Gate", "Odp", "Ratio", "Routing", "Rule", "Taken", "Threshold", "TopK", "install", "rerouted"]
