"""What the user named, resolved to files: paths, folders, globs, ``LABEL=PATH`` and ``hf:NAME``."""

from __future__ import annotations

import difflib
import glob
import gzip
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

from moescope.errors import CorpusError

FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".pq": "parquet"}
REFUSED = {
    ".zst": "decompress it, or compress it with gzip",
    ".xz": "decompress it, or compress it with gzip",
    ".bz2": "decompress it, or compress it with gzip",
    ".csv": "convert it to JSON Lines or Parquet, which say what a column is",
    ".tsv": "convert it to JSON Lines or Parquet, which say what a column is",
}
BINARY_KINDS = {  # first bytes -> what it is; everything else with a zero byte is called binary as well
    **{bytes([0x80, protocol]): "a pickle, which can run code when it is read" for protocol in range(2, 6)},
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "gzip data without the ending .gz",
    b"PAR1": "Parquet without the ending .parquet",
    b"%PDF": "a PDF",
}
SHARD = re.compile(r"[-_.]?\d{5}-of-\d{5}$")


@dataclass(frozen=True)
class Source:
    """One file, or one hub dataset."""

    name: str  # as the user would write it
    format: str  # text | jsonl | parquet | hub
    domain: str  # label of its documents unless a column says otherwise
    labelled: bool = False  # the user gave the label: it wins over a column
    compressed: bool = False
    size: int = 0  # bytes on disk, 0 for a hub dataset


@dataclass(frozen=True)
class ReadOptions:
    """What to take from a row; ``block`` is the size in bytes of a document cut from a text file."""

    text_column: str = "text"
    domain_column: str = "domain"
    split: str = "train"
    block: int = 1 << 14


@dataclass(frozen=True)
class Document:
    """A text, or the messages of a chat."""

    content: str | list[dict[str, Any]]
    domain: str
    origin: str  # file, file@byte, file#row

    @property
    def size(self) -> int:
        """Length in characters, about."""
        if isinstance(self.content, str):
            return len(self.content)
        return sum(len(str(message.get("content"))) for message in self.content)


def resolve(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], domains: Mapping[str, str] | None = None
) -> tuple[list[Source], list[str]]:
    """Sources in the order given (folders and globs sorted), and the files in folders that cannot be read as text.

    A domain is, first match wins: the label in ``LABEL=PATH`` or in ``domains`` (path -> label); the first subfolder
    beneath a folder that was given; the file's stem, less its shard number (``train-00000-of-00004``).
    """
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    labels = {os.fspath(path): label for path, label in (domains or {}).items()}
    found: dict[str, Source] = {}
    skipped: list[str] = []
    unused = set(labels)
    for argument in [os.fspath(path) for path in paths]:
        label, path = _split_label(argument)
        unused -= {path, argument}
        label = label or labels.get(path) or labels.get(argument)
        sources = _expand(path, skipped)
        for source in sources if label is None else [replace(s, domain=label, labelled=True) for s in sources]:
            key = source.name if source.format == "hub" else os.path.realpath(source.name)
            twin = found.setdefault(key, source)
            if twin.labelled and source.labelled and twin.domain != source.domain:
                raise CorpusError(f"{source.name} is labelled {twin.domain} and {source.domain}: keep one")
            if source.labelled:
                found[key] = source
    if unused:
        raise CorpusError(f"domains labels {min(unused)}, which is not among the paths: label a path that is read")
    if not found:
        raise CorpusError("no text was given: name a file, a folder or hf:DATASET")
    return list(found.values()), skipped


