"""Where the result goes: a folder beside the destination while it is written, renamed at once when it is whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from compressor.checkpoint.headers import read_header
from compressor.checkpoint.outputs import OutputFile
from compressor.checkpoint.writing import sync_folder
from moescope.errors import InputError, ModelError, RunError

STATE = ".moescope-apply.json"


def check_destination(source: Path, destination: str | Path) -> Path:
    """The folder as a full path.

    Raises:
        InputError: it exists and is not empty, or lies inside the source, or the source inside it.
    """
    path = Path(destination).expanduser().resolve()
    if path == source or source in path.parents or path in source.parents:
        raise InputError(f"{destination} and the source {source} lie inside each other: choose another folder")
    if path.exists() and not path.is_dir():
        raise InputError(f"{destination} is a file: choose another name")
    if path.is_dir() and any(path.iterdir()):
        raise InputError(f"{destination} exists and is not empty: choose another name, or remove it first")
    return path


def check_space(destination: Path, needed: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        InputError: with both figures.
    """
    folder = next(parent for parent in destination.parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{destination} needs {needed / 2**30:.2f} GiB and {folder} has {free / 2**30:.2f} GiB free: make room, or"
            " choose another disk"
        )


@dataclass(frozen=True)
class Partial:
    """The folder that a result grows in.

    Attributes:
        folder: ``.NAME.partial`` beside the destination.
        destination: what it is renamed to.
        job: what tells one job from another: digests of plan and source.
    """

    folder: Path
    destination: Path
    job: Mapping[str, str]

    @staticmethod
    def of(destination: Path, job: Mapping[str, str]) -> Partial:
        """The folder for a destination; nothing is made yet."""
        return Partial(destination.with_name(f".{destination.name}.partial"), destination, dict(job))

    @property
    def resumable(self) -> bool:
        """An earlier try at the same job left its files."""
        try:
            return bool(json.loads((self.folder / STATE).read_text(encoding="utf-8")) == dict(self.job))
        except (OSError, ValueError):
            return False

    def finished(self, file: OutputFile) -> bool:
        """The file is there from an earlier try: name, size and header are those it has to have."""
        path = self.folder / file.name
        try:
            if os.stat(path).st_size != file.size:
                return False
            read_header(path)
            with open(path, "rb") as stream:
                return stream.read(len(file.header)) == file.header
        except (OSError, ModelError):
            return False

    @contextmanager
    def opened(self) -> Iterator[Path]:
        """The folder, with what an earlier try at the same job left in it; nobody else may write it meanwhile.

        Raises:
            RunError: it cannot be made, or another process writes it.
        """
        try:
            if not self.resumable and self.folder.exists():
                with self._locked():
                    shutil.rmtree(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked():
                (self.folder / STATE).write_text(json.dumps(dict(self.job)), encoding="utf-8")
                yield self.folder
        except OSError as error:
            raise RunError(f"{self.folder} cannot be written: {error.strerror or error}") from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            import fcntl
        except ImportError:  # only where files can be locked this way
            yield
            return
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise RunError(f"another process is writing {self.folder}: wait for it, or end it") from error
        try:
            yield
        finally:
            os.close(descriptor)

    def publish(self, names: set[str]) -> None:
        """Remove what does not belong to the result, and give the folder its name.

        Raises:
            RunError: it cannot be renamed.
        """
        try:
            for path in self.folder.iterdir():
                if path.name not in names:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            sync_folder(self.folder)
            os.rename(self.folder, self.destination)
            sync_folder(self.destination.parent)
        except OSError as error:
            raise RunError(f"{self.destination} cannot be written: {error.strerror or error}") from error
