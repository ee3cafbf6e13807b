"""Changes to a loaded model that can be taken back, bit for bit: what was there before is kept, nothing is copied."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compressor.families import ExpertMap


class Journal:
    """Makes changes and remembers how it was. Tensors, modules and lists are replaced by others, never written into.

    Args:
        remember: False where nothing will be taken back, so that what was there can be let go.
    """

    def __init__(self, *, remember: bool = True) -> None:
        self._remember = remember
        self._undo: list[Callable[[], None]] = []

    def tensor(self, module: nn.Module, name: str, value: Tensor) -> None:
        """Another parameter or buffer; dots lead into submodules."""
        path, _, name = name.rpartition(".")
        owner = module.get_submodule(path)
        table = owner._parameters if name in owner._parameters else owner._buffers
        before = table[name]
        if isinstance(before, nn.Parameter):
            value = nn.Parameter(value, requires_grad=before.requires_grad)
        self._entry(table, name, value)

    def attribute(self, owner: Any, name: str, value: Any) -> None:
        """Another value of an instance's own attribute."""
        self._entry(vars(owner), name, value)

    def modules(self, owner: nn.Module, children: dict[str, nn.Module]) -> None:
        """Other children of a list or dictionary of modules."""
        before = dict(owner._modules)

        def put(found: dict[str, Any]) -> None:
            owner._modules.clear()
            owner._modules.update(found)

        self._later(lambda: put(before))
        put(children)

    def expert_map(self, experts: nn.Module, places: Sequence[int], weightless: int) -> None:
        """A map between the router's rows and the stored experts, before the experts run."""
        self.hook(experts.register_forward_pre_hook(ExpertMap(places, weightless), with_kwargs=True))

    def hook(self, handle: RemovableHandle) -> None:
        """A hook that was put on a module."""
        self._later(handle.remove)

    def config(self, config: Any) -> None:
        """From now on, whatever happens to a configuration's own attributes is taken back as well."""
        before = dict(vars(config))

        def put() -> None:
            vars(config).clear()
            vars(config).update(before)

        self._later(put)

    def undo(self) -> None:
        """Put everything back, the last change first."""
        while self._undo:
            self._undo.pop()()

    def _later(self, undo: Callable[[], None]) -> None:
        if self._remember:
            self._undo.append(undo)

    def _entry(self, table: dict[str, Any], name: str, value: Any) -> None:
        before = table[name]
        self._later(lambda: table.update({name: before}))
        table[name] = value
