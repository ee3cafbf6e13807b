"""From physical replicas to logical experts: engines that balance load may place an expert several times."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.errors import ImportFileError
from profiler.importers.npy import read_header

MAX_BYTES = 1 << 27


@dataclass(frozen=True)
class ReplicaMap:
    """Which expert each replica is: ``experts`` (layers, replicas)."""

    experts: NDArray[np.int64]
    num_experts: int

    @classmethod
    def of(cls, values: NDArray[Any], path: Path) -> ReplicaMap:
        """Check a map: every layer places every expert at least once.

        Raises:
            ImportFileError: it has another shape, or leaves an expert out.
        """
        experts = np.asarray(values)
        if experts.ndim != 2 or not experts.size or not np.issubdtype(experts.dtype, np.integer):
            raise ImportFileError(
                f"{path}: the map of replicas is {experts.dtype} {experts.shape}, not (layers, replicas)"
            )
        low, high = int(experts.min()), int(experts.max())
        if low < 0 or high >= experts.shape[1]:
            raise ImportFileError(f"{path}: the map of replicas names expert {low if low < 0 else high}, out of range")
        for layer, row in enumerate(experts):
            missing = np.setdiff1d(np.arange(high + 1), row)
            if len(missing):
                raise ImportFileError(
                    f"{path}: the map of replicas places expert {missing[0]} nowhere in layer {layer}"
                )
        return cls(experts.astype(np.int64), high + 1)

    @classmethod
    def read(cls, path: Path) -> ReplicaMap:
        """The map in a .json or .npy file.

        Raises:
            ImportFileError: it is neither, or no such map.
        """
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            raise ImportFileError(f"--physical-to-logical {path} is no file, or larger than {MAX_BYTES} bytes")
        if path.suffix == ".npy":
            with path.open("rb") as stream:
                header, length = read_header(stream, str(path))
                if length + header.bytes != path.stat().st_size:
                    raise ImportFileError(f"{path} declares {header.shape}, but has {path.stat().st_size} bytes")
                return cls.of(np.frombuffer(stream.read(), header.dtype).reshape(header.shape), path)
        try:
            return cls.of(np.asarray(json.loads(path.read_text(encoding="utf-8"))), path)
        except (ValueError, RecursionError, OSError) as error:
            raise ImportFileError(f"--physical-to-logical {path}: {str(error).splitlines()[0][:120]}") from error

    def ids(self, physical: NDArray[np.integer[Any]], path: Path) -> NDArray[np.int64]:
        """Logical ids of physical ones, (layers, ...); negative stays "none".

        Raises:
            ImportFileError: other layers than the map's, or a replica that it does not know.
        """
        layers, replicas = self.experts.shape
        if len(physical) != layers or (physical.size and int(physical.max()) >= replicas):
            raise ImportFileError(
                f"{path}: {len(physical)} layers with replicas up to {physical.max() if physical.size else '-'} do not"
                f" fit the map of {layers} layers and {replicas} replicas"
            )
        flat = physical.reshape(layers, -1).astype(np.int64)
        logical = np.take_along_axis(self.experts, np.maximum(flat, 0), axis=1)
        return np.where(flat < 0, -1, logical).reshape(physical.shape)

    def counts(self, physical: NDArray[np.integer[Any]], path: Path) -> NDArray[np.int64]:
        """Counts per expert of counts per replica, (layers, replicas) -> (layers, experts).

        Raises:
            ImportFileError: another shape than the map's.
        """
        if physical.shape != self.experts.shape:
            raise ImportFileError(
                f"{path}: counts {physical.shape} do not fit the map of replicas {self.experts.shape}"
            )
        counts = np.zeros((len(physical), self.num_experts), np.int64)
        np.add.at(counts, (np.arange(len(physical))[:, None], self.experts), physical)
        return counts
