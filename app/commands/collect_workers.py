"""``moescope collect --ray``: the same collection, shared among the workers of a Ray."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app import line
from app.commands.options import positive

if TYPE_CHECKING:
    from profiler.corpus import Corpus
    from profiler.generation import Sampling
    from store import Progress


def add_workers(parser: argparse.ArgumentParser) -> None:
    """``--ray`` and how many workers of what size."""
    workers = parser.add_argument_group("workers on Ray")
    workers.add_argument(
        "--ray", metavar="ADDRESS",
        help="share the text among workers: local (this machine), or HOST:PORT of a Ray cluster's head",
    )  # fmt: skip
    workers.add_argument("--workers", type=positive, metavar="N", help="how many hold the model at once (default 2)")
    workers.add_argument(
        "--cpus-per-worker", type=_above_zero, metavar="C", help="CPUs, and threads, of each (default 1)"
    )
    workers.add_argument(
        "--gpus-per-worker", type=_above_zero, metavar="G", help="GPUs of each; 0.5 lets two share one (default none)"
    )
    workers.add_argument(
        "--part-tokens", type=positive, metavar="T",
        help="tokens of one part at least, which is what a lost worker costs (default by the size of the text)",
    )  # fmt: skip


def require_shareable(options: argparse.Namespace) -> None:
    """Refuse options that do not go with ``--ray``, or that mean nothing without it.

    Raises:
        InputError: the first of them, by name.
    """
    from moescope.errors import InputError

    sizes = {
        "--workers": options.workers,
        "--cpus-per-worker": options.cpus_per_worker,
        "--gpus-per-worker": options.gpus_per_worker,
        "--part-tokens": options.part_tokens,
    }
    if options.ray is None:
        given = [name for name, value in sizes.items() if value is not None]
        if given:
            raise InputError(f"{given[0]} is about workers on Ray: give --ray local or --ray HOST:PORT too")
        return
    if options.layer_stream:
        raise InputError("--layer-stream keeps all text on one machine: leave out --ray, or leave out --layer-stream")
    if options.measure_overhead:
        raise InputError("--measure-overhead times one process: leave out --ray, or leave out --measure-overhead")
    if not options.gpus_per_worker and options.device not in ("auto", "cpu"):
        raise InputError(
            f"--device {options.device} with workers that have no GPU: give --gpus-per-worker too, or leave out"
            " --device"
        )


def collect_shared(options: argparse.Namespace, name: str, corpus: Corpus, tokenizer: Any, sampling: Sampling) -> Path:
    """Collect on workers; Ray is asked for them before any of them loads a model."""
    from app.commands.inputs import open_model
    from moescope import cluster
    from profiler.capture.levels import RecordingOptions, parse_levels
    from profiler.workers import collect_on_ray

    recording = RecordingOptions(
        levels=parse_levels(options.level),
        vectors_per_domain=options.vectors_per_domain,
        router_scores=options.router_scores,
        similarity_every=options.similarity_every,
        errors_every=options.errors_every,
        scores_every=options.scores_every,
        keep_trace=not options.no_trace,
        trace_every=options.trace_every,
    )
    wanted = argparse.Namespace(
        model=options.model,
        dtype=options.dtype,
        device=options.device,
        dequantize=options.dequantize,
        device_map=options.device_map,
        memory_limit=options.memory_limit,
        offload_folder=options.offload_folder,
    )
    with cluster.connected(
        options.ray,
        workers=options.workers or 2,
        cpus_per_worker=options.cpus_per_worker or 1,
        gpus_per_worker=options.gpus_per_worker or 0,
    ) as joined:
        path = collect_on_ray(
            joined,
            partial(open_model, wanted),
            corpus=corpus,
            name=name,
            tokenizer=tokenizer,
            options=recording,
            store=options.store,
            part_tokens=options.part_tokens,
            resume=options.resume,
            keep_text=not options.no_text,
            generate=options.generate,
            sampling=sampling,
            progress=_show,
            model_name=options.model,
            stack=options.stack,
        )
    line.end()
    return path


def _show(progress: Progress) -> None:
    from app.commands.collect import show_progress

    show_progress(progress)


def _above_zero(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} must be above zero")
    return number
