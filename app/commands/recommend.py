"""``moescope recommend``: a budget or a machine in; the plan to use out, or the advice to leave the model as it is."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.commands import serving_advice
from app.commands.inputs import add_corpus, add_model, open_model, open_text, require_placement, require_usable
from app.commands.machines import add_machine, add_serving, list_machines
from app.commands.options import add_config, add_json, add_store, positive
from app.commands.plan import ENGINES, memory

if TYPE_CHECKING:
    from collections.abc import Callable

    import store
    from compressor.plan import Plan
    from planner import Measurement
    from planner.candidates import Request
    from planner.estimate.prediction import Calibration
    from planner.recommendation import Candidate, Recommendation

NAME = "recommend"
SUMMARY = "the best plan for a budget of bytes (--memory), or for a machine (--vram, --ram, --link)"
TOKENS = 20_000
"""Text for measuring, if nobody says otherwise: enough to rank plans."""

GENERATIONS = 6
"""Of the search, where plans are measured and nobody says otherwise."""

SMALL = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1)
"""Parts of the experts' bytes that are tried where a budget leaves nothing for them, before those of a curve."""

ROWS = 12
"""Candidates on the screen; --json prints all."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("target", metavar="RUN", nargs="?", help="path of a run, or its name in --store")
    parser.add_argument(
        "model", nargs="?", metavar="MODEL",
        help="the run's model, a folder or a hub id: --memory is for the whole of it, and with --data plans are"
        " measured; without it, plans are priced from the run alone",
    )  # fmt: skip
    parser.add_argument("--memory", type=memory, metavar="SIZE", help="what the weights may take, such as 12GiB")
    parser.add_argument(
        "--other-weights", type=memory, metavar="SIZE",
        help="what the model's other weights take of --memory (default: read from MODEL; without it, none)",
    )  # fmt: skip
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        help="any: only what every engine loads; vllm: packed widths that it has kernels for too (default: what"
        " compressor.load loads)",
    )
    parser.add_argument(
        "--quality", type=_quality, metavar="KL", help="largest KL divergence that is acceptable, nats per token"
    )
    parser.add_argument("--domains", metavar="LIST", help="comma list: only their text counts (default: all)")
    parser.add_argument("--finalists", type=positive, metavar="N", help="plans that are measured (default 6)")
    parser.add_argument(
        "--search", type=_count, metavar="GENERATIONS",
        help=f"of a search from the best plans, 0 = none (default: {GENERATIONS} where plans are measured)",
    )  # fmt: skip
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE",
        help="what earlier measurements say of prices: a recommendation of this model, as JSON",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="a first look: few methods, in seconds")
    parser.add_argument("--curve", action="store_true", help="price all sizes too, and keep them beside the run")
    parser.add_argument("--no-guard", action="store_true", help="do not protect super experts")
    parser.add_argument("--allow-invalid", action="store_true", help="take a run whose checks failed all the same")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the best plan to this file too")
    add_machine(parser)
    add_serving(parser)
    parser.add_argument("--keep-widths", action="store_true", help="with a machine: experts stay as wide as they are")
    add_store(parser)
    add_corpus(parser)
    add_model(parser)
    parser.set_defaults(tokens=TOKENS)
    add_config(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Price, measure, and print the advice; it is kept beside the run, and so is the best plan."""
    import planner
    import store
    from app.progress import Stoppable
    from app.telling import Telling

    if options.machines:
        list_machines(as_json=options.json)
        return 0
    _refuse(options)
    with Stoppable(), store.open_run(store.Catalog(options.store).resolve(options.target)) as opened:
        require_usable(opened, options)
        if serving_advice.wanted(options):
            return serving_advice.run(opened, options, _domains(opened, options))
        request, notes = _request(opened, options)
        calibration = _calibration(opened, options.calibration)
        _require_room(request)
        with Telling() as tell:
            measure = _measure(opened, options, notes, tell) if options.data else None
            found = planner.recommend(
                opened, memory=request.memory, other_weights=request.other_weights, engine=request.engine,
                quality=options.quality, domains=request.domains, guard=request.guard,
                allow_invalid=request.allow_invalid, measure=measure, calibration=calibration,
                generations=_generations(options), quick=options.quick, tell=tell, **_given(options),
            )  # fmt: skip
            sizes = _curve(request, found, tell, few=options.quick) if options.curve else None
        paths = _keep(opened, found, sizes, options)
    if options.json:
        print(json.dumps({**found.content(), "notes": notes, "paths": {key: str(at) for key, at in paths.items()}}))
    else:
        print(words(found, notes=notes, sizes=sizes, paths=paths))
    return 0


