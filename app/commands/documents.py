"""What commands that measure a model and leave a document share: what names model and text, and where it is kept."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from profiler.corpus import Corpus

_DATA = ("files", "num_files", "domains", "sequences", "tokens", "corpus_sha256", "sequence_length", "token_budget",
         "bos", "packing", "chat_template", "roles", "seed", "split")  # fmt: skip


def described_model(place: str, model: nn.Module) -> dict[str, Any]:
    """What names a model in a document: name, class, fingerprint, dtype."""
    from profiler.capture.provenance import fingerprint

    return {
        "name": Path(place).resolve().name if Path(place).exists() else place,
        "class": type(model).__name__,
        "fingerprint": fingerprint(model),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }


def described_text(corpus: Corpus) -> dict[str, Any]:
    """What names a text in a document."""
    described = corpus.describe()
    return {name: described[name] for name in _DATA if name in described}


def beside_run(path: Path, model: nn.Module, corpus: Corpus) -> list[str]:
    """What differs between a run and a measurement that is kept beside it.

    Raises:
        InputError: the run is of another model.
    """
    import store
    from moescope.errors import InputError
    from profiler import find_moe_layers
    from profiler.capture.provenance import fingerprint

    notes = []
    with store.open_run(path) as opened:
        ours = {layer.key: layer.num_experts for layer in find_moe_layers(model)}
        theirs = {(layer.layer, layer.step): layer.num_experts for layer in opened.layers}
        if not theirs.items() <= ours.items():
            raise InputError(f"run {opened.name!r} is of another model ({opened.info.model}): its MoE layers differ")
        if opened.info.model_fingerprint not in ("", fingerprint(model)):
            notes.append("The run was recorded from other weights, or from these in another --dtype.")
        if opened.info.settings.get("corpus_sha256") == corpus.sha256:
            notes.append("The text is the one that the run was recorded on, not held-out text.")
    return notes


def require_folder(path: Path | None) -> None:
    """Refuse ``-o`` into a folder that is not there, before anything is measured.

    Raises:
        InputError: such a one.
    """
    from moescope.errors import InputError

    if path is not None and not path.absolute().parent.is_dir():
        raise InputError(f"-o {path}: there is no folder {path.absolute().parent}")


def write_document(path: Path, text: str) -> None:
    """Write a document to ``-o``, whole or not at all.

    Raises:
        InputError: it cannot be written.
    """
    from moescope.errors import InputError

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"-o {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
