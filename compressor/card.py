"""The model card of a result: what was done to which model, layer by layer, and what nobody has measured."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from compressor.checkpoint.companions import CARD
from compressor.plan import (
    BITS,
    PARTS,
    DropStep,
    LayerShape,
    MergeStep,
    NewExpert,
    Plan,
    QuantizeStep,
    Role,
    RouteStep,
    experts_after,
    kept_layers,
    widths_after,
)
from compressor.plan.result import neurons_after

_CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")


def model_card(
    plan: Plan, source: Path, *, name: str, loads_with: str, notes: tuple[str, ...], sizes: tuple[int, int]
) -> str:
    """README.md of a result.

    Args:
        plan: what was done.
        source: folder of the source, whose card says the licence.
        name: of the result.
        loads_with: ``transformers`` or ``compressor.load``.
        notes: sentences of the job.
        sizes: bytes of all weights before and after.
    """
    parts = [
        _front_matter(plan, source),
        f"# {name}\n",
        f"This is {_model(plan, source)} with {_what(plan)}.",
        f"Its weights take {_gib(sizes[1])} instead of {_gib(sizes[0])}. `moescope_plan.json` holds the plan that was"
        " applied, with the score of every expert.\n",
        _steps(plan),
        _layers(plan),
        _unmeasured(plan, notes),
        _loading(loads_with, plan),
    ]
    return "\n".join(part for part in parts if part)


def hub_id(source: Path) -> str | None:
    """The hub's name of a model whose folder is in the hub's cache; None for any other folder.

    A plan's own name for its model may be a folder's: ``a/b`` is both.
    """
    found = [re.fullmatch(r"models--([\w.-]+?)--([\w.-]+)", part) for part in source.parts]
    return next((f"{match[1]}/{match[2]}" for match in reversed(found) if match), None)


def _model(plan: Plan, source: Path) -> str:
    known = hub_id(source)
    return plan.source.model if known is None else f"[{known}](https://huggingface.co/{known})"


def _what(plan: Plan) -> str:
    """What is different about its experts."""
    steps = {step.step for step in plan.steps}
    kinds = ["fewer or smaller experts"] if steps & {"drop", "merge", "slim"} else []
    kinds += ["experts rebuilt from factors"] if "factor" in steps else []
    kinds += ["experts of few bits"] if "quantize" in steps else []
    kinds += ["another choice of experts than its routers'"] if "route" in steps else []
    return " and ".join(kinds)


def _front_matter(plan: Plan, source: Path) -> str:
    lines = _carried(source / CARD)
    if (known := hub_id(source)) is not None:
        lines.append(f"base_model: {known}")
    kinds = sorted({step.step for step in plan.for_checkpoint})
    lines += ["library_name: transformers", "tags:", "- mixture-of-experts", *(f"- expert-{kind}" for kind in kinds)]
    return "\n".join(["---", *lines, "---\n"])


def _carried(card: Path) -> list[str]:
    """Licence and language lines of the source's front matter, with the lines of their lists."""
    try:
        text = card.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    found = re.match(r"\ufeff?---\r?\n(.*?)\r?\n---\s*(\r?\n|$)", text, re.DOTALL)
    lines, inside = [], False
    for line in found[1].splitlines() if found else []:
        if not line.startswith((" ", "-", "\t")):
            inside = line.partition(":")[0].strip() in _CARRIED
        if inside and line.strip():
            lines.append(line.rstrip())
    return lines


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.2f} MiB"


def _steps(plan: Plan) -> str:
    run = plan.provenance
    text = ["## What was done\n"]
    for step in plan.for_checkpoint:
        method = step.grouping if isinstance(step, MergeStep) else step.method
        how = f", merged by `{step.method}`" if isinstance(step, MergeStep) else ""
        text.append(f"- **{step.step}** by `{method}`{how}; stored in form `{step.form}`.")
        if isinstance(step, QuantizeStep):
            text.append(f"  {_grids(step)}")
        if isinstance(step, DropStep) and step.decoder_layers:
            text.append(f"  Decoder layers removed: {', '.join(map(str, step.decoder_layers))}.")
        if isinstance(step, DropStep) and step.blocks:
            text.append(f"  MoE blocks that put out nothing any more: {', '.join(map(str, step.blocks))}.")
    if plan.route is not None:
        text.append(_route(plan.route))
    domains = f", domains {', '.join(run.domains)}" if run.domains else ""
    text.append(f"\nDecided on run `{run.run}` ({run.tokens:,} tokens{domains}) with moescope {run.tool_version}.")
    for evidence in plan.evidence:
        unit = f" ({evidence.unit})" if evidence.unit else ""
        source = f", {evidence.source}" if evidence.source else ""
        text.append(f"Score: `{evidence.score}`{unit}{source}.")
        if evidence.protected:
            units = ", ".join(f"layer {unit.layer} expert {unit.expert}" for unit in evidence.protected)
            text.append(f"Protected: {units}.")
        elif not evidence.guard:
            text.append("Super experts were not protected.")
    return "\n".join(text) + "\n"


