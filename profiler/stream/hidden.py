"""What enters the next layer, for every batch: kept in memory, or in files beside the run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from moescope.errors import RunError


class HiddenStates(Protocol):
    """The hidden states of all batches between two layers.

    ``get`` gives what enters the layer that runs now, ``put`` takes what enters the one after it.
    """

    def holds(self, layer: int) -> bool:
        """Whether an interrupted run left what enters this layer."""

    def begin(self, layer: int) -> None:
        """This layer runs now."""

    def get(self, batch: int) -> Tensor:
        """(batch, length, hidden) what enters it."""

    def put(self, batch: int, hidden: Tensor) -> None:
        """Keep what enters the layer after it."""

    def end(self) -> None:
        """All batches went through, and the layer is recorded: what entered it is not needed any more."""

    def remove(self) -> None:
        """The run is finished."""


class InMemory:
    """Hidden states in memory: a batch's take the place of those that it had before the layer."""

    def __init__(self) -> None:
        self._batches: dict[int, Tensor] = {}

    def holds(self, layer: int) -> bool:
        """Memory does not outlive a process."""
        return False

    def begin(self, layer: int) -> None:
        """Nothing to do."""

    def get(self, batch: int) -> Tensor:
        """What enters the layer."""
        return self._batches[batch]

    def put(self, batch: int, hidden: Tensor) -> None:
        """Keep a copy: the model may go on to write into its own tensor."""
        self._batches[batch] = hidden.to("cpu", copy=True)

    def end(self) -> None:
        """Nothing to do."""

    def remove(self) -> None:
        """Let go everything."""
        self._batches.clear()


class OnDisk:
    """Hidden states in files, one folder per layer; two layers' at most.

    Args:
        folder: where; made when something is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._layer = 0

    def holds(self, layer: int) -> bool:
        """Whether the files are there; that they are whole, the run's own state says."""
        return self._place(layer).is_dir()

    def begin(self, layer: int) -> None:
        """Make room for what enters the layer after this one."""
        self._layer = layer
        following = self._place(layer + 1)
        shutil.rmtree(following, ignore_errors=True)  # of an attempt that was interrupted
        try:
            following.mkdir(parents=True)
        except OSError as error:
            raise RunError(f"{following} cannot be made: {error.strerror}") from error

    def get(self, batch: int) -> Tensor:
        """What enters the layer."""
        file = self._file(self._layer, batch)
        try:
            hidden: Tensor = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a zip file that is damaged fails in many ways
            raise RunError(
                f"{file} cannot be read ({type(error).__name__}): delete {self.folder} and resume"
            ) from error
        return hidden

    def put(self, batch: int, hidden: Tensor) -> None:
        """Write what enters the layer after it."""
        file = self._file(self._layer + 1, batch)
        try:
            torch.save(hidden.detach().cpu().contiguous().clone(), file)
        except (OSError, RuntimeError) as error:
            raise RunError(f"{file} cannot be written ({error}): is the disk full?") from error

    def end(self) -> None:
        """Remove what entered the layer."""
        shutil.rmtree(self._place(self._layer), ignore_errors=True)

    def remove(self) -> None:
        """Remove all files."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _place(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:04d}"

    def _file(self, layer: int, batch: int) -> Path:
        return self._place(layer) / f"batch-{batch:06d}.pt"
