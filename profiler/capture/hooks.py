"""All hooks through one owner, so that none stays behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


class Hooks:
    """Hooks on modules. They never return a value: what a hook returns replaces the module's own output."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def before(self, module: nn.Module, see: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]) -> None:
        """Call ``see(module, args, kwargs)`` before each forward of the module."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            see(module, args, kwargs)
            return None  # noqa: RET501  said aloud: anything else would replace the arguments

        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def after(
        self,
        module: nn.Module,
        see: Callable[[nn.Module, tuple[Any, ...], Any], None],
        *,
        always: bool = False,
        first: bool = False,
    ) -> None:
        """Call ``see(module, args, output)`` after each forward, and with ``always`` with None after a failed one."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            see(module, args, output)
            return None  # noqa: RET501  said aloud: anything else would replace the output

        self._handles.append(module.register_forward_hook(hook, always_call=always, prepend=first))

    def remove(self) -> None:
        """Take all of them off; may be called twice."""
        while self._handles:
            self._handles.pop().remove()
