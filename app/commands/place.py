"""``moescope place``: which device of an expert-parallel group holds which experts, and is it worth moving them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.commands.on_ray import add_ray, on_ray, require_ray
from app.commands.options import add_config, add_json, add_memory_limit, add_store, positive
from app.commands.within import within

if TYPE_CHECKING:
    import store
    from app.frames.placement import Placed

NAME = "place"
SUMMARY = "place experts on devices, and say on later text whether moving them is worth it"

_HEADS = {
    "placement": "placement", "balancedness": "balancedness", "per_pass": "per pass", "saved": "busiest saves",
    "devices": "devices/token", "nodes": "nodes/token", "copies": "copies sent", "remote": "pairs that leave",
    "moves": "layer to layer",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("target", nargs="?", metavar="RUN", help="path of a run, or its name in --store")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--devices", type=positive, metavar="N", help="devices of the expert-parallel group")
    what.add_argument("--list", action="store_true", help="the methods, what they need, and their options")
    what.add_argument(
        "--choices", type=Path, metavar="FILE",
        help="unequal devices instead: which variant of a model serves which domain where (JSON; docs/placement.md)",
    )  # fmt: skip
    what.add_argument(
        "--adapters", type=Path, metavar="FILE",
        help="memory of experts fine-tuned for several tasks on one base, {adapter: {layer: [experts]}} (JSON)",
    )  # fmt: skip
    parser.add_argument("--method", metavar="NAME", help="how to place; --list names them (default: eplb)")
    parser.add_argument("--nodes", type=positive, default=1, metavar="N", help="among which devices are divided evenly")
    parser.add_argument(
        "--redundant", type=_count, default=0, metavar="N", help="slots of a layer beyond one per expert, for replicas"
    )
    parser.add_argument(
        "--groups", type=positive, metavar="N",
        help="of experts, that hierarchical EPLB keeps on a node (default: those of the router)",
    )  # fmt: skip
    parser.add_argument("--batch", type=positive, metavar="N", help="requests decoded together (default: 64)")
    parser.add_argument(
        "--train-part", type=float, default=0.5, metavar="X",
        help="of the requests, what the placement is made from; the others score it (default: 0.5)",
    )  # fmt: skip
    parser.add_argument("--domains", metavar="LIST", help="comma list: only their text counts (default: all)")
    parser.add_argument("--max-tokens", type=positive, metavar="N", help="of the trace at most (default: all)")
    parser.add_argument(
        "--option", action="append", default=[], type=_option, metavar="NAME=VALUE", help="an option of the method"
    )
    parser.add_argument("--allow-invalid", action="store_true", help="take a run whose checks failed all the same")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the plan to this file too")
    add_ray(parser, "parts of the trace go over workers")
    add_memory_limit(parser)
    add_store(parser)
    add_config(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Place and print, list what there is, or answer for unequal devices and adapters."""
    return within(options, _run)


def _run(options: argparse.Namespace) -> int:
    from moescope.errors import InputError

    require_ray(options)
    if options.ray and options.devices is None:
        raise InputError("--ray spreads the text that a placement is made from and scored on: give --devices too")
    if (options.choices or options.adapters) and (options.output or options.method):
        raise InputError("--choices and --adapters print an answer and place nothing: leave out --method and -o")
    if options.choices:
        from app.commands.place_choices import print_assignment

        return print_assignment(options.choices, as_json=options.json)
    if options.target is None and options.list:
        return _print_methods(None, options)
    if options.target is None:
        raise InputError("of which run? moescope place RUN --devices 8; --list names the methods")
    import store

    with store.open_run(store.Catalog(options.store).resolve(options.target)) as opened:
        if options.list:
            return _print_methods(opened, options)
        if options.adapters:
            from app.commands.place_adapters import print_memory

            return print_memory(opened, options.adapters, as_json=options.json)
        if options.devices is None:
            raise InputError("on how many devices? give --devices 8")
        return _place(opened, options)


