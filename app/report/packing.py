"""Figures and frames as small pieces of text that a page unpacks: JSON beside raw arrays, compressed, as base64.

The layout of a piece, before gzip: the length of its JSON (32 bits, little endian), the JSON, and the bytes of all
arrays one after the other. In the JSON an array stands as ``{"$": [type, first byte, values, shape]}``. The bytes of
arrays lie in planes (all first bytes, all second bytes, ...), which compresses better.
"""

from __future__ import annotations

import base64
import gzip
import json
import struct
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

KEPT_BITS = 12
"""Bits of the fraction that long arrays of numbers keep: values are right to 1 part in 8,192."""

_LONG = 200
"""Values from which an array is rounded: short ones weigh nothing."""

_LEAST = 24
"""Values from which a list of numbers stands as an array."""

_LARGEST_EXACT = 2**24
"""Whole numbers up to here are exact in 32 bits."""


def packed(content: dict[str, Any]) -> str:
    """Any JSON-like content, with arrays in it, as base64 text."""
    blob = bytearray()
    document = json.dumps(_plain(content, blob), separators=(",", ":"), allow_nan=False).encode()
    raw = struct.pack("<I", len(document)) + document + bytes(blob)
    return squeezed(raw)


def squeezed(raw: bytes) -> str:
    """Bytes as gzip in base64; the same bytes give the same text."""
    return base64.b64encode(gzip.compress(raw, compresslevel=9, mtime=0)).decode()


def arrays(value: Any) -> Any:
    """A figure's JSON with what Plotly writes as base64 (``dtype``, ``bdata``, ``shape``) as arrays again."""
    if isinstance(value, dict):
        if "bdata" in value and "dtype" in value:
            flat = np.frombuffer(base64.b64decode(value["bdata"]), np.dtype(value["dtype"]))
            shape = [int(size) for size in str(value.get("shape", flat.size)).split(",")]
            return flat.reshape(shape)
        return {key: arrays(item) for key, item in value.items()}
    return [arrays(item) for item in value] if isinstance(value, list | tuple) else value


def columns(frame: pl.DataFrame) -> dict[str, Any]:
    """A frame as names and columns of values, for :func:`packed`; lists and structures become their JSON."""
    return {"names": frame.columns, "rows": len(frame), "columns": [_column(frame[name]) for name in frame.columns]}


def difference(first: Any, second: Any, path: tuple[str | int, ...] = ()) -> list[tuple[list[str | int], Any]]:
    """Where two JSON-like things differ: the path to each place and what the second has there.

    Where keys or lengths differ the whole node is given.
    """
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        return [part for key in first for part in difference(first[key], second[key], (*path, key))]
    if isinstance(first, list | tuple) and isinstance(second, list | tuple) and len(first) == len(second):
        parts = [part for at in range(len(first)) for part in difference(first[at], second[at], (*path, at))]
        many = len(parts) > 8 and not any(isinstance(item, dict) for item in second)
        return [(list(path), second)] if many else parts
    if isinstance(first, np.ndarray) or isinstance(second, np.ndarray):
        return [] if _same(first, second) else [(list(path), second)]
    return [] if first == second or (first != first and second != second) else [(list(path), second)]


def _same(first: Any, second: Any) -> bool:
    one, two = np.asarray(first), np.asarray(second)
    return one.shape == two.shape and one.dtype == two.dtype and one.tobytes() == two.tobytes()


def _column(series: pl.Series) -> Any:
    if series.dtype.is_float():
        return series.fill_null(float("nan")).to_numpy()
    if series.dtype.is_integer():
        return series.cast(pl.Float64).fill_null(float("nan")).to_numpy() if series.null_count() else series.to_numpy()
    if series.dtype in (pl.String, pl.Boolean):
        return series.to_list()
    return [None if value is None else json.dumps(value, default=str) for value in series.to_list()]


def _plain(value: Any, blob: bytearray) -> Any:
    """The value as JSON takes it; arrays go into the blob."""
    if isinstance(value, dict):
        return {str(key): _plain(item, blob) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _array(value, blob)
    if isinstance(value, list | tuple):
        if len(value) >= _LEAST and all(type(item) in (int, float) for item in value):
            return _array(np.asarray(value), blob)
        return [_plain(item, blob) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item(), blob)
    if isinstance(value, float):
        return float(f"{value:.7g}") if np.isfinite(value) else None
    return value if value is None or isinstance(value, str | int | bool) else str(value)


def _array(values: NDArray[Any], blob: bytearray) -> Any:
    if values.dtype.kind not in "iuf" or values.size == 0:
        return [_plain(item, blob) for item in values.tolist()]
    narrow = _narrow(values)
    code = f"{narrow.dtype.kind}{narrow.dtype.itemsize}"
    start = len(blob)
    blob += narrow.reshape(-1).view(np.uint8).reshape(-1, narrow.dtype.itemsize).T.tobytes()
    return {"$": [code, start, int(narrow.size), list(narrow.shape)]}


def _narrow(values: NDArray[Any]) -> NDArray[Any]:
    """The same numbers in the fewest bytes that a page can read: whole ones exactly, others in 32 bits."""
    if values.dtype.kind in "iu":
        low, high = int(values.min()), int(values.max())
        for kind in (np.uint8, np.int16, np.int32):
            if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
                return np.ascontiguousarray(values, dtype=kind)
        return np.ascontiguousarray(values, dtype=np.float64)
    finite = values[np.isfinite(values)]
    whole = finite.size > 0 and bool((finite == np.rint(finite)).all())
    most = float(np.abs(finite).max()) if finite.size else 0.0
    if most > (_LARGEST_EXACT if whole else 3e38):
        return np.ascontiguousarray(values, dtype=np.float64)
    single = np.ascontiguousarray(values, dtype=np.float32)
    return single if whole or single.size < _LONG else rounded(single)


def rounded(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The nearest numbers with only the first bits of the fraction; not a number stays what it is."""
    cut = 23 - KEPT_BITS
    bits = values.view(np.uint32)
    half = np.uint32(1 << (cut - 1))
    nearest = ((bits + half) & np.uint32(~((1 << cut) - 1) & 0xFFFFFFFF)).view(np.float32)
    return np.where(np.isfinite(values), nearest, values)
