"""``moescope plan``: from a run, what to cut and what it is expected to cost; and what two plans do differently."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.commands.options import add_config, add_json, add_memory_limit, add_store
from app.commands.within import within

if TYPE_CHECKING:
    import store
    from compressor.plan import Plan

NAME = "plan"
SUMMARY = "plan what to drop, merge, slim or quantize, from a run; or compare two plans"
FORMS = ("uniform", "per_layer", "padded", "shared", "masked", "packed", "dense")
ENGINES = ("any", "transformers", "vllm")
"""Those of :mod:`planner.engines`, which takes longer to import."""

ROWS = {"layers": 100, "difference": 60}
"""Rows that the terminal gets of long tables; --json prints all."""

_UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    from planner.presets import DEFAULT

    parser.add_argument("target", nargs="?", metavar="RUN", help="path of a run, or its name in --store")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--preset", metavar="NAME", help=f"how to choose; --list names them (default: {DEFAULT})")
    what.add_argument("--list", action="store_true", help="the presets, what they need, and whether the run has it")
    what.add_argument("--diff", nargs=2, metavar=("PLAN", "PLAN"), type=Path, help="what two plans do differently")
    what.add_argument("--esft", metavar="DOMAIN", help="experts to fine-tune for a domain, as ESFT's code reads them")
    what.add_argument(
        "--nearest-to", metavar="RUN", help="PreMoe: what RUN's nearest domain would keep, for the text of this run"
    )
    parser.add_argument("--share", type=share, metavar="S", help="part to remove, such as 0.25")
    parser.add_argument(
        "--memory", type=memory, metavar="SIZE",
        help="what the weights may take, such as 3GiB; with --share and --quantizer, what stays gets the bits that fit",
    )  # fmt: skip
    add_bits(parser)
    parser.add_argument(
        "--other-weights", type=memory, default=0, metavar="SIZE",
        help="what the model's other weights take of --memory (default: it is for the experts alone)",
    )  # fmt: skip
    parser.add_argument("--domains", metavar="LIST", help="comma list: only their text counts (default: all)")
    parser.add_argument("--form", choices=FORMS, help="how it is stored (default: the preset's first)")
    parser.add_argument("--allocation", metavar="NAME", help="how the cut is spread over the layers")
    parser.add_argument(
        "--engine", choices=ENGINES,
        help="any: only what every engine loads; transformers: also forms per_layer, shared and packed, which"
        " compressor.load loads; vllm: packed widths that it has kernels for (default: what the form takes)",
    )  # fmt: skip
    parser.add_argument("--no-guard", action="store_true", help="do not protect super experts")
    parser.add_argument("--allow-invalid", action="store_true", help="take a run whose checks failed all the same")
    parser.add_argument(
        "--set", action="append", default=[], type=_setting, metavar="NAME=VALUE", help="a parameter of the preset"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the plan to this file too")
    add_memory_limit(parser)
    add_store(parser)
    add_config(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Make a plan, list what could be made, or compare two."""
    return within(options, _run)


def _run(options: argparse.Namespace) -> int:
    from moescope.errors import InputError

    if options.diff:
        return _print_difference(options)
    if options.target is None:
        raise InputError("of which run? moescope plan RUN --share 0.25, or moescope plan --diff PLAN PLAN")
    _require_one_budget(options)
    import store

    with store.open_run(store.Catalog(options.store).resolve(options.target)) as opened:
        if options.list:
            return _print_presets(opened, options)
        if options.esft:
            return _print_esft(opened, options)
        return _plan(opened, options)


def _require_one_budget(options: argparse.Namespace) -> None:
    """A share and a memory budget go together only where a quantizer fills what the share leaves.

    Raises:
        InputError: two budgets that cannot be met together.
    """
    from moescope.errors import InputError

    if options.share is None or options.memory is None:
        return
    if options.quantizer is None:
        raise InputError("--share and --memory: give one, or --quantizer NAME to give what is left the bits that fit")
    if options.bits is not None:
        raise InputError("--share, --memory and --bits: what is left has the bits that fit, or those; give one of both")


def _plan(run: store.Run, options: argparse.Namespace) -> int:
    from moescope.errors import InputError
    from planner.presets import find

    how_much = (options.share, options.memory, options.bits)
    if all(one is None for one in how_much) and not (options.preset and find(options.preset).takes_no_budget):
        raise InputError("how much? give --share 0.25 or --memory 3GiB, or --bits 3")
    if options.nearest_to:
        return _retrieve(run, options)
    import planner

    given: dict[str, Any] = {"share": options.share, "memory": options.memory, "form": options.form}
    given |= {"domains": _names(options.domains), "engine": options.engine, "guard": not options.no_guard}
    given |= {"other_weights": options.other_weights, "allow_invalid": options.allow_invalid}
    given |= {"bits": options.bits, "quantizer": options.quantizer}
    given |= {"preset": options.preset} if options.preset else {}
    given |= {"allocation": options.allocation} if options.allocation else {}
    given |= dict(options.set)
    plan = planner.make(run, **given)
    return _keep_and_print(run, plan, options)


def _retrieve(run: store.Run, options: argparse.Namespace) -> int:
    """What PreMoe does: each domain of ``run`` keeps its own experts, and the other run's text finds the nearest."""
    import store
    from moescope.errors import InputError
    from planner.drop import retrieval

    if options.share is None:
        raise InputError("--nearest-to takes --share, what every domain's pattern removes")
    guard = not options.no_guard
    patterns = retrieval.build(run, share=options.share, domains=_names(options.domains), guard=guard)
    with store.open_run(store.Catalog(options.store).resolve(options.nearest_to)) as served:
        plan = retrieval.retrieve(served, patterns, engine=options.engine, guard=guard)
        return _keep_and_print(served, plan, options)


