"""Switch Transformers: experts are modules of their own, and take so many tokens of a sequence and no more.

A token that comes too late for its expert passes no expert at all: its id is -1. Such drops are a part of the model.
"""

from __future__ import annotations

from compressor.families.calls import Call, Selection, flat
from compressor.families.separate import separate_layout

switch_layout = separate_layout("wi", "wo", expert="expert_{}", activation="act")
"""The layout of ``SwitchTransformersExperts``."""


def read_switch(call: Call) -> Selection:
    """``experts(hidden, mask, weights)`` with a one-hot mask (tokens, 1, E), all 0 where the token was dropped."""
    hidden, mask, weights = (*call.args, *call.kwargs.values())[:3]
    taken = mask.sum(-1) > 0
    ids = mask.argmax(-1).where(taken, -1)
    return Selection(flat(hidden), ids, flat(weights) * taken)
