"""Several rows of a router for one stored expert (form ``shared`` of merges): the map that stands between the two.

The router chooses as it always did. Just before the experts run, the ids that it chose become the places of the stored
experts; a token that chose two members of a group runs their expert twice, which adds their gate weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compressor.families.adapters import Adapter
from compressor.families.calls import read_call

EXPERT_MAP = "moescope_expert_map"
"""Field of a configuration: number of a decoder layer, as text -> for each row of its router the stored expert."""


class ExpertMap:
    """A forward pre-hook of an experts module that is called with (hidden, ids, weights), in that order.

    Args:
        places: for each row of the router the place of its expert.
        weightless: experts without weights, whose ids follow behind. One id more may stand for no expert, in the
            library as in single families.
    """

    def __init__(self, places: Sequence[int], weightless: int = 0) -> None:
        import torch

        self.places = tuple(places)
        behind = range(max(self.places) + 1, max(self.places) + 2 + weightless)
        # On the CPU whatever the default device is: models are built on one without memory.
        self.table = torch.tensor([*self.places, *behind], dtype=torch.int64, device="cpu")

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """The call with the places in the place of the ids."""
        if len(args) > 1:
            return (args[0], self._stored(args[1]), *args[2:]), kwargs
        name = list(kwargs)[1 - len(args)]
        return args, {**kwargs, name: self._stored(kwargs[name])}

    def _stored(self, ids: Any) -> Any:
        if self.table.device != ids.device:
            self.table = self.table.to(ids.device)
        return self.table[ids.long()].to(ids.dtype)


def expert_map_of(module: Any) -> tuple[int, ...] | None:
    """The map before an experts module; None where its experts and the rows of its router are one to one."""
    hooks = getattr(module, "_forward_pre_hooks", {}).values()
    return next((hook.places for hook in hooks if isinstance(hook, ExpertMap)), None)


def takes_expert_map(adapter: Adapter) -> bool:
    """Whether modules of this kind are called so that a map can stand before them."""
    return adapter.read is read_call and adapter.method == "forward" and not adapter.packed