def _route(step: RouteStep) -> str:
    """What decides instead of the routers, and where."""
    values = sorted({one.value for one in step.layers if one.value is not None})
    span = "" if not values else f" {values[0]:g}" if len(values) == 1 else f" {values[0]:g} to {values[-1]:g}"
    weights = "" if step.rule == "bias" else f"; gate weights {step.weights}"
    layers = ", ".join(f"{one.layer}, step {one.step}" if one.step else str(one.layer) for one in step.layers)
    return f"- **route** by `{step.method}`: rule `{step.rule}`{span}{weights}; no weights change. Layers: {layers}."


def _grids(step: QuantizeStep) -> str:
    """How many matrices have which width, and what the widths mean."""
    found = Counter(
        expert.of(part) for layer in step.layers for expert in layer.experts for part in PARTS if expert.of(part)
    )
    widths = ", ".join(f"{bits} bits: {found[bits]:,}" for bits in BITS if bits in found)
    groups = f"groups of {step.group_size} inputs" if step.group_size else "a row"
    zeros = "without zero points" if step.symmetric else "with zero points"
    return f"Matrices by width: {widths or 'none'}; one scale for {groups}, {zeros}."


def _layers(plan: Plan) -> str:
    """One row per MoE layer."""
    after, widths, masks = experts_after(plan), widths_after(plan), neurons_after(plan)
    places = {old: new for new, old in enumerate(kept_layers(plan))}
    rows = ["| layer | now | experts | merged from several | neurons per expert |", "|---|---|---|---|---|"]
    for shape in plan.source.layers:
        if shape.key not in after:
            rows.append(f"| {shape.layer} | removed | {shape.num_experts} → 0 | | |")
            continue
        experts = after[shape.key]
        merged = sum(expert.merged for expert in experts)
        rows.append(
            f"| {shape.layer} | {places[shape.layer]} | {_change(shape.num_experts, len(experts))} | {merged or ''} |"
            f" {_neurons(shape, experts, widths[shape.key], masks)} |"
        )
    return "\n".join(rows) + "\n"


def _neurons(
    shape: LayerShape,
    experts: list[NewExpert],
    width: int,
    masks: Mapping[tuple[int, int, int, Role], NDArray[np.bool_]],
) -> str:
    leads = {expert.lead for expert in experts}
    kept = [
        int(mask.sum())
        for (layer, step, expert, role), mask in masks.items()
        if (layer, step) == shape.key and role == "routed" and expert in leads
    ]
    text = _change(shape.width, width)
    return f"{text} (kept {min(kept)} to {max(kept)})" if kept and (min(kept), max(kept)) != (width, width) else text


def _change(before: int, after: int) -> str:
    return str(before) if before == after else f"{before} → {after}"


def _unmeasured(plan: Plan, notes: tuple[str, ...]) -> str:
    text = [
        "## What was not measured\n",
        "Nothing was measured on the result when this page was written. The plan was made from statistics of"
        " calibration text; what it does to other text, other languages or tasks is not known. Measure it on your own"
        " text (`moescope evaluate`) before you use it.\n",
    ]
    remarks = [*notes, *(note for evidence in plan.evidence for note in evidence.notes)]
    if remarks:
        text += ["## Remarks\n", *(f"- {remark}" for remark in remarks), ""]
    return "\n".join(text)


def _loading(loads_with: str, plan: Plan) -> str:
    forms = {step.form for step in plan.for_checkpoint}
    if loads_with == "transformers":
        lines = "from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained(FOLDER)"
        return f"## How to load it\n\nLike the model that it comes from.\n\n```python\n{lines}\n```\n"
    why = ""
    if "packed" in forms:
        why = (
            "Its experts are packed by compressed-tensors (`pack-quantized`) and have widths of their own. `AutoModel`"
            " of transformers takes one width for all experts, and loads other weights without a word."
        )
    elif "shared" in forms:
        why = (
            "Its routers have more rows than there are experts: members of a merged group are chosen as before, and run"
            " the one expert that they became (`moescope_expert_map` in config.json). Stock classes do not load that."
        )
    elif plan.route is None or "per_layer" in forms:
        why = "Its layers differ, which stock classes do not load (`per_layer_config`)."
    if plan.route is not None:
        why += (
            " Its tokens use other experts than their routers choose (`moescope_route` in config.json), which"
            " `compressor.load` sees to. `AutoModel` of transformers and other engines ignore that field and run the"
            " routers' own choice without a word."
        )
    lines = "import compressor\n\nmodel = compressor.load(FOLDER)"
    return f"## How to load it\n\n{why.strip()}\n\n```python\n{lines}\n```\n"
