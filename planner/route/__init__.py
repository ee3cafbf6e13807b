"""Plans that change the choice of the router while the model runs: more, fewer or other experts per token. No torch.

::

    plan = make(run, rule="top_p", value=0.5)                  # fewer experts where few suffice
    plan = make(run, rule="bias", biases={(3, 0): [...]})      # logits shifted in one layer
    plan = balance(run, layers=[2, 3])                         # biases that even out the load
"""

from planner.route.balance import Balanced, balanced
from planner.route.entry import balance, make

__all__ = ["Balanced", "balance", "balanced", "make"]
