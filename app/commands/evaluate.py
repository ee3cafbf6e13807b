"""``moescope evaluate``: a model against another on held-out text, such as a compressed one against its source."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app import line
from app.commands.documents import described_model, described_text, require_folder, write_document
from app.commands.inputs import add_corpus, add_model, open_text, require_data, require_placement
from app.commands.options import add_config, add_json, add_store, positive

if TYPE_CHECKING:
    from torch import nn

    import store
    from compressor.plan import Plan
    from profiler.corpus import Corpus

NAME = "evaluate"
SUMMARY = "measure a model against another on held-out text: what compression has cost"
TOKENS = 50_000
"""Held-out text, if nobody says otherwise."""

PLAN = "moescope_plan.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("model", metavar="MODEL", help="what is measured: a folder, a .gguf file, or a hub id")
    parser.add_argument("--against", metavar="MODEL", help="what it is compared with, such as what it was made from")
    parser.add_argument("--beside", metavar="RUN", help="keep the result beside this run")
    parser.add_argument(
        "--skip", type=_names, default=[], metavar="LIST", help="comma list of routing, generation, probes, speed"
    )
    parser.add_argument(
        "--new-tokens", type=positive, default=64, metavar="N", help="longest greedy continuation (default 64)"
    )
    parser.add_argument(
        "--lm-eval", type=_names, default=[], metavar="TASKS", help="comma list of tasks for lm-evaluation-harness"
    )
    parser.add_argument(
        "--lm-eval-limit", type=positive, metavar="N", help="items of each of these tasks (default all)"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the result as JSON to this file too")
    add_store(parser)
    add_corpus(parser)
    add_model(parser)
    parser.set_defaults(tokens=TOKENS)
    add_config(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Measure; the verdict is printed first."""
    import store

    _refuse(options)
    path = store.Catalog(options.store).resolve(options.beside) if options.beside else None
    from profiler import load_tokenizer
    from profiler.evaluation.tokenizers import require_same_tokenizer

    tokenizer = load_tokenizer(options.model)
    require_same_tokenizer(tokenizer, load_tokenizer(options.against))
    plan = _plan_of(options.model)
    corpus = open_text(options, tokenizer)
    held_out, notes = _held_out(path, plan, corpus)
    document = _measure(options, tokenizer, corpus, plan, held_out, notes)
    text = store.evaluation_text(document)
    kept = store.write_evaluation(path, document) if path is not None else None
    if options.output is not None:
        write_document(options.output, text)
    print(text if options.json else _words(document, kept or options.output), end="" if options.json else "\n")
    return 0


def _refuse(options: argparse.Namespace) -> None:
    """What can be refused before anything is read.

    Raises:
        InputError: no base, an unknown part to skip, a device map that cannot be read, or tasks without the harness.
        CorpusError: no text.
    """
    from moescope.errors import InputError

    if options.against is None:
        raise InputError("against what? give --against MODEL, such as the model that it was made from")
    require_data(options)
    require_placement(options)
    from profiler.evaluation import PARTS
    from profiler.evaluation.harness import require_harness

    unknown = [name for name in options.skip if name not in PARTS]
    if unknown:
        raise InputError(f"--skip {unknown[0]}: there are {', '.join(PARTS)}")
    if options.lm_eval:
        require_harness()
    require_folder(options.output)


def _plan_of(model: str) -> Plan | None:
    """The plan that a folder was made by, where it holds one."""
    from compressor.plan import Plan

    file = Path(model) / PLAN
    return Plan.load(file) if file.is_file() else None


def _held_out(path: Path | None, plan: Plan | None, corpus: Corpus) -> tuple[bool, list[str]]:
    """Whether the text is another than the one that the run or the plan was made from, and what to say about it."""
    import store
    from app.measuring import place_of

    seen = {plan.provenance.corpus} if plan else set()
    read: set[str] = set()
    if path is not None:
        with store.open_run(path) as opened:
            seen.add(str(opened.info.settings.get("corpus_sha256") or ""))
            read = {place_of(name) for name in opened.info.settings.get("files") or ()}
    if corpus.sha256 in seen:
        return False, ["The text is the very text that the plan or run was made from, not held-out text."]
    shared = [name for name in corpus.describe()["files"] if place_of(name) in read]
    if shared:
        return True, [
            f"The run has read from {shared[0]} too: it is no held-out text, unless these are other parts of it."
        ]
    return True, []


def _measure(
    options: argparse.Namespace,
    tokenizer: Any,
    corpus: Corpus,
    plan: Plan | None,
    held_out: bool,
    notes: list[str],
) -> store.Document:
    from profiler.evaluation import document, evaluate

    base, model = _load(options, options.against), _load(options, options.model)
    named = [described_model(options.model, model), described_model(options.against, base)]
    if plan is not None and plan.source.fingerprint not in ("", named[1]["fingerprint"]):
        notes.append("The plan was made for other weights than --against, or for these in another --dtype.")
    try:
        found = evaluate(
            model,
            base,
            corpus.batches,
            tokenizer=tokenizer,
            **_kept(plan),
            skip=options.skip,
            new_tokens=options.new_tokens,
            tasks=options.lm_eval,
            task_limit=options.lm_eval_limit,
            seed=options.seed,
            paths=(options.model, options.against),
            progress=_show,
        )
    finally:
        line.end()
    found.notes[:0] = notes
    return document(
        found,
        model=named[0],
        base=named[1],
        data=described_text(corpus),
        plan=None if plan is None else plan.digest,
        held_out=held_out,
    )


def _kept(plan: Plan | None) -> dict[str, Any]:
    """Of which experts and layers of the source a model is made."""
    if plan is None:
        return {}
    from compressor.plan import experts_after, kept_layers

    kept = {key: [expert.members for expert in experts] for key, experts in experts_after(plan).items()}
    return {"kept": kept, "kept_layers": kept_layers(plan)}


def _load(options: argparse.Namespace, place: str) -> nn.Module:
    """A model, by the backend where a plan has made it: its layers may have counts and widths of their own."""
    from app.commands.inputs import open_model

    if not (Path(place) / PLAN).is_file() or options.device_map or options.memory_limit:
        return open_model(argparse.Namespace(**{**vars(options), "model": place}))
    import torch

    import compressor
    from profiler.capture.loading import weight_dtype

    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model: nn.Module = compressor.load(place, dtype=weight_dtype(options.dtype), device=device)
    return model


def _show(part: str, share: float) -> None:
    line.over(f"{part} {share:4.0%}")


def _words(document: store.Document, kept: Path | None) -> str:
    from app.frames import evaluation as frames
    from app.text import table

    sentence, notes = frames.sentences(document)
    parts = [sentence, *notes]
    for frame in (
        frames.domains(document),
        frames.probes(document).drop("enough"),
        frames.generation(document),
        frames.layers(document),
        frames.sizes(document),
        frames.benchmarks(document),
    ):
        if len(frame):
            parts.append(table(frame))
    if kept is not None:
        parts.append(f"kept in {kept}")
    return "\n\n".join(parts)


def _names(text: str) -> list[str]:
    return [name for name in (part.strip() for part in text.split(",")) if name]
