"""``moescope ablate``: switch experts off, and measure what the model loses beside controls."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from app import line
from app.commands.documents import beside_run, described_model, described_text, write_document
from app.commands.inputs import add_corpus, add_model, open_model, open_text, require_data
from app.commands.options import add_config, add_json, add_store

if TYPE_CHECKING:
    from torch import nn

    import store
    from profiler.ablation import Expert
    from profiler.corpus import Corpus

NAME = "ablate"
SUMMARY = "switch experts off and measure what the model loses, beside controls"
TOKENS = 100_000
"""Text of one pass, if nobody says otherwise; there are 2 passes and one for every control."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("model", metavar="MODEL", help="folder of a Hugging Face checkpoint, a .gguf file, or a hub id")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--experts", metavar="LIST", help="comma list of LAYER:EXPERT, such as 1:68,2:92,33:shared")
    which.add_argument(
        "--super-experts", metavar="RUN", help="the super experts of a run; the result is kept beside it"
    )
    parser.add_argument(
        "--rule", choices=("paper", "code"), default="paper",
        help="which super experts: the paper's (default; where massive activations form) or its code's (first 75 %%)",
    )  # fmt: skip
    parser.add_argument("--beside", metavar="RUN", help="keep the result beside this run")
    parser.add_argument(
        "--controls", type=_count, default=5, metavar="N", help="controls of each of the two kinds (default 5)"
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

    require_data(options)
    name = options.super_experts or options.beside
    path = store.Catalog(options.store).resolve(name) if name else None
    experts, notes = _experts(options, path)
    from profiler import load_tokenizer

    corpus = open_text(options, load_tokenizer(options.model))
    model = open_model(options)
    if path is not None:
        notes += beside_run(path, model, corpus)
    document = _measure(options, model, corpus, experts, notes)
    text = store.evaluation_text(document)
    kept = store.write_evaluation(path, document) if path is not None else None
    if options.output is not None:
        write_document(options.output, text)
    print(text if options.json else _words(document, kept or options.output), end="" if options.json else "\n")
    return 0


def _experts(options: argparse.Namespace, path: Path | None) -> tuple[list[Expert], list[str]]:
    """The chosen experts, and what to know about the choice.

    Raises:
        InputError: neither option was given, or the run has no super expert by that rule.
    """
    import store
    from app.frames import super_experts
    from moescope.errors import InputError
    from profiler.ablation import parse_experts

    if options.experts is not None:
        return parse_experts(options.experts), []
    if options.super_experts is None or path is None:
        raise InputError("which experts? give --experts 1:68,2:92 or --super-experts RUN")
    with store.open_run(path) as opened:
        found = super_experts.chosen(opened, rule=options.rule)
        if not found:
            other = "code" if options.rule == "paper" else "paper"
            names = ",".join(map(str, super_experts.chosen(opened, rule=other)))
            hint = f"--rule {other} names {names}" if names else "moescope show RUN output-maxima lists the largest"
            raise InputError(f"run {opened.name!r} has no super expert by the {options.rule}'s rule; {hint}")
    return found, [f"The experts are super experts of the run {path.stem!r} by the {options.rule}'s rule."]


def _measure(
    options: argparse.Namespace, model: nn.Module, corpus: Corpus, experts: list[Expert], notes: list[str]
) -> store.Document:
    from profiler.ablation.measure import ablate
    from profiler.ablation.report import document

    total = corpus.num_tokens
    try:
        found = ablate(
            model,
            corpus.batches,
            experts=experts,
            controls=options.controls,
            seed=options.seed,
            progress=lambda number, passes, name, tokens: _show(number, passes, name, tokens / max(total, 1)),
        )
    finally:
        line.end()
    found.notes[:0] = notes
    return document(found, model=described_model(options.model, model), data=described_text(corpus))


def _show(number: int, passes: int, name: str, share: float) -> None:
    line.over(f"pass {number} of {passes} ({name}) {share:4.0%}")


def _words(document: store.Document, kept: Path | None) -> str:
    from app.frames import ablation
    from app.text import table

    _, sentence, notes = ablation.sentences(document)
    passes = ablation.passes(document).drop("experts", "tokens")
    parts = [sentence, table(passes), table(ablation.layers(document)), *notes]
    if kept is not None:
        parts.append(f"kept in {kept}")
    return "\n\n".join(parts)


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, 0 for none")
    return int(text)
