"""Paths that a user typed for a job, checked before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

from compressor.families.config_fields import find_text_config
from compressor.plan import Plan
from moescope.errors import InputError, MoescopeError


def checked_source(plan: Plan, typed: str) -> Path:
    """The folder of a checkpoint that the plan can be followed on, as far as its configuration tells; the job itself
    looks at the tensors.

    Raises:
        InputError: there is no such folder, it holds no checkpoint, or one of another model.
    """
    folder = _path(typed, "the checkpoint")
    config = folder / "config.json"
    if not config.is_file():
        raise InputError(f"{folder} is no folder of a checkpoint: it has no config.json")
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"{folder} holds no safetensors files, which a plan is applied to")
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
        text = find_text_config(content)
        found = {layer.layer: text.number(text.count, layer.layer) for layer in plan.source.layers}
        model_types, layers = {content.get("model_type"), text.model_type}, text.layers
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{config} cannot be read as a model's configuration: {error}") from error
    except MoescopeError as error:
        raise InputError(f"{folder} does not fit the plan: {error}") from error
    if plan.source.model_type not in {*model_types, "unknown"}:
        raise InputError(f"{folder} is of type {text.model_type}, the plan is for {plan.source.model_type}")
    if layers != plan.source.num_layers:
        raise InputError(f"{folder} has {layers} decoder layers, the plan is for {plan.source.num_layers}")
    for shape in plan.source.layers:
        if found[shape.layer] not in (None, shape.num_experts):
            raise InputError(
                f"layer {shape.layer} of {folder} has {found[shape.layer]} experts, the plan is for {shape.num_experts}"
            )
    return folder


def checked_destination(typed: str) -> Path:
    """A folder that can be made: its parent exists, and nothing is there yet.

    Raises:
        InputError: otherwise.
    """
    folder = _path(typed, "the new checkpoint")
    if folder.exists():
        raise InputError(f"{folder} exists already: name a folder that does not")
    if not folder.parent.is_dir():
        raise InputError(f"{folder.parent} is no folder: make it first")
    return folder


def checked_texts(typed: str) -> list[str]:
    """Files and folders of text, one per line, as ``--data`` takes them (``LABEL=PATH`` names a domain); none: empty.

    Raises:
        InputError: one of them does not exist.
    """
    found = []
    for line in typed.splitlines():
        if not line.strip():
            continue
        label, mark, rest = line.strip().partition("=")
        named = mark and "/" not in label and not Path(line.strip()).expanduser().exists()
        path = _path(rest if named else line, "held-out text")
        if not path.exists():
            raise InputError(f"no text at {path}")
        found.append(f"{label}={path}" if named else str(path))
    return found


def _path(typed: str, what: str) -> Path:
    """An absolute path, so that nothing that was typed can be read as an option."""
    text = typed.strip()
    if not text or "\0" in text:
        raise InputError(f"where is {what}? Type the path of a folder")
    try:
        return Path(text).expanduser().resolve()
    except (OSError, RuntimeError) as error:
        raise InputError(f"{text!r} is no path: {error}") from error
