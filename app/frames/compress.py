"""What a plan does, unit by unit and layer by layer, and what it rests on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import polars as pl

from app.frames.axes import layer_label
from app.text import size
from compressor.plan import (
    BITS,
    PARTS,
    DropStep,
    Evidence,
    ExpertBits,
    LayerKey,
    MergeStep,
    NewExpert,
    Plan,
    Prediction,
    QuantizeStep,
    bits_after,
    differences,
    experts_after,
    kept_layers,
)
from compressor.plan.result import neurons_after
from planner.estimate.storage import stored_parts

FATES = ("kept", "dropped", "merged", "silenced")
"""What becomes of a routed expert; ``merged``: goes into another; ``silenced``: its whole block puts out
nothing any more."""

_UNITS = {
    "layer": pl.Int32,
    "step": pl.Int32,
    "label": pl.String,
    "expert": pl.Int32,
    "fate": pl.String,
    "into": pl.Int32,
    "part": pl.Float64,
    "members": pl.Int32,
    "score": pl.Float64,
    "place": pl.Int32,
    "experts": pl.Int32,
    "protected": pl.Boolean,
    "neurons_kept": pl.Float64,
    "why": pl.String,
}
_LAYERS = {
    "label": pl.String,
    "experts": pl.Int32,
    "kept": pl.Int32,
    "dropped": pl.Int32,
    "merged": pl.Int32,
    "protected": pl.Int32,
    "neurons_kept": pl.Float64,
    "highest_cut": pl.Float64,
    "lowest_kept": pl.Float64,
}
_FIGURES = {"figure": pl.String, "before": pl.String, "after": pl.String, "change": pl.String}


def units(plan: Plan) -> pl.DataFrame:
    """One row per routed expert of the source, in the order of the model.

    Columns: layer, step, label, expert; fate: one of :data:`FATES`; into: the expert in whose place it stands, itself
    where it stays, null where it goes; part: its part of the merged expert; members: experts that the merged one is
    made of; score, null where the plan holds none; place: of the score in its layer, 1 = the most important; experts of
    the layer; protected; neurons_kept: share 0..1, null where the expert goes; why, in words.
    """
    after, stays, masks, bits = experts_after(plan), set(kept_layers(plan)), neurons_after(plan), bits_after(plan)
    silenced = {layer for step in plan.steps if isinstance(step, DropStep) for layer in step.blocks}
    (scores, whole), reasons, given_up = _scores(plan), _protected(plan), _given_up(plan)
    rows: list[dict[str, Any]] = []
    for shape in plan.source.layers:
        key = shape.key
        homes = {member: expert for expert in after.get(key, []) for member in expert.members}
        values = scores.get(key, {})
        places = {} if key in whole else _places(values)
        for expert in range(shape.num_experts):
            home, mask = homes.get(expert), masks.get((*key, expert, "routed"))
            row: dict[str, Any] = {"layer": key[0], "step": key[1], "label": layer_label(*key), "expert": expert}
            row |= _fate(expert, home, key[0] in stays, key[0] in silenced)
            row |= {"score": values.get(expert), "place": places.get(expert), "experts": shape.num_experts}
            row["protected"] = (*key, expert) in reasons
            stands = row["fate"] == "kept"
            row["neurons_kept"] = None if not stands else 1.0 if mask is None else float(mask.mean())
            row["why"] = _why(row, home, reasons.get((*key, expert), ""), key[0] in stays)
            if stands and (*key, expert, "routed") in bits:
                row["why"] = f"{_bits(bits[*key, expert, 'routed'])} bits; {row['why']}".rstrip("; ")
            if (*key, expert) in given_up:
                row["why"] = f"its neurons go to experts that stay; {row['why']}".rstrip("; ")
            rows.append(row)
    return pl.DataFrame(rows, schema=_UNITS)


def widths(plan: Plan) -> pl.DataFrame:
    """One row per MoE layer of a plan that quantizes; none of others.

    Columns: label; experts: how many have which bits, by projection where these differ; shared: bits of shared experts,
    left out where there are none; bits: effective ones of a weight, scales and zero points counted (16 if it stays as
    it is), also in form dense, which saves nothing.
    """
    found = bits_after(plan)
    steps = [one.model_copy(update={"form": "packed"}) if isinstance(one, QuantizeStep) else one for one in plan.steps]
    packed = plan.model_copy(update={"steps": tuple(steps)})
    sums: dict[LayerKey, list[float]] = {}
    for part in stored_parts(packed, source_bits=16.0) if found else ():
        mine = sums.setdefault((part.unit[0], part.unit[1]), [0.0, 0.0])
        mine[0], mine[1] = mine[0] + part.weights, mine[1] + part.weights * part.bits
    rows = []
    for key, experts in experts_after(plan).items() if found else ():
        own = Counter(_bits(found.get((*key, one.lead, "routed"))) for one in experts)
        listed = ", ".join(f"{count} x {text}" for text, count in sorted(own.items(), key=lambda item: _order(item[0])))
        shared = _bits(found.get((*key, 0, "shared"))) if plan.source.by_key[key].shared_width else None
        rows.append((layer_label(*key), listed, shared, sums[key][1] / sums[key][0]))
    schema = {"label": pl.String, "experts": pl.String, "shared": pl.String, "bits": pl.Float64}
    frame = pl.DataFrame(rows, schema=schema, orient="row")
    return frame if frame["shared"].null_count() < len(frame) else frame.drop("shared")


def kept(plan: Plan) -> int:
    """Routed experts that still put something out."""
    silenced = {layer for step in plan.steps if isinstance(step, DropStep) for layer in step.blocks}
    return sum(len(experts) for (layer, _), experts in experts_after(plan).items() if layer not in silenced)


def layers(found: pl.DataFrame) -> pl.DataFrame:
    """One row per MoE layer, from :func:`units`: label, experts, kept, dropped (silenced ones too), merged into others,
    protected, neurons_kept: share over the experts that stay; highest_cut and lowest_kept: scores at the cut's edge.
    """
    gone = pl.col("fate") != "kept"
    frame = found.group_by("layer", "step", maintain_order=True).agg(
        pl.col("label").first(),
        pl.len().alias("experts"),
        (~gone).sum().alias("kept"),
        pl.col("fate").is_in(["dropped", "silenced"]).sum().alias("dropped"),
        (pl.col("fate") == "merged").sum().alias("merged"),
        pl.col("protected").sum(),
        pl.col("neurons_kept").mean(),
        pl.col("score").filter(gone).max().alias("highest_cut"),
        pl.col("score").filter(~gone & ~pl.col("protected")).min().alias("lowest_kept"),
    )  # fmt: skip
    return frame.select(pl.col(name).cast(kind) for name, kind in _LAYERS.items())


def reasons(found: pl.DataFrame) -> pl.DataFrame:
    """What happens to each layer, and why, from :func:`units`: label, what, experts, why.

    A row per layer and what happens in it.

    Experts are a list of numbers and ranges; of merged ones, ``3>1`` means that 3 becomes a part of 1.
    """
    rows = []
    for part in found.partition_by("layer", "step", maintain_order=True):
        label, stays = part["label"][0], part.filter(pl.col("fate") == "kept")
        for what in ("dropped", "silenced", "merged"):
            gone = part.filter(pl.col("fate") == what)
            if len(gone):
                rows.append((label, what, _listed(gone, what), _edge(gone, stays)))
        guarded = part.filter("protected")
        if len(guarded):
            why = "; ".join(text.removeprefix("protected: ") for text in guarded["why"].unique(maintain_order=True))
            rows.append((label, "protected", _ranges(guarded["expert"].to_list()), why))
        slimmed = stays.filter(pl.col("neurons_kept") < 1)
        if len(slimmed):
            shares = sorted(slimmed["neurons_kept"])
            why = f"keep {shares[0]:.1%} to {shares[-1]:.1%} of their neurons"
            rows.append((label, "slimmed", _ranges(slimmed["expert"].to_list()), why))
    schema = {"label": pl.String, "what": pl.String, "experts": pl.String, "why": pl.String}
    return pl.DataFrame(rows, schema=schema, orient="row")


def key_figures(plan: Plan) -> pl.DataFrame:
    """What a plan saves and what it is expected to cost: figure, before, after, change."""
    estimate = plan.estimate
    rows = [_counted("routed experts", sum(shape.num_experts for shape in plan.source.layers), kept(plan))]
    rows.append(_counted("expert parameters", estimate.expert_parameters, estimate.expert_parameters_after))
    rows.append(_counted("expert parameters per token", estimate.active_parameters, estimate.active_parameters_after))
    rows.append(("weights saved", "", size(estimate.bytes_saved), ""))
    layer_count = len(kept_layers(plan))
    if layer_count != plan.source.num_layers:
        rows.append(_counted("decoder layers", plan.source.num_layers, layer_count))
    if estimate.bits is not None:
        rows.append(("bits of an expert's weight, as stored", "", f"{estimate.bits:.4g}", ""))
    for name, error in (("alike", estimate.layer_error), ("weighed", estimate.weighed_error)):
        if error is not None:
            rows.append((f"predicted error, layers {name}", "0", f"{error:.4g}", ""))
    if estimate.prediction is not None:
        rows.append(_priced(estimate.prediction))
    if estimate.kept_mass is not None:
        rows.append(("score that stays", "100 %", f"{estimate.kept_mass:.1%}".replace("%", " %"), ""))
    return pl.DataFrame(rows, schema=_FIGURES, orient="row")


def rests_on(plan: Plan) -> list[str]:
    """Sentences: on which run and text a plan rests, and what its makers want the reader to know."""
    source = plan.provenance
    domains = ", ".join(source.domains) or "all of the run's"
    lines = [f"Run {source.run}: {source.tokens:,} tokens, domains {domains}; capture {source.badge or 'unknown'}."]
    for evidence in plan.evidence:
        unit = f" ({evidence.unit})" if evidence.unit else ""
        origin = f", {evidence.source}" if evidence.source else ""
        lines.append(f"Decided by {evidence.score}{unit}{origin}.")
        if not evidence.guard:
            lines.append("Super experts were not protected.")
        lines += evidence.notes
    return list(dict.fromkeys(lines))


def difference(first: Plan, second: Plan) -> pl.DataFrame:
    """Units that two plans treat differently: label, expert (null: the layer), role, first, second.

    Raises:
        PlanError: they are for models of different shape.
    """
    rows = [
        (layer_label(one.layer, one.step), one.expert if one.expert >= 0 else None, one.role, one.first, one.second)
        for one in differences(first, second)
    ]
    schema = {"label": pl.String, "expert": pl.Int32, "role": pl.String, "first": pl.String, "second": pl.String}
    return pl.DataFrame(rows, schema=schema, orient="row")


def title(plan: Plan) -> str:
    """A plan in a few words: preset, what was asked for, form."""
    target = plan.target
    asked = [f"{target.share:.0%}".replace("%", " %")] if target.share is not None else []
    asked += [size(target.memory)] if target.memory is not None else []
    asked += [f"{target.bits:g} bits"] if target.bits is not None else []
    return ", ".join([target.preset, *asked, *dict.fromkeys(step.form for step in plan.for_checkpoint)])


def evidence_of(plan: Plan) -> Evidence | None:
    """The evidence whose values the pages show: the first that has some."""
    return next((evidence for evidence in plan.evidence if evidence.layers), None)


def _scores(plan: Plan) -> tuple[dict[LayerKey, dict[int, float]], set[LayerKey]]:
    """(layer, step) -> expert -> score; and the layers whose one score is that of the layer as a whole."""
    evidence, shapes = evidence_of(plan), plan.source.by_key
    found: dict[LayerKey, dict[int, float]] = {}
    whole: set[LayerKey] = set()
    for layer in evidence.layers if evidence is not None else ():
        key, values = (layer.layer, layer.step), layer.values
        if len(values) == 1 and key in shapes and shapes[key].num_experts > 1:
            whole.add(key)
            values = values * shapes[key].num_experts
        found[key] = {expert: value for expert, value in enumerate(values) if value is not None}
    return found, whole


def _protected(plan: Plan) -> dict[tuple[int, int, int], str]:
    return {
        (unit.layer, unit.step, unit.expert): unit.reason
        for evidence in plan.evidence
        for unit in evidence.protected
        if unit.role == "routed"
    }


def _given_up(plan: Plan) -> set[tuple[int, int, int]]:
    """Experts in no group of a merge, whose neurons others take (method ``segments``)."""
    steps = [step for step in plan.steps if isinstance(step, MergeStep)]
    return {(at.layer, at.step, one.expert) for step in steps for at in step.layers for one in at.given_up}


def _places(values: Mapping[int, float]) -> dict[int, int]:
    ordered = sorted(values, key=lambda expert: (-values[expert], expert))
    return {expert: place for place, expert in enumerate(ordered, 1)}


def _fate(expert: int, home: NewExpert | None, layer_stays: bool, silenced: bool) -> dict[str, Any]:
    if not layer_stays or home is None:
        return {"fate": "dropped", "into": None, "part": None, "members": 0}
    part = home.weights[home.members.index(expert)]
    fate = "silenced" if silenced else "kept" if home.lead == expert else "merged"
    return {"fate": fate, "into": home.lead, "part": part, "members": len(home.members)}


def _why(row: Mapping[str, Any], home: NewExpert | None, reason: str, layer_stays: bool) -> str:
    if not layer_stays:
        return "the whole decoder layer goes"
    if reason:
        return f"protected: {reason}"
    place = f"place {row['place']} of {row['experts']} by score" if row["place"] is not None else ""
    words = {"silenced": "its MoE block puts out nothing any more"}.get(row["fate"], "")
    if row["fate"] == "merged":
        words = f"becomes {row['part']:.0%} of expert {row['into']}"
    elif row["fate"] == "kept" and home is not None and home.merged:
        others = [str(member) for member in home.members if member != row["expert"]]
        words = f"takes in {', '.join(others[:8])}" + (f" and {len(others) - 8} more" if len(others) > 8 else "")
    elif row["neurons_kept"] is not None and row["neurons_kept"] < 1:
        words = f"keeps {row['neurons_kept']:.0%} of its neurons"
    return "; ".join(part for part in (words, place) if part)


def _bits(entry: tuple[ExpertBits, QuantizeStep] | None) -> str:
    """``4``, ``gate 4 up 4 down 3``, or ``full``."""
    own = {} if entry is None else {part: entry[0].of(part) for part in PARTS if entry[0].of(part) is not None}
    if len(set(own.values())) < 2:
        return str(next(iter(own.values()), "full"))
    return " ".join(f"{part} {bits}" for part, bits in own.items())


def _order(text: str) -> tuple[int, str]:
    names = [str(one) for one in BITS]
    return (names.index(text) if text in names else len(names), text)


def _listed(gone: pl.DataFrame, what: str) -> str:
    if what != "merged":
        return _ranges(gone["expert"].to_list())
    return " ".join(f"{expert}>{into}" for expert, into in gone.select("expert", "into").iter_rows())


def _ranges(numbers: list[int]) -> str:
    """``0-3 7 9-12``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return " ".join(f"{first}-{last}" if last > first else str(first) for first, last in parts)


def _edge(gone: pl.DataFrame, stays: pl.DataFrame) -> str:
    """Scores of what goes, beside those of what stays."""
    scores = sorted(gone["score"].drop_nulls())
    if not scores:
        return gone["why"][0] if gone["why"].n_unique() == 1 else ""
    free = sorted(stays.filter(~pl.col("protected"))["score"].drop_nulls())
    beside = f"; what stays scores {free[0]:.4g} and more" if free else ""
    return f"scores {scores[0]:.4g} to {scores[-1]:.4g}{beside}"


def _priced(price: Prediction) -> tuple[str, str, str, str]:
    name = f"predicted KL, nats per token ({price.coverage:.0%} interval)".replace("%", " %")
    basis = "from the run's sums" if price.basis == "sums" else f"from {price.plans} measured plans"
    return name, "0", f"{price.kl:.3g} ({price.low:.3g} to {price.high:.3g})", basis


def _counted(name: str, before: int, after: int) -> tuple[str, str, str, str]:
    change = f"{(after - before) / before:+.1%}".replace("%", " %") if before else ""
    return name, f"{before:,}", f"{after:,}", change
