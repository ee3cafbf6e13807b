"""The one entry to all plans: a run, a preset and a budget in, a checked plan out."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import store
from compressor.plan import Estimate, Evidence, LayerValues, Plan, Provenance, Source, Target
from moescope import __version__
from moescope.errors import PlanError
from planner import engines, presets
from planner.budget import bits_left, bits_that_fit, bytes_after, shares_that_may_fit, value_bytes_of
from planner.estimate import estimate
from planner.guard import Guard, Rule, guard_of
from planner.importance.statistics import Statistics
from planner.source import source_of
from planner.task import Draft, Task, once

_GRID = ("symmetric", "shared_bits", "group_size", "scales")
"""Parameters that all presets that quantize take."""


def make(
    run: store.Run,
    *,
    preset: str | None = None,
    share: float | None = None,
    memory: int | None = None,
    bits: float | None = None,
    quantizer: str | None = None,
    other_weights: int = 0,
    domains: Sequence[str] | None = None,
    form: str | None = None,
    engine: str | None = None,
    guard: bool | Rule = True,
    allow_invalid: bool = False,
    factors: Sequence[float] | None = None,
    kept: dict[Any, Any] | None = None,
    **parameters: Any,
) -> Plan:
    """A plan from one run. The same run and arguments give the same plan, byte for byte.

    Args:
        run: a finished run.
        preset: a method with its defaults, one of :data:`planner.presets.PRESETS`; None = ours, see
            :func:`planner.presets.default`, or the quantizer where bits alone are asked for.
        share: part of the experts, neurons or layers to remove, above 0 and below 1.
        memory: bytes that weights may take, instead of a share: the smallest share that fits is taken; with a preset
            that quantizes, the widths that fit. It counts the weights of the experts (biases left out) and
            ``other_weights``.
        bits: effective bits that a weight of the experts may take, scales and zero points counted. With a preset that
            cuts, what is left is quantized to it.
        quantizer: preset that finds the widths of what a cut leaves; None = ours,
            :data:`planner.presets.DEFAULT_QUANTIZER`, where bits are wanted. With a share and a memory budget, the
            share is cut and what is left gets the bits that fit.
        other_weights: bytes of all other weights of the model, which a run does not know.
        domains: whose text counts; None = all of the run's.
        form: how the result is stored; None = the first of the preset's forms that the engine loads.
        engine: ``any`` = only what every engine loads; ``transformers`` = also what ``compressor.load`` alone loads;
            ``vllm`` = also packed widths that it has kernels for; None = what the form takes.
        guard: keep super experts whatever their score, see :func:`planner.guard.guard_of`.
        allow_invalid: take a run whose checks failed.
        factors: per MoE layer, what a change of its stream costs against other layers; for presets that go by the
            stream (mixed, error_bits, stream_slim). What measured plans say, or a search tries; None = all alike.
        kept: what plans of the same run, domains and guard have worked out before; they fill it.
        parameters: of the method, in place of the preset's; docs/plan.md lists them.

    Raises:
        PlanError: what cannot be, with the number and what would do; before anything is computed where possible.
    """
    if preset is None and share is None and memory is None and bits is not None:  # nothing is cut
        preset, quantizer = quantizer or presets.DEFAULT_QUANTIZER, None
    chosen = presets.find(presets.default(engine=engine, form=form) if preset is None else preset)
    require_usable(run, chosen, allow_invalid)
    settings = _settings(chosen, parameters, engine)
    both = share is not None and memory is not None
    second = _quantizer(run, chosen, quantizer, bits, both, allow_invalid)
    kept = {} if kept is None else kept
    source: Source = once(kept, "source", lambda: source_of(run))
    if chosen.step == "quantize":
        _only_bits(chosen, share, memory, bits)
    task = Task(
        run=run, source=source, domains=once(kept, "domains", lambda: domains_of(run, domains)),
        share=0.0 if chosen.step == "quantize" else _share(share, None if second else memory),
        form=_form(chosen, form, engine, source, settings), bits=_bits(bits),
        guard=once(kept, ("guard", guard), lambda: guard_of(run, guard)), factors=_factors(source, factors), kept=kept,
    )  # fmt: skip
    if second is not None:
        _form(second, None, engine, source, second.defaults)
    needs = "transformers" if task.form in engines.OURS or second is not None else "any"
    name = chosen.name if second is None else f"{chosen.name}+{second.name}"
    target = Target(share=share, memory=memory, bits=bits, engine=engine or needs, preset=name)
    if chosen.step == "quantize" and memory is not None:
        task = replace(task, bits=bits_that_fit(task, memory=memory, other=other_weights))
    if memory is None or chosen.step == "quantize" or both:
        room = None if memory is None or not both else memory - other_weights
        return assemble(task, draft_of(task, chosen, settings, second, room=room, engine=engine), target)
    return _within(task, chosen, settings, second, target, memory, other_weights)


def draft_of(
    task: Task,
    preset: presets.Preset,
    settings: Mapping[str, Any],
    second: presets.Preset | None = None,
    *,
    room: int | None = None,
    engine: str | None = None,
) -> Draft:
    """What a preset decides, and what the second one makes of what it leaves.

    Args:
        task: what is planned.
        preset: the first.
        settings: its parameters.
        second: the one that finds widths.
        room: bytes that the experts may take in all, instead of the task's bits.
        engine: that loads the result.

    Raises:
        PlanError: as their methods.
    """
    first: Draft = preset.function(task, **settings)
    if second is None:
        return first
    behind_task = replace(task, before=first.steps, form=second.forms[0])
    if room is not None:
        behind_task = replace(behind_task, bits=bits_left(task, first.steps, room=room))
    behind: Draft = second.function(behind_task, **_settings(second, {}, engine))
    return replace(first, steps=(*first.steps, *behind.steps), notes=(*first.notes, *behind.notes))


def assemble(task: Task, draft: Draft, target: Target) -> Plan:
    """The checked plan that a draft becomes, with provenance, estimate and evidence.

    Raises:
        PlanError: it asks for what no checkpoint or engine could hold.
    """
    run = task.run
    plan = Plan(
        provenance=Provenance(
            run=run.name, corpus=str(run.info.settings.get("corpus_sha256", "")), tokens=run.info.tokens,
            domains=task.domains, badge=run.badge.status, tool_version=__version__,
        ),
        source=task.source,
        target=target,
        steps=draft.steps,
        estimate=Estimate(
            expert_parameters=0, expert_parameters_after=0, active_parameters=0, active_parameters_after=0,
            bytes_saved=0,
        ),
        evidence=(_evidence(draft, task.guard, target.preset),),
    ).checked()  # fmt: skip
    engines.require_kernels(target.engine, plan.steps)
    return plan.model_copy(update={"estimate": estimate(plan, task, draft)})


def _within(
    task: Task, preset: presets.Preset, settings: Mapping[str, Any], second: presets.Preset | None, target: Target,
    memory: int, other: int,
) -> Plan:  # fmt: skip
    """The plan with the smallest share whose weights fit; shares are tried upwards, from the first that may."""
    smallest: int | None = None
    refusal: PlanError | None = None
    # What is quantized afterwards takes less: a share may fit that would not by itself.
    room = memory if second is None else other + round((memory - other) * 8.0 * value_bytes_of(task) / (task.bits or 1))
    for share in shares_that_may_fit(task, preset, memory=room, other=other):
        tried = Task(**{**vars(task), "share": share})
        try:
            plan = assemble(tried, draft_of(tried, preset, settings, second, engine=target.engine), target)
        except PlanError as error:
            refusal = error
            continue
        size = other + bytes_after(task, plan)
        if size <= memory:
            return plan
        smallest = size if smallest is None else min(smallest, size)
    if smallest is None and refusal is not None:
        raise PlanError(f"no plan of preset {preset.name!r} fits into {memory:,} bytes: {refusal}")
    raise PlanError(
        f"no plan of preset {preset.name!r} fits into {memory:,} bytes: it reaches {smallest or 0:,} at best"
    )


def require_usable(run: store.Run, preset: presets.Preset, allow_invalid: bool) -> None:
    """Refuse a run that a preset cannot plan from.

    Raises:
        PlanError: it is live, lacks a level, or its checks failed.
    """
    if run.live:
        raise PlanError(f"run {run.name!r} is still being collected: plan when it is finished")
    missing = preset.lacking(run.info.levels)
    if missing:
        raise PlanError(
            f"run {run.name!r} was recorded at level {run.info.levels}, and preset {preset.name!r} needs"
            f" {', '.join(missing)}: collect it with --level {preset.wanted}"
        )
    if run.badge.status == "invalid" and not allow_invalid:
        raise PlanError(
            f"the checks of run {run.name!r} failed ({run.badge.reason}): collect it again, or allow an invalid run"
        )


def _settings(preset: presets.Preset, parameters: Mapping[str, Any], engine: str | None) -> dict[str, Any]:
    """The preset's defaults with what was asked for in their place, and what the engine needs where nothing was."""
    signature = inspect.signature(preset.function).parameters.values()
    known = [one.name for one in list(signature)[1:] if one.kind is not inspect.Parameter.VAR_KEYWORD]
    open_end = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in signature)
    unknown = sorted(set(parameters) - set(known))
    if unknown and not open_end:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known) or 'none'}"
        raise PlanError(f"preset {preset.name!r} has no parameter {unknown[0]!r}: {hint}")
    grids = engines.grids(engine, [*known, *_GRID], parameters) if preset.step == "quantize" else {}
    return {**preset.defaults, **grids, **parameters}


