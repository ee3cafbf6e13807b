"""``moescope sweep``: rules of routing tried on the model itself, with the loss that they cost on held-out text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app import line
from app.commands.documents import beside_run, described_model, described_text, require_folder, write_document
from app.commands.inputs import add_corpus, add_model, open_model, open_text, require_data, require_placement
from app.commands.options import add_config, add_json, add_store, positive

if TYPE_CHECKING:
    from torch import nn

    import store
    from compressor.plan.routing import RouteStep
    from profiler.corpus import Corpus
    from profiler.sweep.clock import Progress
    from profiler.sweep.job import Options, Shape
    from profiler.sweep.text import Text
    from profiler.sweep.trials import Trial

NAME = "sweep"
SUMMARY = "try rules of routing on the model: more, fewer or other experts per token, with the loss that they cost"
TOKENS = 20_000
"""Text that is read once for every value, if nobody says otherwise."""

_FROM_TEXT = "text"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("model", metavar="MODEL", help="folder of a Hugging Face checkpoint, a .gguf file, or a hub id")
    parser.add_argument("--against", metavar="RUN", help="keep the result beside this run; go on where it was")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the result as JSON to this file too")
    parser.add_argument("--again", action="store_true", help="measure anew what is known already")
    parser.add_argument(
        "--calibration", type=float, default=0.2, metavar="SHARE",
        help="part of each domain's sequences that is not judged: ODP's medians come from it (default 0.2)",
    )  # fmt: skip
    _add_rules(parser.add_argument_group("rules"))
    _add_studies(parser.add_argument_group("studies"))
    add_store(parser)
    add_corpus(parser)
    add_model(parser)
    parser.set_defaults(tokens=TOKENS)
    add_config(parser)
    add_json(parser)


def _add_rules(group: Any) -> None:
    group.add_argument(
        "--rule", action="append", default=[], metavar="NAME=VALUES",
        help="top_k=1,2,3 top_p=0.3,0.4 ratio=0.1,odp threshold=0.2 null_experts=-1 mask_top=0.125 shared=off,replaced;"
        " may be given several times (default, with no study: k, top-p and ratio)",
    )  # fmt: skip
    group.add_argument("--plan", type=Path, metavar="PLAN", help="try the route step of a plan")
    group.add_argument(
        "--redundancy", action="store_true", help="mask the best experts of each token, and the shared ones"
    )
    group.add_argument(
        "--weights", choices=("renormalized", "kept"), default="renormalized",
        help="gate weights of the experts that stay: scaled to the sum of all before (default), or as they were",
    )  # fmt: skip


def _add_studies(group: Any) -> None:
    group.add_argument("--all", action="store_true", help="the default rules and every study")
    group.add_argument("--contrast", action="store_true", help="self-contrast: the model less itself on a lower rank")
    group.add_argument("--contrast-rank", type=_integers, default=(2,), metavar="LIST", help="1 = best; default 2")
    group.add_argument("--contrast-beta", type=_numbers, default=(0.5,), metavar="LIST", help="default 0.5")
    group.add_argument("--contrast-alpha", type=float, default=0.1, metavar="A", help="default 0.1")
    group.add_argument(
        "--rerouting", action="store_true", help="vectors on the router's logits, fitted on the text so far"
    )
    group.add_argument("--rerouting-layers", type=_integers, default=(), metavar="LIST", help="default all")
    group.add_argument("--rerouting-steps", type=positive, default=5, metavar="N", help="of each fit; default 5")
    group.add_argument("--rerouting-rate", type=float, default=0.05, metavar="R", help="learning rate; default 0.05")
    group.add_argument("--rerouting-prompt", type=float, default=0.5, metavar="SHARE", help="first fit; default 0.5")
    group.add_argument("--rerouting-interval", type=positive, default=64, metavar="N", help="tokens; default 64")
    group.add_argument("--rerouting-sequences", type=positive, default=16, metavar="N", help="default 16")
    group.add_argument(
        "--items", metavar="FILE", help='items solved over several k: JSON Lines of prompt and answer, or "text"'
    )
    group.add_argument("--search-k", type=_integers, metavar="LIST", help="experts per token of its branches")
    group.add_argument("--temperature", type=float, default=0.8, metavar="T", help="of the samples beside it")
    group.add_argument("--prompt-tokens", type=positive, default=48, metavar="N", help="of items from text; default 48")
    group.add_argument("--answer-tokens", type=positive, default=3, metavar="N", help="of items from text; default 3")


def run(options: argparse.Namespace) -> int:
    """Measure; the verdict is printed first."""
    import store
    from app.progress import Stoppable

    asked = _refuse(options)
    path = store.Catalog(options.store).resolve(options.against) if options.against else None
    step = _route_step(options.plan)
    from profiler import load_tokenizer

    tokenizer = load_tokenizer(options.model)
    corpus = open_text(options, tokenizer)
    model = open_model(options)
    with Stoppable():
        document = _measure(options, asked, step, model, corpus, tokenizer, path)
    text = store.evaluation_text(document)
    kept = store.write_evaluation(path, document) if path is not None else None
    if options.output is not None:
        write_document(options.output, text)
    if options.json:
        print(text, end="")
    else:
        from app.commands.sweep_words import words

        print(words(document, kept or options.output))
    return 0


def _refuse(options: argparse.Namespace) -> list[Trial]:
    """What can be refused before anything is read; the rules that were asked for by name.

    Raises:
        InputError: a rule or value that is none, a device map that cannot be read, or no folder for ``-o``.
        CorpusError: no text.
    """
    from profiler.sweep.trials import parse_rules

    require_data(options)
    require_placement(options)
    require_folder(options.output)
    return parse_rules(options.rule, weights=options.weights)


def _route_step(file: Path | None) -> tuple[str, RouteStep] | None:
    """Digest and route step of a plan.

    Raises:
        InputError: it has none, or steps beside it.
    """
    if file is None:
        return None
    from compressor.plan import Plan
    from compressor.plan.routing import RouteStep
    from moescope.errors import InputError

    plan = Plan.load(file)
    steps = [step for step in plan.steps if isinstance(step, RouteStep)]
    if len(steps) != 1 or len(plan.steps) != 1:
        raise InputError(f"--plan {file}: a sweep tries a plan that is one route step; apply the others first")
    return plan.digest, steps[0]


def _measure(
    options: argparse.Namespace,
    asked: list[Trial],
    step: tuple[str, RouteStep] | None,
    model: nn.Module,
    corpus: Corpus,
    tokenizer: Any,
    path: Path | None,
) -> store.Document:
    import store
    from profiler.sweep.job import Found, shape_of, sweep
    from profiler.sweep.report import document
    from profiler.sweep.text import divide

    notes = beside_run(path, model, corpus) if path is not None else []
    shape = shape_of(model)
    text = divide(corpus.batches(), share=options.calibration)
    wanted = _wanted(options, asked, step, shape, text, tokenizer, model)
    named = described_model(options.model, model)
    data = {**described_text(corpus), "calibration": options.calibration, "judged_tokens": text.tokens}

    def whole(found: Found) -> store.Document:
        return document(found, model=named, data=data, notes=notes)

    def keep(found: Found) -> None:
        if path is not None:
            store.write_evaluation(path, whole(found))

    known = None if options.again or path is None else _known(path, named, data)
    try:
        return whole(sweep(model, text, wanted, known=known, keep=keep, tell=_show))
    finally:
        line.end()


def _wanted(
    options: argparse.Namespace,
    asked: list[Trial],
    step: tuple[str, RouteStep] | None,
    shape: Shape,
    text: Text,
    tokenizer: Any,
    model: Any,
) -> Options:
    """What is measured: what was asked for, or the default rules."""
    from compressor.routing import rules_of
    from profiler.sweep.contrast import Contrast
    from profiler.sweep.job import Options
    from profiler.sweep.rerouting import Rerouting
    from profiler.sweep.search import Search
    from profiler.sweep.trials import Trial, default_trials, redundancy_trials

    trials, every = list(asked), options.all
    usual = default_trials(shape.top_k, shape.num_experts, weights=options.weights)
    if every or not (trials or step or options.redundancy or options.contrast or options.rerouting or options.items):
        trials += usual
    if every or options.redundancy:
        trials += redundancy_trials(shared=shape.shared, top_k=shape.top_k, num_experts=shape.num_experts)
    if step is not None:
        trials.append(Trial("plan", step[0], step[1].weights))
    contrast = Contrast(options.contrast_rank, options.contrast_beta, options.contrast_alpha)
    rerouting = Rerouting(
        layers=options.rerouting_layers,
        steps=options.rerouting_steps,
        rate=options.rerouting_rate,
        prompt=options.rerouting_prompt,
        interval=options.rerouting_interval,
        sequences=options.rerouting_sequences,
    )
    near = sorted((abs(trial.value - shape.top_k), trial.value) for trial in usual if trial.rule == "top_k")  # type: ignore[operator]
    counts = options.search_k or tuple(int(value) for _, value in near[:4])
    search = Search(counts, options.temperature) if every or options.items else None
    return Options(
        trials=list(dict.fromkeys(trials)),
        plan_rules=None if step is None else rules_of(step[1]),
        contrast=contrast if every or options.contrast else None,
        rerouting=rerouting if every or options.rerouting else None,
        search=search,
        items=_items(options, text, tokenizer, model) if search is not None else (),
        seed=options.seed,
    )


def _items(options: argparse.Namespace, text: Text, tokenizer: Any, model: Any) -> Any:
    from profiler.sweep.items import items_of_text, read_items

    if options.items and options.items != _FROM_TEXT:
        config = model.config.get_text_config()
        return read_items(options.items, tokenizer, most_tokens=getattr(config, "max_position_embeddings", None))
    return items_of_text(text.judged, prompt_tokens=options.prompt_tokens, answer_tokens=options.answer_tokens)


def _known(path: Path, model: dict[str, Any], data: dict[str, Any]) -> store.Document | None:
    """The sweep of the same model on the same text beside the run, where there is one."""
    import store
    from moescope.errors import StoreError

    for one in store.list_evaluations(path, "sweep"):
        try:
            found = store.read_evaluation(one)
        except StoreError:
            continue
        if (found["model"], found["data"]) == (model, data):
            return found
    return None


def _show(progress: Progress) -> None:
    from app.text import duration

    words = f"{progress.part}  {progress.share:4.0%}  {progress.pace:,.0f} tokens/s  {duration(progress.left)} left"
    line.over(words)


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers, such as 1,2,3") from None


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers, such as 0.25,0.5") from None
