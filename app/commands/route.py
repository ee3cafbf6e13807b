"""``moescope route``: a plan that changes the choice of the router, from a rule, from biases, or towards even load."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.commands.on_ray import add_ray, on_ray, require_ray
from app.commands.options import add_config, add_json, add_memory_limit, add_store, positive
from app.commands.within import within

if TYPE_CHECKING:
    import store
    from compressor.plan import LayerKey, Plan

NAME = "route"
SUMMARY = "plan other routing while the model runs: a rule, biases, or biases towards even load"
RULES = ("top_k", "top_p", "ratio", "threshold", "null_experts")
"""Those of :data:`compressor.plan.routing.RouteRule` that take a value; importing it takes longer."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("target", metavar="RUN", help="path of a run, or its name in --store")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--rule", choices=RULES, help="what decides how many experts a token uses; with --value")
    what.add_argument(
        "--bias", type=Path, metavar="FILE",
        help='what is added to the logits, {"LAYER": [one number per expert]} or {"LAYER": {"EXPERT": number}} (JSON)',
    )  # fmt: skip
    what.add_argument("--balance", action="store_true", help="find biases that even out the load of each layer")
    parser.add_argument("--value", type=float, metavar="X", help="of the rule, such as 0.5 of top_p or 4 of top_k")
    parser.add_argument("--layers", metavar="LIST", help="comma list: only these change (default: all)")
    parser.add_argument(
        "--weights", choices=("renormalized", "kept"), default="renormalized",
        help="gate weights of the experts that stay: scaled up to the sum before, or as they were",
    )  # fmt: skip
    parser.add_argument("--domain", metavar="NAME", help="only its text is the evidence (default: all)")
    parser.add_argument("--max-tokens", type=positive, metavar="N", help="of the trace that is read (default: all)")
    parser.add_argument("--no-guard", action="store_true", help="let super experts lose their tokens")
    parser.add_argument("--allow-invalid", action="store_true", help="take a run whose checks failed all the same")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the plan to this file too")
    add_ray(parser, "layers of the trace go over workers")
    add_memory_limit(parser)
    add_store(parser)
    add_config(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Make a plan, keep it beside the run, and print it."""
    return within(options, _run)


def _run(options: argparse.Namespace) -> int:
    from moescope.errors import InputError

    require_ray(options)
    if (options.rule is None) != (options.value is None):
        raise InputError("--rule takes --value, such as --rule top_p --value 0.5; --bias and --balance take none")
    if options.value is not None and not math.isfinite(options.value):
        raise InputError(f"--value {options.value}: takes a finite number, such as 0.5 of top_p")
    if options.bias is not None and options.layers:
        raise InputError("--bias names its layers in the file: leave out --layers")
    if options.balance and options.domain:
        raise InputError("--balance rests on all text: leave out --domain")
    import store
    from app.progress import Stoppable
    from app.telling import Telling

    with store.open_run(store.Catalog(options.store).resolve(options.target)) as opened:
        with Stoppable(), on_ray(options) as cluster, Telling() as tell:
            plan = _made(opened, options, cluster=cluster, tell=tell)
        path = store.write_plan(opened.path, plan.text())
        if options.output is not None:
            plan.save(options.output)
        if options.json:
            print(json.dumps({"path": str(path), "digest": plan.digest, "plan": json.loads(plan.text())}))
        else:
            print(words(plan))
            print("\n" + "\n".join(f"written to {one}" for one in (path, options.output) if one is not None))
    return 0


def _made(run: store.Run, options: argparse.Namespace, **how: Any) -> Plan:
    from planner import route

    common: dict[str, Any] = {
        "guard": not options.no_guard, "allow_invalid": options.allow_invalid, "limit_tokens": options.max_tokens,
        **how,
    }  # fmt: skip
    layers = _layers(options.layers)
    if options.balance:
        return route.balance(run, layers=layers, **common)
    common |= {"weights": options.weights, "domains": [options.domain] if options.domain else None}
    if options.bias is not None:
        return route.make(run, rule="bias", biases=biases_of(run, options.bias), method="given", **common)
    return route.make(run, rule=options.rule, value=options.value, layers=layers, **common)


def biases_of(run: store.Run, path: Path) -> dict[LayerKey, tuple[float, ...]]:
    """The biases of a file by (layer, step).

    Raises:
        InputError: it cannot be read, or says something else than numbers per layer and expert.
    """
    from moescope.errors import InputError

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"--bias {path}: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(content, dict) or not content:
        raise InputError(f'--bias {path}: takes {{"LAYER": [one number per expert]}}')
    experts = {(one.layer, one.step): one.num_experts for one in run.layers}
    found: dict[LayerKey, tuple[float, ...]] = {}
    for label, given in content.items():
        key = _layer(label)
        if isinstance(given, dict):
            given = _filled(path, label, given, experts.get(key, 0))
        if not isinstance(given, list) or not all(_is_number(one) for one in given):
            raise InputError(f"--bias {path}: layer {label} takes a list of numbers, one per expert")
        found[key] = tuple(map(float, given))
    return found


def _filled(path: Path, label: str, given: dict[str, Any], experts: int) -> list[Any]:
    """A bias of some experts as a list of all."""
    from moescope.errors import InputError

    row: list[Any] = [0.0] * experts
    for name, value in given.items():
        if not name.isdecimal() or not name.isascii() or int(name) >= experts:
            raise InputError(f"--bias {path}: layer {label} has experts 0..{experts - 1}, not {name!r}")
        row[int(name)] = value
    return row


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _layers(text: str | None) -> list[LayerKey] | None:
    return [_layer(name) for name in text.split(",") if name.strip()] if text else None


def _layer(text: str) -> LayerKey:
    from app.frames.axes import parse_layer
    from moescope.errors import InputError

    try:
        return parse_layer(text.strip())
    except ValueError:
        raise InputError(f"{text.strip()!r} is no layer: write its number, such as 3") from None


def words(plan: Plan) -> str:
    """A plan on one screen: what it changes, what the trace says of it, what it rests on."""
    from app.frames.what_if_plan import layers, title
    from app.text import table

    place, evidence = plan.provenance, plan.evidence[0]
    rests = f"run of {place.tokens:,} tokens; text of {', '.join(place.domains)}"
    return "\n\n".join(
        [f"{title(plan)}: {plan.source.model}", table(layers(plan)), "\n".join((*evidence.notes, rests))]
    )
