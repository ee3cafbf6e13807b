"""A checkpoint folder: its configuration, its safetensors files, and reading any range of any tensor."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.checkpoint.headers import Entry, read_header, size_of
from compressor.families.plausible import require_plausible
from compressor.packed.entries import PackedEntry
from moescope.errors import ModelError, RunError

if TYPE_CHECKING:
    from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder, opened for reading only.

    Attributes:
        folder: the folder.
        config: what ``config.json`` says.
        shards: file -> its tensors in the order of their bytes.
        metadata: file -> metadata of its header.
        indexed: there is an index beside the files.
    """

    folder: Path
    config: dict[str, Any]
    shards: dict[str, list[Entry]] = field(repr=False)
    metadata: dict[str, dict[str, str]] = field(repr=False)
    indexed: bool

    @staticmethod
    def open(folder: str | Path) -> Checkpoint:
        """Read configuration, index and all headers.

        Raises:
            ModelError: no checkpoint of safetensors files, a file that is missing or damaged.
        """
        path = locate(folder)
        config = _read_json(path / "config.json")
        require_plausible(config, str(path / "config.json"))
        names, indexed = _file_names(path)
        shards, metadata = {}, {}
        for name in names:
            shards[name], metadata[name] = read_header(path / name)
        checkpoint = Checkpoint(path, config, shards, metadata, indexed)
        if indexed:
            _compare_with_index(checkpoint)
        seen: dict[str, str] = {}
        for name, entries in shards.items():
            for entry in entries:
                if entry.name in seen:
                    raise ModelError(f"{entry.name} stands in two files of {path}: {seen[entry.name]} and {name}")
                seen[entry.name] = name
        return checkpoint

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """All tensors by name."""
        return {entry.name: entry for entries in self.shards.values() for entry in entries}

    @property
    def bytes_on_disk(self) -> int:
        """Size of all safetensors files."""
        return sum(os.stat(self.folder / name).st_size for name in self.shards)

    @property
    def identity(self) -> str:
        """Digest of the configuration and of name, size and time of change of every file."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name in sorted(self.shards):
            stat = os.stat(self.folder / name)
            digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
        return digest.hexdigest()


def locate(source: str | Path) -> Path:
    """The folder of a checkpoint: a path, or a hub id whose files are in the hub's cache.

    Raises:
        ModelError: there is neither.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise ModelError(f"{source} is a file: name the folder of the checkpoint")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(source), local_files_only=True)).resolve()
    except Exception as error:  # the hub's client raises many kinds; all mean that it is not there
        raise ModelError(
            f"{source} is no folder, and no model in the cache of the hub: download it first (hf download {source})"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path.parent} is no checkpoint: it has no {path.name}") from error
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} is damaged: it holds no object")
    return content


def _file_names(folder: Path) -> tuple[list[str], bool]:
    """The weight files that the model is made of."""
    if (folder / INDEX).exists():
        table = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
            raise ModelError(f"{folder / INDEX} is damaged: it has no weight_map")
        names = sorted(set(table.values()))
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise ModelError(f"{folder / INDEX} names {outside[0]!r}, which is no file of the folder")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelError(
                f"{folder} lacks {missing[0]}"
                + (f" and {len(missing) - 1} more files" if len(missing) > 1 else "")
                + " that its index names: download the checkpoint again"
            )
        return names, True
    if (folder / SINGLE).is_file():
        return [SINGLE], False
    others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".gguf"))
    if others:
        raise ModelError(f"{folder} keeps its weights as {others[0]}: save the model as safetensors first")
    raise ModelError(f"{folder} has neither {SINGLE} nor {INDEX}")


def _compare_with_index(checkpoint: Checkpoint) -> None:
    table = _read_json(checkpoint.folder / INDEX)["weight_map"]
    found = {entry.name: name for name, entries in checkpoint.shards.items() for entry in entries}
    for name, file in table.items():
        if found.get(name) != file:
            where = f"is in {found[name]}" if name in found else "is nowhere"
            raise ModelError(f"the index of {checkpoint.folder} says that {name} is in {file}; it {where}")
    extra = next((name for name in found if name not in table), None)
    if extra:
        raise ModelError(f"{found[extra]} of {checkpoint.folder} holds {extra}, which its index does not name")


_TORCH_TYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


class Reader:
    """Open files of a checkpoint, for reading ranges of them; close it behind you."""

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}

    def file(self, path: Path) -> int:
        """Descriptor of a file, opened read-only."""
        if path not in self._files:
            try:
                self._files[path] = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise RunError(f"{path} cannot be read: {error.strerror or error}") from error
        return self._files[path]

    def bytes(self, path: Path, start: int, size: int) -> bytearray:
        """A range of a file."""
        content = bytearray(size)
        view, done, descriptor = memoryview(content), 0, self.file(path)
        while done < size:
            try:
                count = os.preadv(descriptor, [view[done:]], start + done)
            except OSError as error:
                raise RunError(f"{path} cannot be read: {error.strerror or error}") from error
            if not count:
                raise RunError(f"{path} has become shorter while it was read")
            done += count
        return content

    def rows(self, entry: Entry, first: int, count: int) -> Tensor:
        """Rows ``first`` .. ``first + count - 1`` of a tensor along its first axis, with that axis."""
        import torch

        if isinstance(entry, PackedEntry):
            return entry.values(self.tensor)[first : first + count]
        shape = (count, *entry.shape[1:])
        size = size_of(entry.dtype, entry.shape[1:])
        content = self.bytes(entry.file, entry.start + first * size, count * size)
        dtype = getattr(torch, _TORCH_TYPES[entry.dtype])
        return torch.frombuffer(content, dtype=dtype).reshape(shape) if content else torch.empty(shape, dtype=dtype)

    def tensor(self, entry: Entry) -> Tensor:
        """A whole tensor."""
        if not entry.shape:
            return self.rows(replace(entry, shape=(1,)), 0, 1)[0]
        return self.rows(entry, 0, entry.shape[0])

    def close(self) -> None:
        """Close all files."""
        while self._files:
            os.close(self._files.popitem()[1])


@contextmanager
def reading() -> Iterator[Reader]:
    """A reader whose files are closed at the end."""
    reader = Reader()
    try:
        yield reader
    finally:
        reader.close()
