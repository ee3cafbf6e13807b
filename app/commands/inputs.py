"""Options that say which text and which model a command works on, and what they give."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from app.commands.options import positive

if TYPE_CHECKING:
    from torch import nn

    import store
    from profiler.corpus import Corpus


def add_corpus(parser: argparse.ArgumentParser) -> None:
    """``--data`` and what says how it is cut into sequences."""
    corpus = parser.add_argument_group("corpus")
    corpus.add_argument(
        "--data", nargs="+", action="extend", metavar="PATH", default=[],
        help="text, JSONL, Parquet or folders; LABEL=PATH names the domain; hf:NAME is a hub dataset",
    )  # fmt: skip
    corpus.add_argument("--tokens", type=positive, metavar="N", help="token budget, spread over the domains (100k, 2M)")
    corpus.add_argument("--sequence-length", type=positive, default=512, metavar="N", help="default 512")
    corpus.add_argument("--batch-size", type=positive, default=8, metavar="N", help="default 8")
    corpus.add_argument("--text-column", default="text", metavar="NAME", help="column that holds the text")
    corpus.add_argument("--domain-column", default="domain", metavar="NAME", help="column that holds the domain")
    corpus.add_argument("--split", default="train", help="split of a hub dataset")
    corpus.add_argument("--packing", action="store_true", help="join documents of a domain into full sequences")
    corpus.add_argument("--bos", action=argparse.BooleanOptionalAction, default=True, help="begin sequences with BOS")
    corpus.add_argument(
        "--chat-template", action=argparse.BooleanOptionalAction, default=True,
        help="put chat messages through the tokenizer's template",
    )  # fmt: skip
    corpus.add_argument("--roles", nargs="+", metavar="ROLE", help="keep only chat messages of these roles")
    corpus.add_argument("--seed", type=int, default=0, help="order of the documents")


def add_model(parser: argparse.ArgumentParser) -> None:
    """How the model is loaded."""
    model = parser.add_argument_group("model")
    model.add_argument("--dtype", default="auto", help="auto (as stored), float32, bfloat16 or float16")
    model.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps ...")
    model.add_argument(
        "--dequantize", choices=("auto", "always", "never"), default="auto",
        help="unpack quantized weights while loading (default auto: where this machine cannot run them packed)",
    )  # fmt: skip
    model.add_argument(
        "--device-map", metavar="MAP", help="auto, balanced, a device, or JSON of module path -> device (disk is one)"
    )
    model.add_argument(
        "--memory-limit", metavar="SIZE", help="weights that each device may hold, such as 20GiB; the rest goes to disk"
    )
    model.add_argument("--offload-folder", type=Path, metavar="DIR", help="where on disk (default: a temporary folder)")


def require_data(options: argparse.Namespace) -> None:
    """Refuse a command without a text.

    Raises:
        CorpusError: ``--data`` is missing.
    """
    from moescope.errors import CorpusError

    if not options.data:
        raise CorpusError("no corpus: give --data PATH (text, JSONL, Parquet or a folder)")


def require_placement(options: argparse.Namespace) -> None:
    """Refuse a device map or a size that cannot be read, before a corpus is.

    Raises:
        InputError: such a one.
        ModelError: accelerate is needed and not installed.
    """
    from profiler.capture.placement import plan_placement

    plan_placement(options.device, options.device_map, options.memory_limit, options.offload_folder)


def require_usable(run: store.Run, options: argparse.Namespace) -> None:
    """Refuse a run that nothing can rest on, before anything is tried in vain; options: with ``allow_invalid``.

    Raises:
        InputError: it is still being collected, or its checks failed.
    """
    from moescope.errors import InputError

    if run.live:
        raise InputError(f"run {run.name!r} is still being collected: ask when it is finished")
    if run.badge.status == "invalid" and not options.allow_invalid:
        raise InputError(
            f"the checks of run {run.name!r} failed ({run.badge.reason}): collect it again, or give --allow-invalid"
        )


def open_text(options: argparse.Namespace, tokenizer: Any, *, generation_prompt: bool = False) -> Corpus:
    """The corpus that the options name."""
    from profiler.corpus import open_corpus

    paths, domains = labelled(options.data)
    return open_corpus(
        paths,
        tokenizer=tokenizer,
        sequence_length=options.sequence_length,
        batch_size=options.batch_size,
        token_budget=options.tokens,
        domains=domains,
        domain_column=options.domain_column,
        text_column=options.text_column,
        bos=options.bos,
        packing=options.packing,
        chat_template=options.chat_template,
        roles=options.roles,
        seed=options.seed,
        split=options.split,
        generation_prompt=generation_prompt,
    )


def open_model(options: argparse.Namespace) -> nn.Module:
    """The model that the options name, loaded as they say."""
    from profiler import load_model

    choices: dict[str, Literal["auto"] | bool] = {"auto": "auto", "always": True, "never": False}
    return load_model(
        options.model,
        dtype=options.dtype,
        device=options.device,
        dequantize=choices[options.dequantize],
        device_map=options.device_map,
        memory_limit=options.memory_limit,
        offload_folder=options.offload_folder,
    )


def labelled(data: list[str]) -> tuple[list[str], dict[str, str]]:
    """Split ``LABEL=PATH`` into paths and a mapping from path to domain; a file of that very name is a path."""
    paths, domains = [], {}
    for text in data:
        label, mark, path = text.partition("=")
        if mark and label and not Path(text).exists():
            paths.append(path)
            domains[path] = label
        else:
            paths.append(text)
    return paths, domains
