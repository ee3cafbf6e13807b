"""JSON and JSON Lines of servers' responses, read value by value with bounds."""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.errors import ImportFileError
from profiler.importers.npy import read_header

MAX_BYTES = 1 << 31
MAX_LINE = 1 << 29
_TYPES = {"int8", "uint8", "int16", "uint16", "int32", "int64"}


def responses(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a .jsonl file, a line each, or of a .json file: one, or a list of them.

    Raises:
        ImportFileError: it is neither, or too large to be read at once.
    """
    if not path.is_file():
        raise ImportFileError(f"{path} is no file; give the responses as .json or .jsonl")
    if path.suffix == ".jsonl":
        with path.open("rb") as stream:
            number = 0
            while line := stream.readline(MAX_LINE):
                number += 1
                if line.strip():
                    yield _object(_parsed(line, f"{path}, line {number}"), f"{path}, line {number}")
        return
    if path.stat().st_size > MAX_BYTES:
        raise ImportFileError(f"{path} is larger than {MAX_BYTES} bytes: write one response per line, as .jsonl")
    content = _parsed(path.read_bytes(), str(path))
    for one in content if isinstance(content, list) else [content]:
        yield _object(one, str(path))


def decoded(value: Any, where: str, *, dtype: str = "int32", shape: tuple[int, ...] | None = None) -> NDArray[np.int64]:
    """An array of expert ids: nested lists; base64 of an .npy file; base64 of raw numbers, whose shape must be given
    or stand beside them in an object.

    Raises:
        ImportFileError: it is none of these, or its bytes do not fill the shape.
    """
    if isinstance(value, dict):
        dtype, given = str(value.get("dtype")), value.get("shape")
        if value.get("encoding", "base64") != "base64" or dtype not in _TYPES or not _is_shape(given):
            raise ImportFileError(
                f"{where}: encoding {value.get('encoding')!r}, dtype {dtype!r}, shape {given!r} unknown"
            )
        value, shape = value.get("data"), tuple(given or ())
    if isinstance(value, str):
        data = bytes_of(value, where)
        if shape is None:
            return _npy(data, where)
        if len(data) != math.prod(shape) * np.dtype(dtype).itemsize:
            raise ImportFileError(f"{where} has {len(data)} bytes, which do not fill {shape} of {dtype}")
        return np.frombuffer(data, np.dtype(dtype).newbyteorder("<")).reshape(shape).astype(np.int64)
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ImportFileError(f"{where}: the lists are not of equal length") from error
    if array.dtype.kind not in "iu":
        raise ImportFileError(f"{where} is {array.dtype}, not integers")
    return array.astype(np.int64)


def bytes_of(value: Any, where: str) -> bytes:
    """What a base64 text stands for.

    Raises:
        ImportFileError: it is no base64.
    """
    if not isinstance(value, str):
        raise ImportFileError(f"{where} is no base64 text")
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImportFileError(f"{where} is no base64: {error}") from error


def _npy(data: bytes, where: str) -> NDArray[np.int64]:
    header, length = read_header(io.BytesIO(data), where)
    if header.dtype.kind not in "iu" or length + header.bytes != len(data):
        raise ImportFileError(f"{where} declares {header.dtype} {header.shape}, but has {len(data) - length} bytes")
    return np.frombuffer(data, header.dtype, offset=length).reshape(header.shape).astype(np.int64)


def _parsed(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ImportFileError(f"{where} is no JSON: {str(error).splitlines()[0][:120]}") from error


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ImportFileError(f"{where} holds {type(value).__name__}, not a response object")
    return value


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(length, int) and not isinstance(length, bool) and 0 <= length < 1 << 40 for length in value
    )
