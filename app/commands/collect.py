"""``moescope collect``: profile a model on a corpus."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app import line
from app.commands.collect_workers import add_workers, collect_shared, require_shareable
from app.commands.inputs import add_corpus, add_model, open_model, open_text, require_data, require_placement
from app.commands.options import add_config, add_json, add_store, positive

if TYPE_CHECKING:
    from profiler.corpus import Corpus
    from store import Progress

NAME = "collect"
SUMMARY = "profile a model on a corpus and write a run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("model", metavar="MODEL", help="folder of a Hugging Face checkpoint, a .gguf file, or a hub id")
    add_store(parser)
    parser.add_argument("--name", help="name of the run (default: the model's)")
    parser.add_argument("--level", default="routing,activations", help=_level_help())
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run of this name")
    parser.add_argument(
        "--vectors-per-domain", action="store_true",
        help="keep sums per neuron, channel and pair of experts apart by domain (default: pooled)",
    )  # fmt: skip
    parser.add_argument(
        "--router-scores", nargs="?", type=positive, const=-1, default=0, metavar="M",
        help="keep the M largest router scores of every token (default M: k + 8)",
    )  # fmt: skip
    parser.add_argument(
        "--scores-every", type=positive, default=1, metavar="N",
        help="keep router scores of one of N sequences, whole (default 1: of all)",
    )  # fmt: skip
    parser.add_argument(
        "--similarity-every", type=positive, default=16, metavar="N",
        help="level similarity runs all experts on one of N tokens (default 16)",
    )  # fmt: skip
    parser.add_argument(
        "--errors-every", type=positive, default=16, metavar="N",
        help="level errors tries narrower weights on one of N tokens of each expert (default 16)",
    )  # fmt: skip
    parser.add_argument(
        "--stack", metavar="NAME", help="which layers, where several stacks of the model have experts (encoder, vision)"
    )
    parser.add_argument("--no-text", action="store_true", help="store no text and no token ids")
    parser.add_argument(
        "--trace-every", type=positive, default=1, metavar="N",
        help="keep the selections of one of N sequences, whole (default 1: of all); sums are of all",
    )  # fmt: skip
    parser.add_argument(
        "--no-trace", action="store_true", help="store the sums alone, no selection token by token: the run stays small"
    )
    parser.add_argument("--measure-overhead", action="store_true", help="measure what watching costs on this model")
    add_corpus(parser)
    _add_generation(parser)
    add_model(parser)
    _add_layer_stream(parser)
    add_workers(parser)
    add_config(parser)
    add_json(parser)


def _add_generation(parser: argparse.ArgumentParser) -> None:
    generation = parser.add_argument_group("generation")
    generation.add_argument(
        "--generate", type=positive, default=0, metavar="N",
        help="answer each text with up to N tokens of the model's own, and record both; --tokens counts both too",
    )  # fmt: skip
    generation.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="draw tokens; 0 takes the likeliest (default)"
    )
    generation.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="draw among the likeliest that add up to P (default 1)"
    )


def _add_layer_stream(parser: argparse.ArgumentParser) -> None:
    stream = parser.add_argument_group("checkpoints larger than memory")
    stream.add_argument(
        "--layer-stream", action="store_true",
        help="load one decoder layer after the other and push all text through each; --memory-limit then holds for the"
        " whole process",
    )  # fmt: skip
    stream.add_argument(
        "--scratch", type=Path, metavar="DIR",
        help="keep hidden states on disk, in this folder (default: in memory, or beside the run if they do not fit)",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Collect; the path of the run file is printed last."""
    import store
    from app.commands.delivery import deliver

    require_data(options)
    path = collect_run(options)
    where = deliver(path)
    shown = store.shown(path.parent)
    if options.json:
        with store.open_run(path) as finished:
            info = finished.info
            answer = {"run": where, "tokens": info.tokens, "sequences": info.sequences, "seconds": info.seconds}
            answer |= {"capture": finished.badge.status, "reason": finished.badge.reason}
        print(json.dumps(answer))
    else:
        print(f"run: {where}\nnext: moescope show {where}    or    moescope dashboard --store {shown}")
    return 0