def words(
    found: Recommendation, *, notes: list[str], sizes: list[Candidate] | None = None, paths: dict[str, Path]
) -> str:
    """A recommendation on one screen: the verdict and why, the candidates, risks, and what it rests on."""
    from app.frames import recommendations as frames
    from app.text import size, table

    parts = [f"{found.verdict}: {size(found.memory)} for weights that take {size(found.bytes_before)}"]
    parts.append("\n".join((*found.reasons, *(f"note: {note}" for note in notes))))
    if found.candidates:
        title = "KL divergence from the model as it is, nats per token; size and bits as stored"
        parts.append(f"{title}\n{table(frames.candidates(found.candidates).rename({'place': '#'}), rows=ROWS)}")
        best = found.candidates[0]
        if best.risks:
            parts.append("\n".join((f"risks of {best.name}:", *(f"- {risk}" for risk in best.risks))))
    parts.append("\n".join((*found.evidence, *_refused_words(found))))
    if sizes is not None:
        from planner.curve import pareto

        parts.append(f"sizes that nothing smaller matches, priced from sums\n{table(frames.curve(pareto(sizes)))}")
    parts.append("\n".join(f"{what} is written to {path}" for what, path in paths.items()))
    return "\n\n".join(part for part in parts if part)


def _refused_words(found: Recommendation) -> list[str]:
    count = len(found.refused)
    presets = "preset" if count == 1 else "presets"
    return [f"{count} {presets} gave no plan of that size; --json says why."] if count else []


def _refuse(options: argparse.Namespace) -> None:
    """What can be refused before anything is read.

    Raises:
        InputError: no budget, text without a model, a search without text, or a folder that is not there.
    """
    from moescope.errors import InputError

    if options.target is None:
        raise InputError("of which run? give RUN, the path of a run or its name in --store")
    if serving_advice.wanted(options):
        serving_advice.refuse(options)
        return
    serving_advice.refuse_alone(options)
    if options.memory is None:
        raise InputError(
            "how much memory? give --memory 12GiB for the weights, or --vram 12GiB for the machine's device"
        )
    if options.data and options.model is None:
        raise InputError("--data is text to measure plans on: give the run's MODEL too")
    if options.search and not options.data:
        raise InputError("--search goes by what plans are measured to cost: give MODEL and --data too")
    if options.output is not None and not options.output.absolute().parent.is_dir():
        raise InputError(f"-o {options.output}: there is no folder {options.output.absolute().parent}")
    if options.data:
        require_placement(options)


def _request(run: store.Run, options: argparse.Namespace) -> tuple[Request, list[str]]:
    """What is asked, and what the reader has to know of it."""
    from app.whole_model import whole_model
    from planner import engines
    from planner.candidates import Request

    notes = []
    other = options.other_weights
    if options.model is None:
        notes.append("Without MODEL nothing is measured: all figures are priced from the run's sums.")
        if other is None:
            notes.append("--memory counts the experts alone: give MODEL or --other-weights for the whole model.")
    elif other is None:
        other, stored = whole_model(run, options.model)
        # The checkpoint knows better than a run that was recorded in another type, or by an older version.
        run.info.settings["stored_dtype"] = stored
        notes.append(f"Of --memory, {other:,} bytes are for weights beside the experts (read from {options.model}).")
    if options.model is not None and not options.data:
        notes.append("Without --data nothing is measured: all figures are priced from the run's sums.")
    if options.engine is not None and engines.find(options.engine).note:
        notes.append(engines.find(options.engine).note)
    request = Request(
        run=run, memory=options.memory, other_weights=other or 0, engine=options.engine, domains=_domains(run, options),
        guard=not options.no_guard, allow_invalid=options.allow_invalid,
    )  # fmt: skip
    return request, notes


def _domains(run: store.Run, options: argparse.Namespace) -> list[str] | None:
    """The domains that were named.

    Raises:
        InputError: the run has none of such a name.
    """
    import difflib

    from moescope.errors import InputError

    if not options.domains:
        return None
    names = [name.strip() for name in options.domains.split(",") if name.strip()]
    for name in names:
        if name not in run.domains:
            near = difflib.get_close_matches(name, run.domains, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(run.domains)}"
            raise InputError(f"run {run.name!r} has no domain {name!r}: {hint}")
    return names or None


