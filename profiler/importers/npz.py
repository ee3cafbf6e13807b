"""A plain .npz: ``experts`` (tokens, layers, k), and what else is known; docs/importers.md lists the arrays."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.errors import ImportFileError
from profiler.importers.format import Format
from profiler.importers.npy import Archive, Header
from profiler.importers.recording import ImportOptions, Recording, SequenceLabel, TraceBlock, block_tokens
from profiler.importers.shape import Axis, layer_axis, require_dense_empty

LABELS = ("domain", "dataset", "category")
"""Arrays of one label per sequence; the first that is there names the domain, the last one the source."""

_FAR = 1 << 30
"""An id that is out of range stays so, whatever its type."""

MAX_TEXT = 1 << 30
"""Bytes of a file of token texts."""


def read(path: Path, options: ImportOptions) -> Recording:
    """Open an .npz trace.

    Raises:
        ImportFileError: it is no such file, or its arrays do not fit each other or the model.
    """
    if not path.is_file():
        raise ImportFileError(f"{path} is no file; npz takes FILE.npz")
    archive = Archive(path)
    header = _require(archive, "experts", "iu", 3)
    tokens, entries, k = header.shape
    if tokens == 0 or k == 0 or entries == 0:
        raise ImportFileError(f"{path}: experts has shape {header.shape}; it is (tokens, layers, experts per token)")
    rows = block_tokens(entries * k)
    axis = layer_axis(
        options=options, path=path, entries=entries, top_k=k, num_experts=_scalar(archive, "num_experts"),
        numbers=_integers(archive, "layers").tolist() if "layers" in archive else None,
        largest=lambda: max(_largest(block) for block in archive.blocks("experts", rows)),
    )  # fmt: skip
    if "weights" in archive and _require(archive, "weights", "f", 3).shape != header.shape:
        raise ImportFileError(f"{path}: weights have shape {archive.header('weights').shape}, experts {header.shape}")
    source = _Source(archive, options, axis, tokens, _offsets(archive, tokens), rows)
    omissions = {} if "weights" in archive else {"weights": "the file has no array 'weights'"}
    texts = _token_texts(options, source) if "tokens" in options.extra else None
    if texts is None and "token_ids" not in archive:
        omissions["text"] = "the file has no array 'token_ids', and no --tokens were given"
    return Recording(
        layers=axis.layers, blocks=source.blocks(texts), labels=source.labels(), total_tokens=tokens,
        omissions=omissions, settings={"arrays": archive.names, "token_ids_by_text": texts is not None},
        vocabulary=texts.vocabulary if texts else {},
    )  # fmt: skip


@dataclass
class _Texts:
    """Token strings as numbers: ids (tokens,) into ``vocabulary``."""

    ids: NDArray[np.int64]
    vocabulary: dict[int, bytes]


@dataclass
class _Source:
    """The arrays of one file, checked against each other; rows: tokens per block."""

    archive: Archive
    options: ImportOptions
    axis: Axis
    tokens: int
    offsets: NDArray[np.int64]
    rows: int

    def labels(self) -> dict[int, SequenceLabel]:
        """One label per sequence; empty where the file has none."""
        found = [_texts(self.archive, name, len(self.offsets) - 1) for name in LABELS if name in self.archive]
        if not found:
            return {}
        return {
            number: SequenceLabel(str(domain) or self.options.domain, str(source))
            for number, (domain, source) in enumerate(zip(found[0], found[-1], strict=True))
        }

    def blocks(self, texts: _Texts | None) -> Iterator[TraceBlock]:
        """The trace in blocks of tokens."""
        weights = self.archive.blocks("weights", self.rows) if "weights" in self.archive else None
        names = self.archive.blocks("token_ids", self.rows) if "token_ids" in self.archive else None
        prompt = self._prompt_tokens()
        start = 0
        for experts in self.archive.blocks("experts", self.rows):
            where = np.arange(start, start + len(experts))
            sequence = np.searchsorted(self.offsets, where, side="right") - 1
            position = where - self.offsets[sequence]
            given = next(names) if names is not None else None
            ids = _signed(experts, self.axis.layers[0].num_experts)
            require_dense_empty(ids.transpose(1, 0, 2), self.axis, self.archive.path)
            yield TraceBlock(
                ids=ids.transpose(1, 0, 2)[self.axis.kept],
                weights=next(weights).transpose(1, 0, 2)[self.axis.kept] if weights is not None else None,
                sequence=sequence,
                position=position,
                generated=position >= prompt[sequence],
                token_ids=texts.ids[where] if texts is not None else given,
            )
            start += len(experts)

    def _prompt_tokens(self) -> NDArray[np.int64]:
        """(sequences,) leading tokens that are the prompt's: by the file, or all, or none."""
        lengths = np.diff(self.offsets)
        if "prompt_tokens" not in self.archive:
            return lengths if self.options.phase == "prompt" else np.zeros_like(lengths)
        prompt = _integers(self.archive, "prompt_tokens")
        if prompt.shape != lengths.shape or (prompt < 0).any() or (prompt > lengths).any():
            raise ImportFileError(f"{self.archive.path}: prompt_tokens do not fit the lengths of the sequences")
        return prompt


