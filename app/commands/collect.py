"""``moescope collect``: profile a model on a corpus."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from app.commands.options import add_config, add_json, add_store, positive

if TYPE_CHECKING:
    from store import Progress

NAME = "collect"
SUMMARY = "profile a model on a corpus and write a run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("model", metavar="MODEL", help="folder of a Hugging Face checkpoint, or a hub id")
    add_store(parser)
    parser.add_argument("--name", help="name of the run (default: the model's)")
    parser.add_argument(
        "--level", default="routing,activations", help="what to record: routing, activations (default: both)"
    )
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run of this name")
    parser.add_argument("--no-text", action="store_true", help="store no text and no token ids")
    parser.add_argument("--measure-overhead", action="store_true", help="measure what watching costs on this model")
    _add_corpus(parser)
    _add_model(parser)
    add_config(parser)
    add_json(parser)


def _add_corpus(parser: argparse.ArgumentParser) -> None:
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


def _add_model(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument("--dtype", default="auto", help="auto (as stored), float32, bfloat16 or float16")
    model.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps ...")


def run(options: argparse.Namespace) -> int:
    """Collect; the path of the run file is printed last."""
    from moescope.errors import CorpusError

    if not options.data:
        raise CorpusError("no corpus: give --data PATH (text, JSONL, Parquet or a folder)")
    path = collect_run(options)
    if options.json:
        import store

        with store.open_run(path) as finished:
            info = finished.info
            answer = {"run": str(path), "tokens": info.tokens, "sequences": info.sequences, "seconds": info.seconds}
            answer |= {"capture": finished.badge.status, "reason": finished.badge.reason}
        print(json.dumps(answer))
    else:
        print(f"run: {path}\nnext: moescope show {path}    or    moescope dashboard --store {path.parent}")
    return 0


def collect_run(options: argparse.Namespace) -> Path:
    """Open the corpus, load the model, collect, and return the run file: what is quick to refuse comes first."""
    from profiler.capture.levels import parse_levels
    from profiler.corpus import open_corpus
    from store import Catalog

    name = options.name or Path(options.model).name
    parse_levels(options.level)
    if not options.resume:
        Catalog(options.store).require_free(name)
    from profiler import load_model, load_tokenizer
    from profiler.collect import collect

    tokenizer = load_tokenizer(options.model)
    paths, domains = _labelled(options.data)
    corpus = open_corpus(
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
    )
    model = load_model(options.model, dtype=options.dtype, device=options.device)
    path = collect(
        model,
        corpus=corpus,
        store=options.store,
        name=name,
        level=options.level,
        tokenizer=tokenizer,
        resume=options.resume,
        keep_text=not options.no_text,
        measure_overhead=options.measure_overhead,
        progress=show_progress,
        model_name=options.model,
    )
    print(file=sys.stderr)
    return Path(path)


def show_progress(progress: Progress) -> None:
    """One line on stderr, printed over itself."""
    from app.text import duration, progress_line

    share = f"{progress.tokens / progress.token_budget:4.0%}" if progress.token_budget else ""
    text = (
        f"{progress.state} {share} {progress.tokens:,} tokens, {progress.tokens_per_second:,.0f} tokens/s,"
        f" {duration(progress.seconds_left)} left {progress.detail}"
    )
    print("\r" + progress_line(text), end="", file=sys.stderr, flush=True)


def _labelled(data: list[str]) -> tuple[list[str], dict[str, str]]:
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