def _print_esft(run: store.Run, options: argparse.Namespace) -> int:
    from moescope.errors import InputError
    from planner.esft import PUBLISHED, esft, save

    if options.memory is not None:
        raise InputError("--esft cuts nothing and takes no --memory; --share is the part of the tokens to reach")
    given = dict(options.set)
    unknown = sorted(set(given) - {"score", "shared_experts", "non_expert_modules"})
    if unknown:
        raise InputError(f"--esft has no parameter {unknown[0]!r}: score, shared_experts or non_expert_modules")
    found = esft(run, domain=options.esft, share=options.share, **given)
    if options.output is not None:
        save(found, options.output)
    if options.json or options.output is None:
        print(json.dumps(found))
    else:
        counts = [len(experts) for experts in found["experts"].values()]
        share = options.share or PUBLISHED[given.get("score", "token")]
        print(f"{sum(counts):,} experts, {min(counts)} to {max(counts)} per layer, reach {share:g} of {options.esft}")
        print(f"written to {options.output}")
    return 0


def _keep_and_print(run: store.Run, plan: Plan, options: argparse.Namespace) -> int:
    import store

    path = store.write_plan(run.path, plan.text())
    if options.output is not None:
        plan.save(options.output)
    if options.json:
        print(json.dumps({"path": str(path), "digest": plan.digest, "plan": json.loads(plan.text())}))
    else:
        print(words(plan))
        print("\n" + "\n".join(f"written to {one}" for one in (path, options.output) if one is not None))
    return 0


def words(plan: Plan) -> str:
    """A plan on one screen: what goes where and why, what it saves and costs, what it rests on."""
    from app.frames import compress as frames
    from app.text import table

    found, widths = frames.units(plan), frames.widths(plan)
    parts = [f"{frames.title(plan)}: {plan.source.model}"]
    if len(plan.steps) > 1 or widths.is_empty():
        parts.append(table(frames.layers(found).rename({"label": "layer"}), rows=ROWS["layers"]))
    for frame in (widths, frames.reasons(found)):
        if not frame.is_empty() or widths.is_empty():
            parts.append(table(frame.rename({"label": "layer"}), rows=ROWS["layers"]))
    return "\n\n".join([*parts, table(frames.key_figures(plan)), "\n".join(frames.rests_on(plan))])


def _print_presets(run: store.Run, options: argparse.Namespace) -> int:
    from app.frames.compress_presets import presets
    from app.text import table

    frame = presets(run)
    print(json.dumps(frame.to_dicts()) if options.json else table(frame))
    return 0


def _print_difference(options: argparse.Namespace) -> int:
    from app.frames.compress import difference, title
    from app.text import table
    from compressor.plan import Plan, ServingStep

    first, second = (Plan.load(path) for path in options.diff)
    frame = difference(first, second)
    if options.json:
        print(json.dumps(frame.to_dicts()))
        return 0
    print(f"first:  {title(first)}\nsecond: {title(second)}\n")
    shown = table(frame.rename({"label": "layer"}), rows=ROWS["difference"])
    lies = [[step for step in plan.steps if isinstance(step, ServingStep)] for plan in (first, second)]
    if lies[0] != lies[1]:
        print("where experts lie while the model runs differs\n")
    same = "both do the same" if lies[0] == lies[1] else "both do the same to weights"
    print(f"{len(frame):,} units differ\n\n{shown}" if len(frame) else same)
    return 0


def memory(text: str) -> int:
    """Bytes of ``3GiB``, ``500MB``, ``12g`` or a plain number."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(I?))?B?\s*", text.upper())
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size of memory: write 3GiB, 500MiB or a number of bytes")
    number, letter, binary = (part or "" for part in found.groups())
    factor = 1024 ** ("KMGT".index(letter) + 1) if letter and binary else _UNITS[letter]
    count = int(float(number) * factor)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be more than nothing")
    return count


def add_bits(parser: argparse.ArgumentParser) -> None:
    """What weights may take, beside what is cut or alone."""
    from planner.presets import DEFAULT_QUANTIZER

    parser.add_argument(
        "--bits", type=bits, metavar="B",
        help="bits that a weight of the experts that stay may take, scales and zero points counted, such as 3.0; with a"
        " share or a memory budget too, what is cut is quantized as well",
    )  # fmt: skip
    parser.add_argument(
        "--quantizer",
        metavar="NAME",
        help=f"preset that finds the widths of what a cut leaves (default: {DEFAULT_QUANTIZER})",
    )


def bits(text: str) -> float:
    """A positive number of bits."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of bits: write 3 or 2.5") from None
    if not 0 < value < 64:
        raise argparse.ArgumentTypeError(f"{text!r} must lie between 0 and 64, such as 3.0")
    return value


def share(text: str) -> float:
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no share: write 0.25 or 25%") from None
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must lie between 0 and 1, such as 0.25")
    return value


def _setting(text: str) -> tuple[str, Any]:
    name, mark, value = text.partition("=")
    if not mark or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} must be NAME=VALUE, such as alpha=0.9")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _names(text: str | None) -> list[str] | None:
    return [name.strip() for name in text.split(",") if name.strip()] if text else None
