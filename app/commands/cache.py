"""``moescope cache``: whether caching experts pays for a model on a machine, with how much memory, and how fast."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.commands.inputs import require_usable
from app.commands.machines import add_machine, add_serving, asked_of, list_machines, machine_of
from app.commands.on_ray import add_ray, on_ray, require_ray
from app.commands.options import add_config, add_json, add_memory_limit, add_store, positive
from app.commands.plan import memory
from app.commands.within import within

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import store
    from compressor.plan import Plan
    from planner.cache.beside import Beside
    from planner.cache.study import Study
    from planner.machine import Machine

NAME = "cache"
ALL = "all"
"""Of a Ray, where nobody says how many."""

SUMMARY = "replay caches of experts on a run's trace and say whether caching pays on a machine, and how fast"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("target", metavar="RUN", nargs="?", help="path of a run, or its name in --store")
    add_machine(parser)
    add_serving(parser)
    parser.add_argument("--domains", metavar="LIST", help="comma list: only their text counts (default: all)")
    parser.add_argument(
        "--plan", type=Path, metavar="FILE", help="a plan that is applied first: experts take the widths that it gives"
    )
    parser.add_argument(
        "--other-weights", type=memory, metavar="SIZE",
        help="all weights beside routed experts (default: estimated from the model's configuration)",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=_steps, metavar="N|all",
        help="layers of tokens that are replayed at most (default 600k); all: hit-rate curves of the whole trace, layer"
        " by layer, while times rest on the default",
    )  # fmt: skip
    add_ray(parser, "with --steps all, layers go over workers")
    parser.add_argument(
        "--beside", action="store_true",
        help="published policies, ways to foresee experts, forecasts, sequences put together and bit planes too",
    )  # fmt: skip
    parser.add_argument("--allow-invalid", action="store_true", help="take a run whose checks failed all the same")
    add_memory_limit(parser)
    add_store(parser)
    add_config(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Replay, time, and print the verdict; the study is kept beside the run."""
    return within(options, _run)


def _run(options: argparse.Namespace) -> int:
    import store
    from app.progress import Stoppable
    from app.sample import remarks
    from app.telling import Telling
    from planner.caching import study

    if options.machines:
        list_machines(as_json=options.json)
        return 0
    _refuse(options)
    machine = machine_of(options)
    with Stoppable(), store.open_run(store.Catalog(options.store).resolve(options.target)) as opened:
        require_usable(opened, options)
        _require_trace(opened)
        with Telling() as tell:
            with on_ray(options) as cluster:
                found = study(
                    opened, machine, plan=_plan(options.plan), domains=domains_of(opened, options.domains), tell=tell,
                    whole=options.steps == ALL, cluster=cluster, **_asked(options),
                )  # fmt: skip
            also = _beside(opened, machine, options, tell) if options.beside else None
        path = store.write_plan(opened.path, json.dumps(found.content()), kind="caching")
    if options.json:
        more = {} if also is None else {"beside": also.content()}
        print(json.dumps({**found.content(), **more, "paths": {"the study": str(path)}}))
    else:
        print(words(found, path=path, remarks=remarks(opened)))
        if also is not None:
            print(f"\n{beside_words(also)}")
    return 0


def words(found: Study, *, path: Path, remarks: Sequence[str] = ()) -> str:
    """The study on one screen: the verdict and why, ways, sizes, domains, and what was assumed."""
    from app.frames import caching as frames
    from app.text import size, table

    uses = [f"{size(found.memory[name])} {title}" for name, title in (
        ("other", "weights beside experts"), ("kv", "keys and values"), ("activations", "activations"))]  # fmt: skip
    room = f"{found.slots:,} of {found.all_slots:,} experts of {size(found.memory['slot'])}"
    parts = [
        found.verdict.sentence,
        f"{found.machine[1]}, {size(found.memory['total'])}: {', '.join(uses)}; room for {room}",
        "\n".join(found.verdict.reasons),
        f"ways to serve with this memory; no way takes less than {found.bound_ms:.3g} ms per token, the CPU's help"
        f" counted; all experts on the device take {found.resident_ms:.3g}\n{table(frames.told(found), rows=None)}",
        f"memory for experts, ms per token\n{table(frames.told_times(found), rows=None)}",
    ]
    if len(found.domains) > 1:
        best = next((one for one in found.ways if one.needs_trace), found.best)
        parts.append(f"by domain, {best.title}\n{table(frames.told_domains(found), rows=None)}")
    parts.append("\n".join((
        f"judged on {found.tokens:,} tokens of {found.requests:,} requests, fitted on others; 95 % intervals over"
        " requests", *(f"note: {note}" for note in (*found.notes, *remarks)),
    )))  # fmt: skip
    parts.append(f"the study is written to {path}")
    return "\n\n".join(part for part in parts if part)


def beside_words(also: Beside) -> str:
    """Published policies, ways to put sequences together and orders of bit planes."""
    from app.frames import caching_beside as frames
    from app.text import table

    parts = [
        f"published policies with as many slots\n{table(frames.told_policies(also), rows=None)}",
        f"hit rates of text yet to come, forecast from half of the requests\n{table(frames.outlook(also), rows=None)}",
        f"sequences put together, true routes known\n{table(frames.batches(also), rows=None)}",
    ]
    if also.foreseen:
        rows = table(frames.told_foreseen(also), rows=None)
        parts.insert(1, f"experts foreseen one layer ahead, beside LRU caches\n{rows}")
    if also.planes:
        parts.append(f"orders of bit planes within a step\n{table(frames.planes(also), rows=None)}")
    return "\n\n".join(parts)


def _beside(run: store.Run, machine: Machine, options: argparse.Namespace, tell: Callable[[str], None]) -> Beside:
    from planner.cache.beside import beside

    return beside(
        run, machine, plan=_plan(options.plan), domains=domains_of(run, options.domains), tell=tell, **_asked(options)
    )


def _require_trace(run: store.Run) -> None:
    from moescope.errors import InputError

    if not run.has_trace:
        raise InputError(
            f"run {run.name!r} holds counts and no trace, and caches depend on the order of tokens: record or import"
            " selections token by token; moescope place needs counts alone"
        )


def domains_of(run: store.Run, given: str | None) -> list[str] | None:
    """The domains that were named, comma by comma; None = all. The planner refuses those that the run has not."""
    names = [name.strip() for name in (given or "").split(",") if name.strip()]
    return names or None


def _refuse(options: argparse.Namespace) -> None:
    from moescope.errors import InputError

    if options.target is None:
        raise InputError("which run? give RUN, a path or a name in --store; --machines lists the machines")
    if options.ray and options.steps != ALL:
        raise InputError("--ray spreads the layers of a whole trace: give --steps all too")
    require_ray(options)
    if options.steps == ALL and ((options.batch or 1) > 1 or (options.chunk or 1) > 1):
        raise InputError("--steps all replays token by token: leave out --batch and --chunk, or give a number of steps")


def _plan(path: Path | None) -> Plan | None:
    if path is None:
        return None
    from compressor.plan import Plan

    return Plan.load(path)


def _asked(options: argparse.Namespace) -> dict[str, Any]:
    return asked_of(options) | ({} if options.steps in (None, ALL) else {"steps": options.steps})


def _steps(text: str) -> int | str:
    return ALL if text == ALL else positive(text)
