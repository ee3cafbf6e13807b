"""Writing one file of the result: ranges are copied inside the kernel, computed pieces expert by expert."""

from __future__ import annotations

import errno
import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any

from compressor.checkpoint.files import Reader
from compressor.checkpoint.outputs import Copied, Made, OutputFile
from moescope.errors import RunError

Progress = Callable[[int], None]
"""Called with the bytes that were just written."""

_CHUNK = 64 * 2**20
_BUFFER = 8 * 2**20
_NOT_HERE = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF)
"""What a file system answers that cannot copy inside the kernel."""


def write_file(folder: Path, file: OutputFile, reader: Reader, progress: Progress) -> None:
    """Write a file under a temporary name, make it durable, and give it its name.

    Raises:
        RunError: it cannot be written (a full disk), or the source cannot be read.
    """
    target, temporary = folder / file.name, folder / f".{file.name}.tmp"
    try:
        with open(temporary, "wb", buffering=0) as stream:
            write_at(stream.fileno(), file.header, 0)
            progress(len(file.header))
            _write_pieces(stream.fileno(), file, reader, progress)
            os.ftruncate(stream.fileno(), file.size)  # zeros at the end are no bytes that were written
            os.fsync(stream.fileno())
        os.replace(temporary, target)
        sync_folder(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        then = f": make room on the disk of {folder} and do the same again, it goes on where it was" if full else ""
        raise RunError(f"{target} cannot be written: {error.strerror or error}{then}") from error


def _write_pieces(target: int, file: OutputFile, reader: Reader, progress: Progress) -> None:
    made: dict[Hashable, list[tuple[int, Made]]] = defaultdict(list)
    for begin, piece in _runs(file):
        if isinstance(piece, Copied):
            _copy(reader.file(piece.entry.file), piece, target, begin, progress)
        elif isinstance(piece, Made):
            made[piece.unit].append((begin, piece))
        else:
            progress(piece.size)
    for pieces in made.values():
        outcome = pieces[0][1].make(reader)
        for begin, piece in pieces:
            write_at(target, _content(piece, outcome), begin)
            progress(piece.size)


def _runs(file: OutputFile) -> Iterator[tuple[int, Any]]:
    """(first byte, piece), ranges that follow each other in both files joined to one."""
    place, run, begin = len(file.header), None, 0
    for output in file.tensors:
        for piece in output.pieces:
            if run is not None and isinstance(piece, Copied) and _follows(run, piece):
                run = Copied(run.entry, run.start, run.size + piece.size)
            else:
                if run is not None:
                    yield begin, run
                run, begin = (piece, place) if isinstance(piece, Copied) else (None, 0)
                if run is None:
                    yield place, piece
            place += piece.size
    if run is not None:
        yield begin, run


def _follows(run: Copied, piece: Copied) -> bool:
    return piece.entry.file == run.entry.file and piece.start == run.start + run.size


def _content(piece: Made, outcome: Any) -> memoryview:
    import torch

    tensor = piece.take(outcome).detach().contiguous()
    content = tensor.view(-1).view(torch.uint8).numpy().data
    if len(content) != piece.size:
        raise RuntimeError(f"{piece.unit} came out with {len(content)} bytes instead of {piece.size}")
    return content


def write_at(target: int, content: bytes | memoryview, begin: int) -> None:
    """Write all of ``content`` at a place of a file."""
    view, done = memoryview(content), 0
    while done < len(view):
        done += os.pwrite(target, view[done : done + _CHUNK], begin + done)


def _copy(source: int, piece: Copied, target: int, begin: int, progress: Progress) -> None:
    done = 0
    ways = [way for way, name in ((_by_range, "copy_file_range"), (_by_sendfile, "sendfile")) if hasattr(os, name)]
    ways.append(_by_buffer)
    while done < piece.size:
        count = min(_CHUNK, piece.size - done)
        try:
            moved = ways[0](source, piece.start + done, target, begin + done, count)
        except OSError as error:
            if error.errno not in _NOT_HERE or len(ways) == 1:
                raise
            moved = 0
        if moved == 0:
            if len(ways) == 1:
                raise RunError(f"{piece.entry.file} has become shorter while it was read")
            ways.pop(0)
        done += moved
        progress(moved)


def _by_range(source: int, start: int, target: int, begin: int, count: int) -> int:
    return os.copy_file_range(source, target, count, start, begin)


def _by_sendfile(source: int, start: int, target: int, begin: int, count: int) -> int:
    os.lseek(target, begin, os.SEEK_SET)
    return os.sendfile(target, source, start, count)


def _by_buffer(source: int, start: int, target: int, begin: int, count: int) -> int:
    content = os.pread(source, min(count, _BUFFER), start)
    write_at(target, content, begin)
    return len(content)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