def _require_room(request: Request) -> None:
    """Refuse a budget that the other weights alone take, with the nearest that can be reached.

    Raises:
        InputError: such a budget.
    """
    from moescope.errors import InputError
    from planner.curve import SIZES, curve, quick

    if request.other_weights < request.memory:
        return
    nearest: list[Candidate] = []
    for part in (*SMALL, *SIZES):
        nearest = nearest or curve(quick(request), sizes=(part,))
    reached = f"plans are found from {min(one.bytes for one in nearest):,} bytes on" if nearest else ""
    raise InputError(
        f"--memory {request.memory:,} bytes: the weights beside the experts alone take {request.other_weights:,};"
        f" {reached or 'no plan of this run saves any'}"
    )


def _calibration(run: store.Run, file: Path | None) -> Calibration | None:
    """The factors of an earlier recommendation, or of a file of nothing but them.

    Raises:
        InputError: the file holds none, or is of another model.
    """
    if file is None:
        return None
    import store
    from moescope.errors import InputError, MoescopeError
    from planner.estimate.prediction import Calibration
    from planner.source import source_of

    try:
        content = store.read_plan_document(file)
        plans = content.get("candidates") or []
        shapes = plans[0]["plan"]["source"]["layers"] if plans else None
        found = Calibration.of(content.get("calibration", content))
    except (MoescopeError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"--calibration {file}: this is no recommendation and no calibration ({error})") from error
    layers = [shape.model_dump(mode="json") for shape in source_of(run).layers]
    if shapes is not None and shapes != layers:
        raise InputError(f"--calibration {file} is of another model than run {run.name!r}")
    if not found.count:
        raise InputError(f"--calibration {file} rests on no measured plan: measure some with MODEL and --data")
    return found


def _measure(
    run: store.Run, options: argparse.Namespace, notes: list[str], tell: Callable[[str], None]
) -> Callable[[Plan], Measurement]:
    from app.measuring import measuring, seen_before
    from profiler import load_tokenizer

    tell("reading text and model")
    corpus = open_text(options, load_tokenizer(options.model))
    seen = seen_before(run, corpus)
    if seen is not None:
        notes.append(seen)
    return measuring(run, open_model(options), corpus)


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """What the planner has a value of its own for."""
    return {} if options.finalists is None else {"finalists": options.finalists}


def _generations(options: argparse.Namespace) -> int:
    if options.search is not None:
        return int(options.search)
    return GENERATIONS if options.data else 0


def _curve(request: Request, found: Recommendation, tell: Callable[[str], None], *, few: bool) -> list[Candidate]:
    from planner.curve import QUICK_SIZES, SIZES, curve, quick

    asked, sizes = (quick(request), QUICK_SIZES) if few else (request, SIZES)
    return curve(asked, sizes=sizes, calibration=found.calibration, tell=tell)


def _keep(
    run: store.Run, found: Recommendation, sizes: list[Candidate] | None, options: argparse.Namespace
) -> dict[str, Path]:
    """What is written, and where; no plan where the advice is to leave the model as it is."""
    import store

    paths = {"the recommendation": store.write_plan(run.path, json.dumps(found.content()), kind="recommendation")}
    if sizes is not None:
        text = json.dumps(curve_content(found, sizes))
        paths["the curve"] = store.write_plan(run.path, text, kind="curve")
    if found.candidates and found.verdict != "leave it":
        plan = found[0]
        paths["the best plan"] = store.write_plan(run.path, plan.text())
        if options.output is not None:
            plan.save(options.output)
            paths["a copy of it"] = options.output
    return paths


def curve_content(found: Recommendation, sizes: list[Candidate]) -> dict[str, Any]:
    """The curve as plain data; plans are named by digest and by the arguments of ``planner.make`` that give them."""
    from planner.curve import pareto

    best = {one.plan.digest for one in pareto(sizes)}
    return {
        "kind": "curve",
        "bytes_before": found.bytes_before,
        "calibration": found.calibration.content(),
        "candidates": [
            {
                "digest": one.plan.digest, "preset": one.plan.target.preset, "name": one.name, "mix": one.mix,
                "bytes": one.bytes, "bits": one.plan.estimate.bits,
                "prediction": None if one.prediction is None else one.prediction.model_dump(mode="json"),
                "pareto": one.plan.digest in best, "recipe": dict(one.recipe),
            }
            for one in sizes
        ],
    }  # fmt: skip


def _quality(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of nats: write 0.05") from None
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be above 0, such as 0.05 nats per token")
    return value


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, 0 or more")
    return int(text)