def collect_run(options: argparse.Namespace) -> Path:
    """Open the corpus, load the model, collect, and return the run file: what is quick to refuse comes first."""
    from app.commands.delivery import undelivered
    from profiler.capture.levels import parse_levels
    from profiler.generation import Sampling
    from store import Catalog

    name = options.name or Path(options.model).name
    parse_levels(options.level)
    sampling = Sampling(options.temperature, options.top_p, options.seed)
    _require_streamable(options)
    require_shareable(options)
    if not options.resume:
        Catalog(options.store).require_free(name)
    elif (finished := undelivered(options.store, name)) is not None:
        return finished
    from profiler import load_tokenizer
    from profiler.collect import collect

    tokenizer = load_tokenizer(options.model)
    require_placement(options)
    corpus = open_text(options, tokenizer, generation_prompt=bool(options.generate))
    if options.layer_stream:
        return _stream(options, name, corpus, tokenizer)
    if options.ray is not None:
        return collect_shared(options, name, corpus, tokenizer, sampling)
    model = open_model(options)
    path = collect(
        model,
        corpus=corpus,
        store=options.store,
        name=name,
        level=options.level,
        tokenizer=tokenizer,
        resume=options.resume,
        keep_text=not options.no_text,
        keep_trace=not options.no_trace,
        measure_overhead=options.measure_overhead,
        vectors_per_domain=options.vectors_per_domain,
        router_scores=options.router_scores,
        similarity_every=options.similarity_every,
        errors_every=options.errors_every,
        scores_every=options.scores_every,
        trace_every=options.trace_every,
        generate=options.generate,
        sampling=sampling,
        progress=show_progress,
        model_name=options.model,
        stack=options.stack,
    )
    line.end()
    return Path(path)


def _require_streamable(options: argparse.Namespace) -> None:
    """Refuse options that do not go with ``--layer-stream``, or that mean nothing without it."""
    from moescope.errors import InputError

    if not options.layer_stream:
        if options.scratch is not None:
            raise InputError("--scratch keeps hidden states of --layer-stream: give both, or neither")
        return
    from profiler.stream.levels import require_levels

    require_levels(options.level)
    others = {
        "--generate": options.generate,
        "--measure-overhead": options.measure_overhead,
        "--device-map": options.device_map,
        "--offload-folder": options.offload_folder,
        "--stack": options.stack,
    }
    given = [name for name, value in others.items() if value]
    if given:
        raise InputError(f"{given[0]} needs the whole model at once: leave it out, or leave out --layer-stream")


def _stream(options: argparse.Namespace, name: str, corpus: Corpus, tokenizer: Any) -> Path:
    """Collect layer by layer."""
    from profiler.stream import collect_streamed

    path = collect_streamed(
        options.model,
        corpus=corpus,
        store=options.store,
        name=name,
        level=options.level,
        tokenizer=tokenizer,
        resume=options.resume,
        keep_text=not options.no_text,
        keep_trace=not options.no_trace,
        vectors_per_domain=options.vectors_per_domain,
        router_scores=options.router_scores,
        similarity_every=options.similarity_every,
        errors_every=options.errors_every,
        scores_every=options.scores_every,
        trace_every=options.trace_every,
        dtype=options.dtype,
        device=options.device,
        memory_limit=options.memory_limit,
        scratch=options.scratch,
        progress=show_progress,
        model_name=options.model,
    )
    line.end()
    return path


def show_progress(progress: Progress) -> None:
    """One line on stderr, printed over itself; what is said before the first token stays."""
    from app.text import duration

    parts = [f"{progress.tokens:,} tokens"]
    if progress.tokens_per_second:
        parts.append(f"{progress.tokens_per_second:,.0f} tokens/s")
    if progress.seconds_left is not None:
        parts.append(f"{duration(progress.seconds_left)} left")
    parts += [progress.detail] if progress.detail else []
    share = f" {min(1.0, progress.tokens / progress.token_budget):4.0%}" if progress.token_budget else ""
    text = f"{progress.state}{share}  {', '.join(parts)}"
    line.over(text, stays=bool(progress.detail) and not progress.tokens)


def _level_help() -> str:
    from profiler.capture.levels import LEVELS

    return f"what to record, a comma list of {', '.join(LEVELS)} (default: routing,activations)"
