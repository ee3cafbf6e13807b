"""Files of torch.save, loaded with weights only, after their directory has been checked."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.errors import ImportFileError

MAX_PICKLE = 1 << 26
"""Bytes of the pickled skeleton; the tensors lie beside it."""


def load(path: Path) -> Any:
    """The content of a .pt file: dictionaries, lists, numbers, texts and tensors; nothing in it is run.

    Raises:
        ImportFileError: it is no such file, it would have to be inflated, or it holds other objects.
        ModuleNotFoundError: torch is not installed; the command line names the extra.
    """
    import torch

    _check_directory(path)
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # the unpickler raises whatever damage leads it to
        text = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise ImportFileError(f"{path} is refused by torch.load with weights only: {text}") from error


def array(value: Any, name: str, path: Path, *, axes: int) -> NDArray[Any]:
    """A tensor of integers as an array.

    Raises:
        ImportFileError: it is none, or has another number of axes.
    """
    if not hasattr(value, "detach") or value.is_sparse or value.is_quantized or value.is_complex():
        raise ImportFileError(f"{path}: {name} is no plain tensor")
    if value.dim() != axes or value.is_floating_point():
        raise ImportFileError(f"{path}: {name} is {value.dtype} {tuple(value.shape)}; it has {axes} axes of integers")
    held = value.untyped_storage().nbytes()
    if value.numel() * value.element_size() > held:
        raise ImportFileError(f"{path}: {name} declares {tuple(value.shape)}, more than the file holds")
    result: NDArray[Any] = np.asarray(value.detach().numpy())
    return result


def _check_directory(path: Path) -> None:
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ImportFileError(f"{path} is no .pt file of torch.save (its zip format): {error}") from error
    if not any(member.filename.endswith("data.pkl") for member in members):
        raise ImportFileError(f"{path} is a zip file, but none of torch.save: it has no data.pkl")
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.file_size > size:
            raise ImportFileError(f"{path}: {member.filename} is compressed, which torch.save never does: not read")
        if member.filename.endswith(".pkl") and member.file_size > MAX_PICKLE:
            raise ImportFileError(
                f"{path}: {member.filename} has {member.file_size} bytes; at most {MAX_PICKLE} are read"
            )
