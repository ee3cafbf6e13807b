"""The stacks of layers that hold experts: a run watches one of them, the language decoder unless told otherwise."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from moescope.errors import InputError, ModelError

DECODER = "decoder"
_WORDS = {
    "vision": ("vision", "visual", "image", "vit"),
    "audio": ("audio", "speech"),
    "talker": ("talker",),
    "code2wav": ("code2wav",),
    "mtp": ("mtp",),
    "encoder": ("encoder",),
}
"""What a part of a module's path says about the stack that it stands in; nothing of all this: the language decoder."""


@dataclass
class Stack:
    """A list of layers with experts of one kind.

    Attributes:
        name: what people call it: decoder | encoder | vision | ...; its path where several are called alike.
        path: of the list in the model.
        experts: paths of the experts modules.
    """

    name: str
    path: str
    experts: list[str] = field(default_factory=list)


def stack_name(path: str) -> str:
    """What the stack around a module is called, by the words in the module's path."""
    parts = re.split(r"[._]", path.lower())
    return next((name for name, words in _WORDS.items() if any(part in words for part in parts)), DECODER)


def find_stacks(found: Sequence[str], modules: Mapping[str, nn.Module]) -> list[Stack]:
    """The stacks that experts modules stand in. ERNIE-VL has text and vision experts in one list: two stacks.

    Raises:
        ModelError: an experts module stands in no list of layers.
    """
    stacks: dict[tuple[str, str], Stack] = {}
    for name in found:
        match = re.search(r"^(.*?)\.\d+\.", name)
        while match and not isinstance(modules[match[1]], nn.ModuleList):
            match = re.search(rf"^({re.escape(match[0])}.*?)\.\d+\.", name)
        if match is None:
            raise ModelError(f"{name} ({type(modules[name]).__name__}) stands in no list of decoder layers")
        key = (stack_name(name), match[1])
        stacks.setdefault(key, Stack(*key)).experts.append(name)
    counts = Counter(stack.name for stack in stacks.values())
    for stack in stacks.values():
        stack.name = stack.name if counts[stack.name] == 1 else stack.path
    return list(stacks.values())


def choose_stack(stacks: Sequence[Stack], wanted: str | None) -> Stack:
    """The stack of that name or path; without one the language decoder, or the only one that there is.

    Raises:
        InputError: no stack of that name; the message lists those that there are.
        ModelError: none is named, and there are several that it may be.
    """
    listed = ", ".join(f"{stack.name} ({stack.path})" if stack.name != stack.path else stack.path for stack in stacks)
    if wanted is not None:
        chosen = [stack for stack in stacks if wanted in (stack.name, stack.path)]
        if len(chosen) != 1:
            raise InputError(f"stack {wanted!r} is none of the model's stacks of MoE layers: {listed}")
        return chosen[0]
    main = [stack for stack in stacks if stack.name == DECODER] or list(stacks)
    if len(main) > 1:
        raise ModelError(f"the model has several stacks of MoE layers, choose one by stack=: {listed}")
    return main[0]
