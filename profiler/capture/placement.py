"""Where the weights of a model go: one device, several, or partly to disk. What cannot fit is refused beforehand."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moescope.errors import InputError, ModelError

GIB = 1 << 30
STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}


@dataclass
class Placement:
    """Where a model is loaded.

    Attributes:
        device: the device that the whole model goes to, where there is no device map.
        device_map: a strategy of accelerate's, or (module path -> device); None for one device.
        memory: bytes of weights that each device may hold; None for no limit.
        offload_folder: where weights that fit no device are written; None for a temporary one, gone with the model.
        temporary: that temporary one, once it is made.
    """

    device: str
    device_map: str | dict[str, Any] | None = None
    memory: dict[int | str, int] | None = None
    offload_folder: Path | None = None
    temporary: Path | None = None

    def at_once(self) -> Placement:
        """The same for packed weights: they are laid out for the GPU that they are loaded on, and not moved there."""
        if self.device_map is not None or not self.device.startswith("cuda"):
            return self
        return replace(self, device_map={"": self.device})

    @contextmanager
    def loading(self) -> Iterator[dict[str, Any]]:
        """Arguments for ``from_pretrained``; a temporary folder does not outlive a loading that fails."""
        try:
            yield self._options()
        except BaseException:
            if self.temporary is not None:
                shutil.rmtree(self.temporary, ignore_errors=True)
            raise

    def _options(self) -> dict[str, Any]:
        if self.device_map is None:
            return {}
        options: dict[str, Any] = {"device_map": self.device_map}
        if self.memory is not None:
            options["max_memory"] = self.memory
        if self.memory is not None or "disk" in _devices(self.device_map):
            if self.offload_folder is None:
                self.offload_folder = self.temporary = Path(tempfile.mkdtemp(prefix="moescope-offload-"))
            options["offload_folder"] = str(self.offload_folder)
        return options

    def belongs_to(self, model: nn.Module) -> None:
        """Remove a temporary folder of offloaded weights when the model is gone."""
        if self.temporary is not None:
            weakref.finalize(model, shutil.rmtree, self.temporary, ignore_errors=True)


def plan_placement(
    device: str = "auto",
    device_map: str | Mapping[str, Any] | None = None,
    memory_limit: str | int | Mapping[int | str, str | int] | None = None,
    offload_folder: str | Path | None = None,
) -> Placement:
    """Where a model is to be loaded, from what the user asked for.

    Args:
        device: a device, or ``auto``: the GPU if there is one, all if there are several.
        device_map: one of :data:`STRATEGIES`, a device for everything, or module path -> device (also as JSON text);
            ``disk`` is a device too.
        memory_limit: weights that each device may hold, such as ``20GiB``, or one size per device; what is left goes
            to disk. It implies the device map ``auto``.
        offload_folder: where that is written.

    Raises:
        InputError: a device map or a size that cannot be read.
        ModelError: accelerate is needed for it and not installed.
    """
    folder = None if offload_folder is None else Path(offload_folder)
    placement = Placement(device="cpu", offload_folder=folder)
    if device_map is None and memory_limit is None:
        several = torch.cuda.device_count() > 1 and importlib.util.find_spec("accelerate") is not None
        if device != "auto" or not several:
            placement.device = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
            return placement
    placement.device_map = parse_device_map(device_map if device_map is not None else "auto")
    placement.memory = None if memory_limit is None else _limits(memory_limit, device)
    if importlib.util.find_spec("accelerate") is None:
        raise ModelError("a device map and a memory limit need the package accelerate: pip install accelerate")
    return placement


def parse_device_map(value: str | Mapping[str, Any]) -> str | dict[str, Any]:
    """A strategy, or module path -> device; a single device becomes ``{"": device}``."""
    if isinstance(value, str) and value.strip().startswith("{"):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise InputError(f"device map {value!r} is no JSON object: {error}") from None
    if isinstance(value, Mapping):
        if not value or not all(isinstance(name, str) for name in value):
            raise InputError(f"device map {value!r} names no modules: give module path -> device")
        places = {name: _known_device(place) for name, place in value.items()}
        inside = [(outer, name) for outer in places for name in places if _holds(outer, name)]
        if inside and "disk" in places.values():
            outer, name = inside[0]
            raise InputError(
                f"device map names {name!r} inside {outer!r}: with a part on disk, every module has to stand under"
                " exactly one path"
            )
        return places
    return value if value in STRATEGIES else {"": _known_device(value)}


def parse_size(value: str | int) -> int:
    """Bytes of ``20GiB``, ``500MB`` or a plain number.

    Raises:
        InputError: no size, or not above zero.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(value))
    if match is None or match[2].lower() not in _UNITS or float(match[1]) <= 0:
        raise InputError(f"{value!r} is no size of memory: write 20GiB, 500MiB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def require_fitting(placement: Placement, *, total: int, largest: int) -> None:
    """Refuse what cannot fit before anything is read.

    Args:
        placement: where the weights are to go.
        total: bytes of all weights as they will be held.
        largest: bytes of the largest decoder layer, which has to be in memory as a whole while it runs.

    Raises:
        InputError: the weights do not fit; the message has both numbers.
    """
    if placement.memory is not None:
        limit = max(placement.memory.values())
        if largest > limit:
            raise InputError(
                f"the largest layer takes {_gib(largest)}, more than the memory limit of {_gib(limit)}: a layer is in"
                " memory as a whole while it runs; raise the limit"
            )
        _require_disk(placement, total - sum(placement.memory.values()))
    elif placement.device_map is None:
        free = _free(placement.device)
        if free is not None and total > free:
            raise InputError(
                f"the weights take {_gib(total)}, but {_gib(free)} of memory are free on {placement.device}: use"
                f" --memory-limit {max(1, int(0.8 * free / GIB))}GiB (the rest goes to disk), --layer-stream or another"
                " --dtype"
            )


def _require_disk(placement: Placement, needed: int) -> None:
    folder = placement.offload_folder or Path(tempfile.gettempdir())
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise InputError(
            f"{_gib(needed)} of the weights do not fit into the memory limit, and {folder} has {_gib(free)} free: raise"
            " --memory-limit, or name another --offload-folder"
        )


def _limits(value: str | int | Mapping[int | str, str | int], device: str) -> dict[int | str, int]:
    if isinstance(value, Mapping):
        sizes: dict[int | str, int] = {}
        for name, size in value.items():
            sizes[int(name) if str(name).isdigit() else name] = parse_size(size)
        return sizes
    devices: list[int | str] = [] if device == "cpu" else list(range(torch.cuda.device_count()))
    return {name: parse_size(value) for name in [*devices, "cpu"]}


def _holds(outer: str, inner: str) -> bool:
    return outer != inner and (not outer or inner.startswith(f"{outer}."))


def _known_device(place: Any) -> Any:
    if place == "disk" or (isinstance(place, int) and place >= 0):
        return place
    try:
        return str(torch.device(place))
    except (RuntimeError, TypeError):
        raise InputError(
            f"{place!r} is no device: use {', '.join(STRATEGIES)}, cpu, cuda:0, disk or a JSON object of these"
        ) from None


def _devices(device_map: str | dict[str, Any]) -> set[Any]:
    return set(device_map.values()) if isinstance(device_map, dict) else set()


def _free(device: str) -> int | None:
    """Bytes free on a device; None where nothing says so."""
    if device.startswith("cuda") and torch.cuda.is_available():
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    if device == "cpu":
        try:
            text = Path("/proc/meminfo").read_text(encoding="ascii")
        except OSError:
            return None
        match = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
        return int(match[1]) << 10 if match else None
    return None


def _gib(size: int) -> str:
    return f"{size / GIB:.3g} GiB"