@contextmanager
def open_source(source: Source) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed; what fails on the way is a CorpusError."""
    try:
        with gzip.open(source.name) if source.compressed else open(source.name, "rb") as file:
            yield cast(BinaryIO, file)
    except (OSError, EOFError, zlib.error) as error:
        raise CorpusError(f"{source.name} cannot be read to its end ({error}): is it complete?") from None


def _split_label(argument: str) -> tuple[str | None, str]:
    """``LABEL=PATH`` -> (label, path). A path that exists, or whose ``=`` stands behind a slash, has no label."""
    label, equals, path = argument.partition("=")
    if not equals or os.path.exists(argument) or "/" in label or os.sep in label or label.startswith("hf:"):
        return None, argument
    if not label.strip() or not path:
        raise CorpusError(f"{argument!r} has an empty label or path: write LABEL=PATH")
    return label.strip(), path


def _expand(path: str, skipped: list[str]) -> list[Source]:
    """The sources behind one argument. What cannot be read is an error for a file that was named, else skipped."""
    if path.startswith("hf:"):
        name = path.removeprefix("hf:")
        if not name.strip(":/"):
            raise CorpusError(f"{path!r} names no dataset: write hf:OWNER/NAME or hf:OWNER/NAME:CONFIG")
        return [Source(path, "hub", domain=name.replace(":", "/").rsplit("/", 1)[-1])]
    if os.path.isdir(path):
        files: Sequence[tuple[str, str | None]] = list(_walk(path))
    elif os.path.lexists(path):
        return [_file_source(path, None)]
    elif glob.has_magic(path):
        files = [(name, None) for name in sorted(glob.glob(path, recursive=True)) if os.path.isfile(name)]
    else:
        raise CorpusError(_missing(path))
    sources = []
    for name, folder in files:
        try:
            sources.append(_file_source(name, folder))
        except CorpusError:
            skipped.append(name)
    if not sources:
        what = f"{len(files)} files, none of them text" if files else "no file"
        raise CorpusError(f"{path} holds {what}: give text, JSON Lines or Parquet")
    return sources


def _walk(root: str) -> Iterator[tuple[str, str | None]]:
    """Files beneath a folder in sorted order, hidden ones left out, with the first subfolder they lie in."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        inner = os.path.relpath(folder, root).split(os.sep)[0]
        for name in sorted(names):
            if not name.startswith("."):
                yield os.path.join(folder, name), None if inner == "." else inner


def _file_source(name: str, folder: str | None) -> Source:
    path = Path(name)
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    compressed = suffixes[-1:] == [".gz"]
    suffix = (suffixes[:-1] if compressed else suffixes)[-1:] or [""]
    stem = Path(path.stem).stem if compressed else path.stem
    if suffix[0] in REFUSED:
        raise CorpusError(f"{name} ends in {suffix[0]}, which is not read: {REFUSED[suffix[0]]}")
    if not path.exists():
        raise CorpusError(f"{name} is a link to {os.readlink(name)}, which does not exist: repair or remove it")
    if not path.is_file():
        raise CorpusError(f"{name} is not a regular file: save its text to a file first")
    source = Source(
        name,
        format=FORMATS.get(suffix[0], "text"),
        domain=folder or SHARD.sub("", stem) or stem,
        compressed=compressed,
        size=path.stat().st_size,
    )
    _refuse_binary(source)
    return source


def _refuse_binary(source: Source) -> None:
    try:
        with open(source.name, "rb") as file:
            head = file.read(8192)
    except OSError as error:
        raise CorpusError(f"{source.name} cannot be read ({error.strerror}): check its permissions") from None
    if not head:
        raise CorpusError(f"{source.name} is empty: remove it or give a file with text")
    if source.compressed or source.format == "parquet":
        magic, what = (b"\x1f\x8b", "gzip") if source.compressed else (b"PAR1", "Parquet")
        if not head.startswith(magic):
            raise CorpusError(f"{source.name} is not {what}, as its ending says: rename it to what it is")
        if source.compressed and source.format == "parquet":
            raise CorpusError(f"{source.name} is compressed Parquet: decompress it first")
        return
    for magic, what in BINARY_KINDS.items():
        if head.startswith(magic):
            raise CorpusError(f"{source.name} is {what}: give text, JSON Lines or Parquet")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise CorpusError(f"{source.name} is UTF-16: convert it to UTF-8, for example with iconv")
    if b"\0" in head:
        raise CorpusError(f"{source.name} is binary (zero byte at {head.index(0)}): give text, JSON Lines or Parquet")


def _missing(path: str) -> str:
    """A message for a path that is not there, with the nearest names in its folder."""
    folder = Path(path).parent
    if not folder.is_dir():
        return f"{path} does not exist, nor does the folder {folder}: check the path"
    near = difflib.get_close_matches(Path(path).name, sorted(entry.name for entry in folder.iterdir()), n=3)
    return f"{path} does not exist: " + (f"did you mean {', '.join(near)}?" if near else f"see what {folder} holds")