def _share(share: float | None, memory: int | None) -> float:
    if (share is None) == (memory is None):
        raise PlanError("a plan takes a share to remove or a memory budget: give one of the two")
    if memory is not None:
        if memory < 1:
            raise PlanError(f"memory {memory} is no number of bytes: give at least 1")
        return 0.5
    assert share is not None
    if not 0 < share < 1:
        raise PlanError(f"share {share:g} is outside (0, 1): give the part that is to be removed, such as 0.25")
    return float(share)


def _bits(bits: float | None) -> float | None:
    if bits is not None and not 0 < bits < 64:
        raise PlanError(f"{bits:g} bits per weight cannot be: give effective bits, such as 3.0")
    return bits


def _factors(source: Source, factors: Sequence[float] | None) -> tuple[float, ...] | None:
    if factors is None:
        return None
    if len(factors) != len(source.layers) or min(factors) <= 0:
        raise PlanError(f"factors are {len(source.layers)} numbers above 0, one per MoE layer, not {list(factors)}")
    return tuple(float(value) for value in factors)


def _only_bits(preset: presets.Preset, share: float | None, memory: int | None, bits: float | None) -> None:
    if share is not None:
        raise PlanError(
            f"preset {preset.name!r} removes nothing: give bits (effective, such as 3.0) or a memory budget"
        )
    neither = bits is None and memory is None
    if (bits is None) == (memory is None) and not (neither and preset.takes_no_budget):
        raise PlanError(f"preset {preset.name!r} takes effective bits or a memory budget: give one of the two")