def _offsets(archive: Archive, tokens: int) -> NDArray[np.int64]:
    if "offsets" not in archive:
        return np.array([0, tokens], np.int64)
    offsets = _integers(archive, "offsets")
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != tokens or (np.diff(offsets) < 1).any():
        raise ImportFileError(f"{archive.path}: offsets do not rise from 0 to the {tokens} tokens of experts")
    return offsets


def _token_texts(options: ImportOptions, source: _Source) -> _Texts:
    """The token strings of ``--tokens FILE``: a JSON list per sequence, empty where they are not known."""
    path = options.extra["tokens"]
    if not path.is_file() or path.stat().st_size > MAX_TEXT:
        raise ImportFileError(f"--tokens {path} is no file, or larger than {MAX_TEXT} bytes")
    try:
        lists = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ImportFileError(f"--tokens {path} is no JSON: {str(error).splitlines()[0]}") from error
    lengths = np.diff(source.offsets)
    if not isinstance(lists, list) or len(lists) != len(lengths):
        raise ImportFileError(f"--tokens {path} has no list for each of {len(lengths)} sequences")
    numbers: dict[str, int] = {"": 0}
    ids = np.zeros(source.tokens, np.int64)
    for number, (texts, length) in enumerate(zip(lists, lengths.tolist(), strict=True)):
        if texts and (
            not isinstance(texts, list) or len(texts) != length or not all(isinstance(t, str) for t in texts)
        ):
            raise ImportFileError(f"--tokens {path}: sequence {number} has no text for each of its {length} tokens")
        if texts:
            first = source.offsets[number]
            ids[first : first + length] = [numbers.setdefault(text, len(numbers)) for text in texts]
    return _Texts(ids, {number: text.encode("utf-8", "replace") for text, number in numbers.items()})


def _largest(experts: NDArray[Any]) -> int:
    """The largest id of a block, without the largest value of an unsigned type, which may mean "none"."""
    if experts.dtype.kind == "u":
        experts = experts[experts != np.iinfo(experts.dtype).max]
    return int(experts.max(initial=0))


def _signed(experts: NDArray[Any], num_experts: int) -> NDArray[np.int32]:
    """Ids with -1 for "none"; unsigned types write it as their largest value, where that cannot be an expert."""
    if experts.dtype.kind == "u":
        largest = np.iinfo(experts.dtype).max
        none = experts == largest if num_experts <= largest else np.zeros(experts.shape, bool)
        return np.where(none, -1, np.minimum(experts.astype(np.uint64), _FAR).astype(np.int32))
    return np.clip(experts.astype(np.int64), -_FAR, _FAR).astype(np.int32)


def _require(archive: Archive, name: str, kinds: str, axes: int) -> Header:
    header = archive.header(name)
    if header.dtype.kind not in kinds or len(header.shape) != axes:
        raise ImportFileError(
            f"{archive.path}: {name} is {header.dtype} {header.shape}; experts are integers and weights are floating"
            " point, both (tokens, layers, experts per token)"
        )
    return header


def _integers(archive: Archive, name: str) -> NDArray[np.int64]:
    values = archive.whole(name)
    if values.ndim != 1 or values.dtype.kind not in "iu" or (values.size and int(values.max()) > 2**62):
        raise ImportFileError(f"{archive.path}: {name} is {values.dtype} {values.shape}; it is a list of integers")
    return values.astype(np.int64)


def _scalar(archive: Archive, name: str) -> int:
    if name not in archive:
        return 0
    value = archive.whole(name)
    if value.size != 1 or value.dtype.kind not in "iu":
        raise ImportFileError(f"{archive.path}: {name} is {value.dtype} {value.shape}; it is one integer")
    return int(value.reshape(-1)[0])


def _texts(archive: Archive, name: str, sequences: int) -> NDArray[Any]:
    values = archive.whole(name)
    if values.shape != (sequences,) or values.dtype.kind not in "US":
        raise ImportFileError(f"{archive.path}: {name} is {values.dtype} {values.shape}; it has a text per sequence")
    return np.char.decode(values, "utf-8", "replace") if values.dtype.kind == "S" else values


FORMATS = (Format("npz", "any tool", "FILE.npz", "trace, weights, labels", read),)
