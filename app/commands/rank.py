"""``moescope rank``: the plans of several presets, each measured on the model itself; the least damaging is kept."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app import line
from app.commands.inputs import add_corpus, add_model, open_model, open_text, require_data, require_placement
from app.commands.options import add_config, add_json, add_store
from app.commands.plan import ENGINES, add_bits, memory, share

if TYPE_CHECKING:
    from collections.abc import Callable

    import store
    from compressor.plan import Plan
    from planner import Measurement
    from planner.finalists import Ranked
    from planner.presets import Preset

NAME = "rank"
SUMMARY = "measure the plans of several presets on held-out text, before anything is written, and keep the best"
TOKENS = 20_000
"""Held-out text, if nobody says otherwise: enough to rank plans."""

CONTROLS = ("random", "random_bits")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("target", metavar="RUN", help="path of a run, or its name in --store")
    parser.add_argument("model", metavar="MODEL", help="the run's model: a folder, or a hub id")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--share", type=share, metavar="S", help="part to remove, such as 0.25")
    budget.add_argument("--memory", type=memory, metavar="SIZE", help="what the experts may take, such as 3GiB")
    add_bits(parser)
    parser.add_argument(
        "--presets", metavar="LIST", help="comma list (default: all that the run can give; plan RUN --list names them)"
    )
    parser.add_argument("--engine", choices=ENGINES, help="any: only what every engine loads")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the best plan to this file too")
    add_store(parser)
    add_corpus(parser)
    add_model(parser)
    parser.set_defaults(tokens=TOKENS)
    add_config(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Plan, measure, and print the ranking; the best plan is kept beside the run."""
    import planner
    import store
    from moescope.errors import InputError

    if options.share is None and options.memory is None and options.bits is None:
        raise InputError("how much? give --share 0.25 or --memory 3GiB, or --bits 3")
    require_data(options)
    require_placement(options)
    with store.open_run(store.Catalog(options.store).resolve(options.target)) as opened:
        plans, refused = _candidates(opened, options)
        measure = _measure(opened, options, len({plan.digest for plan in plans}))
        try:
            ranking = planner.choose(plans, measure)
        finally:
            line.end()
        kept = store.write_plan(opened.path, ranking[0].plan.text())
    if options.output is not None:
        ranking[0].plan.save(options.output)
    _print(ranking, refused, kept, options)
    return 0


def _candidates(run: store.Run, options: argparse.Namespace) -> tuple[list[Plan], dict[str, str]]:
    """A plan of each preset in its first form that saves memory, and why others have none.

    Raises:
        PlanError: no preset of that name, or none gives a plan.
    """
    import planner
    from moescope.errors import PlanError
    from planner.presets import PRESETS, find

    names = [one.name for one in PRESETS if one.name not in CONTROLS and _takes(one, options)]
    if options.presets:
        names = [find(name.strip()).name for name in options.presets.split(",") if name.strip()]
    plans, refused = [], {}
    for name in names:
        asked: dict[str, Any] = {"share": options.share, "memory": options.memory, "engine": options.engine}
        asked |= {"bits": options.bits, "quantizer": options.quantizer}
        if find(name).forms[0] == "masked":
            asked["form"] = find(name).forms[1]
        try:
            plan = planner.make(run, preset=name, **asked)
        except PlanError as error:
            refused[name] = str(error)
            continue
        if plan.estimate.bytes_saved or options.presets:
            plans.append(plan)
        else:
            refused[name] = "saves no memory: name it with --presets to have it measured all the same"
    if not plans:
        raise PlanError(f"no preset gives a plan: {next(iter(refused.values()), 'none was named')}")
    return plans, refused


def _takes(preset: Preset, options: argparse.Namespace) -> bool:
    """Whether a preset can do anything with what was asked for: bits alone cut nothing, a share cuts."""
    if options.share is None and (options.memory is None) != (options.bits is None):
        return options.bits is None or preset.step == "quantize"
    return preset.step != "quantize"


def _measure(run: store.Run, options: argparse.Namespace, count: int) -> Callable[[Plan], Measurement]:
    """What measures a plan and says on stderr which one it is at."""
    from app.measuring import measuring
    from profiler import load_tokenizer

    corpus = open_text(options, load_tokenizer(options.model))
    measure = measuring(run, open_model(options), corpus)
    done = 0

    def told(plan: Plan) -> Measurement:
        nonlocal done
        done += 1
        line.over(f"measuring plan {done} of {count}: {plan.target.preset}")
        return measure(plan)

    return told


def _print(ranking: list[Ranked], refused: dict[str, str], kept: Path, options: argparse.Namespace) -> None:
    from app.frames.ranking import ranking as frame_of
    from app.text import table

    frame = frame_of(ranking)
    if options.json:
        content: dict[str, Any] = {"ranking": frame.to_dicts(), "refused": refused, "path": str(kept)}
        content["reasons"] = {one.plan.digest: one.reasons for one in ranking}
        print(json.dumps(content))
        return
    best = ranking[0]
    print(f"KL in nats per token, over {best.measurement.tokens:,} tokens, with 95 % intervals over sequences\n")
    print(table(frame.drop("digest")))
    print("\n" + "\n".join(best.reasons))
    for name, reason in refused.items():
        print(f"{name}: {reason}")
    for path in (kept, options.output):
        if path is not None:
            print(f"the best plan, {best.plan.target.preset}, is written to {path}")
