"""Benchmarks by name, handed over to EleutherAI's lm-evaluation-harness where it is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module, metadata
from typing import Any

from torch import nn

from moescope.errors import InputError, RunError

MISSING = "lm-evaluation-harness is not installed: pip install lm-eval"


def require_harness() -> Any:
    """The package.

    Raises:
        InputError: it is not installed.
    """
    try:
        return import_module("lm_eval")
    except ImportError:
        raise InputError(MISSING) from None


def run_harness(
    models: Mapping[str, nn.Module], tasks: Sequence[str], *, tokenizer: Any, limit: int | None = None
) -> dict[str, Any]:
    """Run tasks of the harness on models that are loaded already.

    Args:
        models: name -> model.
        tasks: as the harness names them, such as ``arc_easy``.
        tokenizer: of all of them.
        limit: items per task; None for all.

    Returns:
        ``version`` of the harness, ``tasks`` (name -> version of the task), and ``results``
        (model -> task -> metric -> value), numbers only.

    Raises:
        InputError: the harness is not installed, or knows no such task.
        RunError: it failed; its own words.
    """
    harness = require_harness()
    wrapper = import_module("lm_eval.models.huggingface").HFLM
    results: dict[str, Any] = {}
    versions: dict[str, Any] = {}
    for name, model in models.items():
        try:
            found = harness.simple_evaluate(
                model=wrapper(pretrained=model, tokenizer=tokenizer), tasks=list(tasks), limit=limit
            )
        except KeyboardInterrupt:
            raise
        except Exception as error:  # data sets, templates, metrics: whatever a task is made of
            text = " ".join(str(error).split())[:300] or type(error).__name__
            kind = InputError if isinstance(error, (KeyError, ValueError)) else RunError
            raise kind(f"lm-eval cannot run {', '.join(tasks)}: {text}") from error
        results[name] = {task: _numbers(values) for task, values in found["results"].items()}
        versions |= found.get("versions") or {}
    return {"version": _version(harness), "tasks": versions, "limit": limit, "results": results}


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a task without what is no finite number (names, missing errors)."""
    plain = {name: value for name, value in values.items() if isinstance(value, (int, float))}
    return {name: float(value) for name, value in plain.items() if abs(float(value)) < float("inf")}


def _version(harness: Any) -> str:
    try:
        return metadata.version("lm_eval")
    except metadata.PackageNotFoundError:
        return str(getattr(harness, "__version__", "unknown"))
