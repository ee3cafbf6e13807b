"""``moescope show``: a run in the terminal, the same frames that the pages draw."""

from __future__ import annotations

import argparse
import json
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from app.commands.options import add_json, add_memory_limit, add_store
from app.commands.within import within

if TYPE_CHECKING:
    import polars as pl

    import store

NAME = "show"
SUMMARY = "print a run: its summary, or one view or table of it"

VIEWS = {
    "findings": ("app.findings.findings", "table"),
    "figures": ("app.frames.overview", "key_figures"),
    "checks": ("app.frames.overview", "checks"),
    "alerts": ("app.frames.alerts", "alerts"),
    "balance": ("app.frames.load", "balance"),
    "srp": ("app.frames.consistency", "srp_model"),
    "srp-layers": ("app.frames.consistency", "srp_layers"),
    "hit-rates": ("app.frames.consistency", "hit_rates"),
    "super-experts": ("app.frames.super_experts", "super_experts"),
    "output-maxima": ("app.frames.super_experts", "output_maxima"),
    "residual": ("app.frames.super_experts", "residual"),
    "specialization": ("app.frames.specialization", "specialization"),
    "co-activation": ("app.frames.flow", "co_activations"),
    "transitions": ("app.frames.flow", "information"),
    "predictability": ("app.frames.flow", "predictability"),
    "lookahead": ("app.frames.flow", "lookaheads"),
    "load-probability": ("app.frames.imbalance", "spreads"),
    "shared-output": ("app.frames.shared_output", "norms"),
    "kinds": ("app.frames.kinds", "shares"),
    "steps": ("app.frames.steps", "repeats"),
    "axes": ("app.frames.axis", "distances"),
    "layer-entropy": ("app.frames.layer_memory", "entropies"),
    "layer-memory": ("app.frames.layer_memory", "memory"),
    "neighbours": ("app.frames.neighbours", "recalls"),
    "router-rows": ("app.frames.router_rows", "spreads"),
    "similarity": ("app.frames.similarity", "redundancy"),
    "similarity-agreement": ("app.frames.similarity", "agreement"),
    "coverage": ("app.frames.coverage", "starved"),
    "convergence": ("app.frames.coverage", "needed"),
    "agreement": ("app.frames.coverage", "agreement"),
    "attention-sinks": ("app.frames.super_experts", "attention_sinks"),
    "ablations": ("app.frames.ablation", "ablations"),
    "depth": ("app.frames.room", "depth"),
    "width": ("app.frames.room", "width"),
    "plans": ("app.frames.compress_measured", "plans"),
    "recommendations": ("app.frames.recommendations", "recommendations"),
    "evaluations": ("app.frames.evaluation", "evaluations"),
    "sweeps": ("app.frames.sweep", "sweeps"),
    "methods": ("app.frames.methods", "methods"),
    "metrics": ("app.commands.show", "metrics"),
}
"""Views by name: the module and the function that makes the frame."""

EXPERT = "expert"
"""The view of one expert: several frames."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("target", metavar="RUN", help="path of a run, or its name in --store")
    parser.add_argument(
        "view", nargs="?", metavar="VIEW",
        help=f"{', '.join(VIEWS)}, {EXPERT} (with --layer and --expert), or a table of the run (docs/schema.md)",
    )  # fmt: skip
    parser.add_argument("--layer", metavar="L", help=f"view {EXPERT}: the MoE layer (2.1 = second module of layer 2)")
    parser.add_argument("--expert", metavar="E", type=int, help=f"view {EXPERT}: the number of the routed expert")
    parser.add_argument(
        "--super-experts-report", type=Path, metavar="DIR",
        help="write super experts and the maxima of all experts as the JSON files of the paper's code",
    )  # fmt: skip
    add_memory_limit(parser)
    add_store(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Print the summary, or one view."""
    return within(options, _run)


def _run(options: argparse.Namespace) -> int:
    import store
    from app.text import table

    with store.open_run(store.Catalog(options.store).resolve(options.target)) as opened:
        if options.super_experts_report is not None:
            _write_report(opened, options)
        elif options.view == EXPERT:
            _print_expert(opened, options)
        elif options.view is not None:
            frame = view(opened, options.view)
            print(json.dumps(frame.to_dicts(), default=str) if options.json else table(frame))
        elif options.json:
            print(json.dumps(_summary_json(opened), default=str))
        else:
            print(summary(opened))
    return 0


def _print_expert(run: store.Run, options: argparse.Namespace) -> None:
    """The frames of the page Expert, one below the other."""
    from app.frames.expert_sections import sections
    from app.text import table
    from moescope.errors import InputError

    if options.layer is None or options.expert is None:
        raise InputError(
            f"view {EXPERT} takes --layer L and --expert E, as in: moescope show RUN expert --layer 3 --expert 17"
        )
    found = sections(run, label=options.layer, expert=options.expert)
    if options.json:
        print(json.dumps({title: frame.to_dicts() for title, frame in found.items()}, default=str))
    else:
        print("\n\n".join(f"{title}\n{table(frame, rows=12)}" for title, frame in found.items()))


def _write_report(run: store.Run, options: argparse.Namespace) -> None:
    from app.super_experts_report import report, write

    paths = write(run, options.super_experts_report)
    if options.json:
        print(json.dumps(report(run)))
    else:
        print(f"{len(report(run))} super experts by the rule of the paper's code, {len(paths)} files: {paths[0]}")


def view(run: store.Run, name: str) -> pl.DataFrame:
    """One view, or one table, of a run.

    Raises:
        InputError: there is neither a view nor a table of that name.
    """
    import difflib

    import store
    from moescope.errors import InputError

    if name in VIEWS:
        module, function = VIEWS[name]
        frame: pl.DataFrame = getattr(import_module(module), function)(run)
        return frame
    if name in store.tables():
        return run.table(name)
    known = [*VIEWS, EXPERT, *store.tables()]
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(known)}"
    raise InputError(f"no view or table {name!r}; {hint}")


def metrics(run: store.Run) -> pl.DataFrame:
    """All metric results of a run."""
    return run.metrics()


def summary(run: store.Run) -> str:
    """A run on one screen: verdict of the capture, key figures, alerts, and what to look at next."""
    from app.frames.alerts import alerts
    from app.frames.overview import key_figures, next_steps
    from app.text import table

    found = alerts(run).select("severity", "alert", "layers", "detail")
    parts = [
        f"run {run.name}: capture {run.badge.status} ({run.badge.reason})",
        table(key_figures(run)),
        table(found) if len(found) else "no alerts",
        table(next_steps(run)),
        *(f"switched off {names}: {sentence}" for names, sentence in _ablations(run)),
    ]
    return "\n\n".join(parts)


def _ablations(run: store.Run) -> list[tuple[str, str]]:
    """Experts and verdict of every ablation beside the run."""
    from app.frames import ablation

    found = ablation.documents(run)
    return [(ablation.names(document["experts"]), ablation.sentences(document)[1]) for document in found]


def _summary_json(run: store.Run) -> dict[str, object]:
    from dataclasses import asdict

    from app.frames.alerts import alerts

    return {
        "run": run.name,
        "path": str(run.path),
        "capture": asdict(run.badge),
        "info": asdict(run.info),
        "layers": [asdict(layer) for layer in run.layers],
        "alerts": alerts(run).to_dicts(),
        "ablations": [{"experts": names, "verdict": sentence} for names, sentence in _ablations(run)],
    }