def _quantizer(
    run: store.Run, first: presets.Preset, name: str | None, bits: float | None, both: bool, allow_invalid: bool
) -> presets.Preset | None:
    """The preset that follows one that cuts, where bits are wanted."""
    if first.step == "quantize":
        if name is not None:
            raise PlanError(f"preset {first.name!r} finds widths itself: leave the quantizer out")
        return None
    if bits is None and not (both and name is not None):
        if name is not None:
            raise PlanError(f"to how many bits? quantizer {name!r} takes effective bits, such as 3.0")
        return None
    second = presets.find(name or presets.DEFAULT_QUANTIZER)
    if second.step != "quantize":
        raise PlanError(f"preset {second.name!r} does not quantize, so it cannot follow another")
    require_usable(run, second, allow_invalid)
    return second


def domains_of(run: store.Run, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """Whose text counts, sorted.

    Raises:
        PlanError: none, or one that the run does not have.
    """
    known = Statistics(run, level="routing").domains
    if wanted is None:
        return tuple(known)
    names = sorted({wanted} if isinstance(wanted, str) else set(wanted))
    if not names:
        raise PlanError(f"no domain is left: name some of {', '.join(known)}, or leave domains out")
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"
            raise PlanError(f"run {run.name!r} has no domain {name!r}: {hint}")
    return tuple(names)


def _form(
    preset: presets.Preset, form: str | None, engine: str | None, source: Source, settings: Mapping[str, Any]
) -> str:
    loads = [one for one in preset.forms if engines.loads(engine, one)]
    loads = [one for one in loads if one != "padded" or not source.unpadded]
    if settings.get("allocation") == "budgeted" and form is None:
        loads = [one for one in loads if one != "uniform"]
    if form is None and loads:
        return loads[0]
    if form in loads:
        return form
    if form is not None and form not in preset.forms:
        raise PlanError(f"preset {preset.name!r} has no form {form!r}: it has {', '.join(preset.forms)}")
    if form == "padded":
        raise PlanError(f"{source.unpadded}: use form per_layer with engine transformers")
    instead = f", or form {loads[0]}" if form is not None and loads else ""
    what = {"shared": "merges in which the router keeps its rows", "packed": "packed widths"}.get(
        form or "", "layers that differ"
    )
    raise PlanError(f"{what} are loaded by compressor.load only: use engine transformers{instead}")


def _evidence(draft: Draft, guard: Guard, names: str) -> Evidence:
    return Evidence(
        score=draft.score,
        unit=draft.unit,
        source="; ".join(presets.find(name).source for name in names.split("+")),
        layers=tuple(
            LayerValues(
                layer=layer, step=step, values=tuple(None if value != value else value for value in values.tolist())
            )
            for (layer, step), values in sorted(draft.values.items())
        ),
        protected=guard.protected,
        guard=guard.active,
        notes=(*draft.notes, *guard.notes),
    )
