"""A model without weights, and the weights of any part of it, read when they are wanted and let go afterwards.

The model is built from its configuration on the meta device. What the library's own conversion mapping says about names
and about experts that are stored one by one is planned once. Experts that are only stacked are read straight into their
place in the fused tensor; anything else is read tensor by tensor and goes through the library's own operations.
"""

from __future__ import annotations

import copy
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moescope.errors import ModelError
from profiler.stream.files import StoredTensor, bytes_of, expect, read, read_into, read_sampled, stored_tensors


@dataclass
class Source:
    """Where a weight of the model, or several that are stored as one, come from.

    Attributes:
        converter: the library's operations; None where the tensor is stored as it is used.
        parts: stored tensors by the pattern of the conversion mapping that they match.
        targets: names of the weights that come out.
    """

    converter: Any = None
    parts: dict[str, list[StoredTensor]] = field(default_factory=lambda: defaultdict(list))
    targets: tuple[str, ...] = ()

    @property
    def stored(self) -> list[StoredTensor]:
        """All stored tensors."""
        return [tensor for tensors in self.parts.values() for tensor in tensors]

    @property
    def size(self) -> int:
        """Bytes in the files."""
        return sum(tensor.size for tensor in self.stored)


class Checkpoint:
    """The weights of a model on the meta device.

    Args:
        folder: folder of the checkpoint.
        model: the model; :meth:`load` fills its parameters and :meth:`unload` empties them.
        device: where loaded weights go.

    Attributes:
        folder: the folder.
        model: the model.
        device: where weights go.
        bytes_read: from files, so far.

    Raises:
        ModelError: a damaged file, or weights of the model that no file has.
    """

    def __init__(self, folder: Path, model: Any, device: torch.device) -> None:
        self.folder, self.device = folder, device
        self.bytes_read = 0
        self.model = model
        self._empty: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
        self._sources = _plan(stored_tensors(folder), model, self._empty)
        self._of: dict[str, Source] = {target: source for source in self._sources for target in source.targets}
        self._pool: dict[Any, list[Tensor]] = defaultdict(list)
        self._require_complete()

    def _require_complete(self) -> None:
        ignored = self.model._keys_to_ignore_on_load_missing or ()
        tied = self.model.all_tied_weights_keys
        missing = sorted(
            name
            for name in self._empty
            if name not in self._of and name not in tied and not any(re.search(pattern, name) for pattern in ignored)
        )
        if missing:
            raise ModelError(
                f"{self.folder} lacks {len(missing)} weights, such as {missing[0]}: the checkpoint is incomplete or of"
                " another class, and random weights would be profiled"
            )

    def names(self, prefix: str) -> list[str]:
        """The weights of the model under a prefix."""
        return [name for name in self._empty if name.startswith(prefix) and name in self._of]

    def size(self, names: Iterable[str]) -> int:
        """Bytes that weights take in memory while they are loaded, with what their conversion needs meanwhile."""
        held, converting = 0, 0
        for source in self._wanted(names):
            size = sum(_size(self._empty[target]) for target in source.targets)
            held += size
            if not self._in_place(source):
                converting = max(converting, source.size + size)
        return held + converting

    def load(self, names: Sequence[str]) -> None:
        """Read weights into the model.

        Raises:
            ModelError: a file that is cut off, or weights of another shape than the configuration says.
        """
        sources = self._wanted(names)
        direct = [source for source in sources if self._in_place(source)]
        self._keep_in_pool(self._empty[source.targets[0]] for source in direct)
        places: list[tuple[StoredTensor, memoryview]] = []
        loaded: dict[str, Tensor] = {}
        for source in direct:
            target = source.targets[0]
            loaded[target] = self._memory(self._empty[target])
            places += _places(source, loaded[target])
        self.bytes_read += read_into(places)
        for source in sources:
            if not self._in_place(source):
                loaded |= self._convert(source)
                self.bytes_read += source.size
        for name, values in loaded.items():
            self._set(name, values.to(self.device))
            if values.device != self.device:
                self._give_back(values)

    def expect(self, names: Sequence[str]) -> None:
        """Weights that are wanted next."""
        expect(tensor for source in self._wanted(names) for tensor in source.stored)

    def unload(self, names: Sequence[str]) -> None:
        """Take weights out of the model; their memory serves the next that are loaded, or is free."""
        for name in names:
            if self.device.type == "cpu" and self._in_place(self._of[name]):
                self._give_back(self._parameter(name).detach())
            self._replace(name, self._empty[name])

    def forget(self) -> None:
        """Let go the memory that waits for the next weights."""
        self._pool.clear()

    def sampled(self, name: str, places: Sequence[int]) -> Tensor:
        """Single values of a weight that is stored as it is used, without loading it."""
        stored = self._of[name].stored
        return read_sampled(stored[0], places).to(self._empty[name].dtype)

    def _wanted(self, names: Iterable[str]) -> list[Source]:
        return list({id(self._of[name]): self._of[name] for name in names if name in self._of}.values())

    def _in_place(self, source: Source) -> bool:
        """Whether the stored tensors are slices of the weight, so that they can be read to where they belong."""
        if len(source.targets) != 1 or any(
            tensor.dtype != self._empty[source.targets[0]].dtype for tensor in source.stored
        ):
            return False
        shape = tuple(self._empty[source.targets[0]].shape)
        if source.converter is None:
            return source.stored[0].shape == shape
        return _stacked_shape(source) == shape

    def _convert(self, source: Source) -> dict[str, Tensor]:
        if source.converter is None:
            results = {source.targets[0]: read(source.stored[0])}
        else:
            converter = copy.deepcopy(source.converter)
            for pattern, tensors in source.parts.items():
                for tensor in tensors:
                    converter.add_tensor(source.targets[0], tensor.name, pattern, read(tensor))
            results = converter.convert(source.targets[0], model=self.model, config=self.model.config)
        loaded = {}
        for name, value in results.items():
            values = value[0] if isinstance(value, list) else value
            wanted = self._empty.get(name)
            if wanted is None:
                continue
            if values.shape != wanted.shape:
                raise ModelError(
                    f"{self.folder}: {name} has shape {list(values.shape)}, the configuration says"
                    f" {list(wanted.shape)}: the checkpoint is of another model"
                )
            loaded[name] = values.to(wanted.dtype)
        return loaded

    # Where the values are kept

    def _memory(self, like: Tensor) -> Tensor:
        waiting = self._pool.get((like.shape, like.dtype))
        return waiting.pop() if waiting else torch.empty(like.shape, dtype=like.dtype)

    def _give_back(self, values: Tensor) -> None:
        self._pool[(values.shape, values.dtype)].append(values)

    def _keep_in_pool(self, wanted: Iterable[Tensor]) -> None:
        counts = Counter((tensor.shape, tensor.dtype) for tensor in wanted)
        for key, waiting in self._pool.items():
            del waiting[counts[key] :]

    def _parameter(self, name: str) -> Tensor:
        parameter: Tensor = self.model.get_parameter_or_buffer(name)
        return parameter

    def _set(self, name: str, values: Tensor) -> None:
        is_parameter = isinstance(self._empty[name], nn.Parameter)
        self._replace(name, nn.Parameter(values, requires_grad=False) if is_parameter else values)

    def _replace(self, name: str, values: Tensor) -> None:
        path, _, last = name.rpartition(".")
        module = self.model.get_submodule(path)
        holder = module._parameters if last in module._parameters else module._buffers
        holder[last] = values