def _place(run: store.Run, options: argparse.Namespace) -> int:
    import store
    from app.frames.placement import placed
    from app.progress import Stoppable
    from app.sample import remarks
    from app.telling import Telling
    from moescope.errors import InputError
    from planner.placing import BATCH

    if options.ray and not run.has_trace:
        raise InputError(f"run {run.name!r} holds counts and no trace: there is no text to share, leave out --ray")
    names = [name.strip() for name in (options.domains or "").split(",") if name.strip()]
    with Stoppable(), on_ray(options) as cluster, Telling() as tell:
        found = placed(
            run, method=options.method or "eplb", devices=options.devices, nodes=options.nodes,
            redundant=options.redundant, groups=options.groups, batch=options.batch or BATCH,
            train_part=options.train_part, domains=names or None, max_tokens=options.max_tokens,
            allow_invalid=options.allow_invalid, options=dict(options.option), cluster=cluster, tell=tell,
        )  # fmt: skip
    if options.output is not None:
        found.plan.save(options.output)
    path = store.write_plan(run.path, found.plan.text())
    if options.json:
        print(json.dumps({"path": str(path), **content(found)}))
    else:
        print("\n".join((words(found), *remarks(run))))
        print("\n" + "\n".join(f"written to {one}" for one in (path, options.output) if one is not None))
    return 0


def content(found: Placed) -> dict[str, Any]:
    """Everything that is known of a placement, for machines."""
    from app.frames import placement as frames

    told, moved = found.verdict, frames.movement(found)
    return {
        "digest": found.plan.digest,
        "verdict": None if told is None else told.sentence,
        "gain": None if told is None else told.gain,
        "placements": frames.comparison(found).to_dicts(),
        "layers": frames.layers(found).to_dicts(),
        "domains": frames.domains(found).to_dicts(),
        "movement": {
            "slots": int(moved["slots"].sum()), "changed": int(moved["changed"].sum()),
            "copied": int(moved["copied"].sum()), "expert_bytes": found.expert_bytes or None,
            "bytes": int(moved["bytes"].sum()) if found.expert_bytes else None,
        },
        "notes": list(found.notes),
        "plan": json.loads(found.plan.text()),
    }  # fmt: skip


def words(found: Placed) -> str:
    """A placement on one screen: is it worth it, beside what, what is sent, what it rests on."""
    from app.frames import placement as frames
    from app.text import size, table

    told, frame, moved = found.verdict, frames.comparison(found), frames.movement(found)
    first = told.sentence if told is not None else (
        "Not known: whether moving experts is worth it. This run holds counts and no trace, so balancedness below is"
        " that of the counts that the placement was made from."
    )  # fmt: skip
    place = found.plan.provenance
    experts, devices = found.placement.num_experts, found.placement.devices
    what = f"{len(found.labels)} layers of {experts} experts in {found.placement.slots} slots on {devices} devices"
    held = frame.select(
        name for name in _HEADS if frame[name].count() and (name != "nodes" or found.placement.nodes > 1)
    )
    copied, every = int(moved["copied"].sum()), int(moved["bytes"].sum())
    lines = [
        f"to be sent: {copied:,} experts, {size(every) if found.expert_bytes else 'bytes not known'};"
        f" {int(moved['changed'].sum()):,} of {int(moved['slots'].sum()):,} slots change against the contiguous map",
        *found.notes,
    ]  # fmt: skip
    if told is not None and len(told.domains) > 1:
        worst = told.worst_domain
        lines.insert(
            1, f"worst domain: {worst}, {told.domains_before[worst].pass_balancedness:.1%} busy per pass before,"
            f" {told.domains[worst].pass_balancedness:.1%} after, on its own later text",
        )  # fmt: skip
    lines.append(f"rests on {place.tokens:,} tokens of {', '.join(place.domains)}")
    title = f"{found.plan.target.preset}: {found.plan.source.model}, {what}"
    return "\n\n".join([title, first, table(held.rename(_HEADS, strict=False)), "\n".join(lines)])


def _print_methods(run: store.Run | None, options: argparse.Namespace) -> int:
    from app.frames.placement import methods
    from app.text import table

    frame = methods(run)
    frame = frame if run is not None else frame.drop("here")
    print(json.dumps(frame.to_dicts()) if options.json else table(frame) + "\n\n* must be given")
    return 0


def _count(text: str) -> int:
    return 0 if text.strip() == "0" else positive(text)


def _option(text: str) -> tuple[str, Any]:
    name, mark, value = text.partition("=")
    if not mark or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} must be NAME=VALUE, such as slack=0.1")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
