"""``moescope import``: what another engine recorded becomes a run."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from app.commands.options import add_json, add_memory_limit, add_store

if TYPE_CHECKING:
    from profiler.importers.recording import ImportOptions

NAME = "import"
SUMMARY = "turn the traces and counts that other engines record into a run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_store(parser)
    add_json(parser)
    parser.add_argument("format", nargs="?", metavar="FORMAT", help="see --list")
    parser.add_argument("path", nargs="?", type=Path, metavar="PATH", help="the file, or folder, that the engine wrote")
    parser.add_argument("--list", action="store_true", help="list the formats, and what a run of each can say")
    parser.add_argument("--name", help="name of the run (default: that of the file)")
    parser.add_argument(
        "--config", dest="model_config", type=Path, metavar="MODEL", help="the model's folder, or its config.json"
    )
    parser.add_argument("--num-experts", type=int, default=0, metavar="E", help="experts per layer, without --config")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="experts per token, without --config")
    parser.add_argument("--model-name", default="", metavar="NAME", help="name of the model (default: by the file)")
    parser.add_argument("--domain", default="imported", metavar="LABEL", help="label of text that the file leaves open")
    parser.add_argument(
        "--phase", choices=("prompt", "decode"), default="decode", help="of tokens that the file does not tell apart"
    )
    parser.add_argument("--tokens", type=Path, metavar="FILE", help="JSON: a list of token texts per sequence (npz)")
    parser.add_argument(
        "--physical-to-logical", type=Path, metavar="FILE",
        help="JSON or .npy, (layers, replicas): which expert each replica is, for engines that count replicas",
    )  # fmt: skip
    parser.add_argument("--no-metrics", action="store_true", help="leave the metrics to moescope runs compute")
    parser.add_argument("--ray", metavar="ADDRESS", help=argparse.SUPPRESS)
    add_memory_limit(parser)


def run(options: argparse.Namespace) -> int:
    """Import one file, or list the formats."""
    from moescope.errors import InputError

    if options.list:
        return _list(as_json=options.json)
    if options.format is None or options.path is None:
        raise InputError("import takes FORMAT and PATH; moescope import --list names the formats")
    if options.ray is not None:
        raise InputError(
            "import reads a file from its beginning to its end, on one machine: give --no-metrics instead of --ray, and"
            " compute the metrics with moescope runs compute NAME --ray ADDRESS"
        )
    from app.commands.collect import show_progress
    from app.commands.delivery import deliver
    from moescope import memory
    from profiler.importers.job import import_run
    from store import Catalog, shown

    name = options.name or _name(options.path)
    Catalog(options.store).require_free(name)
    with memory.limited(options.memory_limit):
        target = import_run(
            options.format, options.path, directory=options.store, name=name, options=_given(options),
            progress=None if options.json else show_progress, metrics=not options.no_metrics,
        )  # fmt: skip
    where = deliver(target)
    if options.json:
        peak = {} if options.memory_limit is None else {"peak_memory": memory.peak()}
        print(json.dumps({"run": name, "path": where, **peak}))
    else:
        print(f"run {name}: {where}\nlook at it: moescope show {name} --store {shown(options.store)}")
    if options.memory_limit is not None:
        print(memory.summary(options.memory_limit), file=sys.stderr)
    return 0


def _given(options: argparse.Namespace) -> ImportOptions:
    from profiler.importers.model_config import read_config
    from profiler.importers.recording import ImportOptions

    files = {"tokens": options.tokens, "physical_to_logical": options.physical_to_logical}
    return ImportOptions(
        config=read_config(options.model_config) if options.model_config else {},
        model=options.model_name or (options.model_config.resolve().name if _is_folder(options.model_config) else ""),
        num_experts=options.num_experts,
        top_k=options.top_k,
        domain=options.domain,
        phase=options.phase,
        extra={key: file for key, file in files.items() if file is not None},
    )


def _is_folder(path: Path | None) -> bool:
    return path is not None and path.is_dir()


def _name(path: Path) -> str:
    """A run's name from the file's: other characters than a name may have become dashes."""
    import re

    stem = path.resolve().name.split(".")[0] or "imported"
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", stem).strip("-.") or "imported"


def _list(*, as_json: bool) -> int:
    import polars as pl

    from app.text import table
    from profiler.importers.registry import FORMATS

    frame = pl.DataFrame(
        [{"format": one.name, "from": one.source, "path": one.path, "gives": one.gives} for one in FORMATS]
    )
    print(json.dumps(frame.to_dicts()) if as_json else table(frame))
    return 0