def _plan(stored: dict[str, StoredTensor], model: Any, expected: dict[str, Tensor]) -> list[Source]:
    """What each weight of the model is read from, by the library's rules for names."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    sources: dict[str, Source] = {}
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, expected)
        if target not in expected and name in expected:
            target, pattern = name, None
        if target not in expected:
            continue
        source = sources.setdefault(target, Source())
        source.targets = (target,)
        if pattern is not None:
            source.converter = by_pattern[pattern]
            source.targets = tuple(_targets(target, source.converter))
        source.parts[pattern or name].append(stored[name])
    return list(sources.values())


def _targets(first: str, converter: Any) -> Iterator[str]:
    for pattern in converter.target_patterns:
        yield first.replace(converter.target_patterns[0], pattern)


def _stacked_shape(source: Source) -> tuple[int, ...] | None:
    """Shape of the weight, if it is nothing but its parts stacked (and those of several patterns side by side)."""
    operations = [(type(entry).__name__, getattr(entry, "dim", None)) for entry in source.converter.operations]
    parts = [source.parts[pattern] for pattern in source.converter.source_patterns if pattern in source.parts]
    shapes = [{tensor.shape for tensor in tensors} for tensors in parts]
    if len(parts) != len(source.converter.source_patterns) or any(len(shape) != 1 for shape in shapes):
        return None
    first = [next(iter(shape)) for shape in shapes]
    if len({len(tensors) for tensors in parts}) != 1:
        return None
    if operations == [("MergeModulelist", 0)] and len(parts) == 1:
        return (len(parts[0]), *first[0])
    if operations == [("MergeModulelist", 0), ("Concatenate", 1)] and len({shape[1:] for shape in first}) == 1:
        return (len(parts[0]), sum(shape[0] for shape in first), *first[0][1:])
    return None


def _places(source: Source, values: Tensor) -> Iterator[tuple[StoredTensor, memoryview]]:
    """Each stored tensor and the bytes of the weight that it fills."""
    memory = bytes_of(values)
    if source.converter is None:
        yield source.stored[0], memory
        return
    parts = [source.parts[pattern] for pattern in source.converter.source_patterns]
    at = 0
    for expert in zip(*parts, strict=True):
        for tensor in expert:
            yield tensor, memory[at : at + tensor.size]
            at += tensor.size


def _size(tensor: Tensor) -> int:
    return prod(tensor.shape) * tensor.element_size()
