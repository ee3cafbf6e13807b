"""``moescope inspect``: what can be watched, and what it will take, before anything runs."""

from __future__ import annotations

import argparse
import json

from app.commands.options import add_config, add_json, positive

NAME = "inspect"
SUMMARY = "say what can be watched in a model, and the memory, disk and time it takes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("model", metavar="MODEL", help="folder of a Hugging Face checkpoint, a .gguf file, or a hub id")
    parser.add_argument("--level", default="routing,activations", help="what would be recorded")
    parser.add_argument("--tokens", type=positive, default=100_000, metavar="N", help="token budget (default 100k)")
    parser.add_argument("--sequence-length", type=positive, default=512, metavar="N", help="default 512")
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="default 8")
    parser.add_argument("--dtype", default="auto", help="auto (as stored), float32, bfloat16 or float16")
    parser.add_argument("--stack", metavar="NAME", help="which layers, where several stacks of the model have experts")
    add_config(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Print the inspection."""
    from profiler.inspect import inspect_model

    inspection = inspect_model(
        options.model,
        sequence_length=options.sequence_length,
        batch_size=options.batch_size,
        token_budget=options.tokens,
        level=options.level,
        dtype=options.dtype,
        stack=options.stack,
    )
    print(json.dumps(inspection.to_json()) if options.json else inspection.to_text())
    return 0
