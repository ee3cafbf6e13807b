"""A finished run for tasks in other processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moescope import memory
from moescope.errors import StoreError
from store.run import Run, open_run


@dataclass(frozen=True)
class SharedRun:
    """A finished run as it is sent to a task, which may run on another machine that sees the same folder.

    Attributes:
        path: of its file.
        size: of the file, by which a task sees that it has the same one.
        limit: bytes that the task's process may hold; None = no other limit than it has.
    """

    path: Path
    size: int
    limit: int | None

    @classmethod
    def of(cls, path: Path) -> SharedRun:
        """The run at a path, for tasks within this process's memory limit."""
        path = path.resolve()
        return cls(path, path.stat().st_size, memory.limit())

    @contextmanager
    def opened(self) -> Iterator[Run]:
        """The run, in the task, within the limit.

        Raises:
            StoreError: there is none, it cannot be read, or it is another one.
        """
        with memory.limited(self.limit), open_run(self.path) as run:
            if self.path.stat().st_size != self.size:
                raise StoreError(f"{self.path} here is not the run that was asked for: share its folder")
            yield run
