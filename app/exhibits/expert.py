"""Exhibits of the page Expert: one expert among its layer's, its domains, importance, width, and cache behaviour."""

from __future__ import annotations

from typing import Any

import store
from app.exhibits.absent import needs_level, not_yet, require
from app.exhibits.exhibit import Absent, Entry, Exhibit, Frames, fresh
from app.figures import expert as figures
from app.figures import expert_cache as cache_figures
from app.figures import expert_errors as error_figures
from app.figures.style import Theme, safe
from app.frames import expert as frames_of_expert
from app.frames import expert_cache, expert_errors
from app.frames.axes import layer_labels
from app.frames.consistency import srp_experts
from app.frames.expert_trace import layer_info


def experts_of_layer(
    run: store.Run, *, frames: Frames = fresh, theme: Theme = "light", layer: str | None = None, expert: int = 0
) -> Exhibit:
    """Load of all experts of one layer, one of them marked."""
    where = place(run, layer, expert)
    frame = frames(frames_of_expert.of_layer, run, label=where["label"])
    title = f"Experts of layer {safe(where['label'])}, by their load"
    return Exhibit(
        figure=figures.layer_strip(frame, title=title, layer=where["label"], expert=expert, theme=theme),
        frame=frame,
        read="One bar per expert; click one to see it. Dotted: what a balanced router gives every expert.",
        rests_on=f"{frame['tokens'].sum():,} selections.",
        alt=f"Bars: load of every expert of layer {where['label']}",
    )


def domains(
    run: store.Run, *, frames: Frames = fresh, theme: Theme = "light", layer: str | None = None, expert: int = 0
) -> Exhibit:
    """Share of each domain's tokens that use an expert."""
    where = place(run, layer, expert)
    frame = frames(frames_of_expert.domain_load, run, **where)
    total, sequences = int(frame["tokens"].sum()), frame["sequences"].drop_nulls().sum()
    whiskers = " Whiskers: 95 % intervals over sequences." if frame["low"].drop_nulls().len() else ""
    return Exhibit(
        figure=figures.domain_shares(frame, title=f"Share of each domain's tokens, {_name(where)}", theme=theme),
        frame=frame,
        read="Bars beyond the dashed line: text that this expert takes more of than of other text. Dotted: what an "
        f"even router would send it.{whiskers}",
        rests_on=f"{total:,} tokens" + (f", {sequences:,} sequences." if sequences else "."),
        alt="Bars: share of the tokens of each domain that use the expert",
    )


def importance(
    run: store.Run, *, frames: Frames = fresh, theme: Theme = "light", layer: str | None = None, expert: int = 0
) -> Exhibit:
    """Place of an expert in its layer by every score of importance."""
    where = place(run, layer, expert)
    frame = frames_of_expert.of_expert(frames(frames_of_expert.importance, run), **where)
    if frame.is_empty():
        raise Absent("This run gives no score of importance.")
    return Exhibit(
        figure=figures.importance_ranks(
            frame, title=f"Place in the layer by every score of importance, {_name(where)}", theme=theme
        ),
        frame=frame,
        read="Left: by this score the layer can spare it least. Scores that disagree measure different things: an "
        "expert may be used rarely and put out much. Dotted: the middle of the layer.",
        rests_on="Ranks of whole experts; docs/importance.md says what each score is.",
        alt="Dots: rank of the expert in its layer by every score of importance",
    )


def widths(
    run: store.Run, *, frames: Frames = fresh, theme: Theme = "light", layer: str | None = None, expert: int = 0
) -> Exhibit:
    """What narrower weights do to an expert's output."""
    where = place(run, layer, expert)
    frame = frames(expert_errors.errors, run, **where)
    if frame.is_empty():
        if run.table("expert_error", layer=layer_info(run, where["label"]).layer).is_empty():
            raise needs_level("What narrower weights do to each expert", "errors", run)
        raise Absent("No sampled token used this expert: nobody knows what narrower weights do to it.")
    return Exhibit(
        figure=error_figures.errors_by_width(
            frame, title=f"Change of its output by width, {_name(where)}", theme=theme
        ),
        frame=frame,
        read="Below the dashed line it bears narrow weights better than the median expert of its layer. A projection "
        "whose line lies high is the one to keep wide.",
        rests_on=f"{int(frame['tokens'][0]):,} sampled tokens that used the expert; groups, scales and zero points as "
        "plans have them.",
        alt="Lines: relative change of the expert's output at 1, ternary, 2, 3, 4 and 8 bits",
    )


def consistency(
    run: store.Run, *, frames: Frames = fresh, theme: Theme = "light", layer: str | None = None, expert: int = 0
) -> Exhibit:
    """SRP of an expert by segment length."""
    where = place(run, layer, expert)
    require("SRP of an expert", run, "trace", "order")
    frame = expert_cache.consistency(frames(srp_experts, run), **where)
    if frame.is_empty():
        raise not_yet("SRP of an expert", run)
    return Exhibit(
        figure=cache_figures.consistency_curve(frame, title=f"Local consistency (SRP), {_name(where)}", theme=theme),
        frame=frame,
        read="How well one choice per segment, kept or not, foretells whether its tokens use the expert. Above the "
        "dotted line its uses cluster: a cache can tell when to hold it.",
        rests_on=f"Used by {frame['frequency'][0]:.1%} of the tokens." if frame["frequency"][0] is not None else "",
        alt="Curves: SRP of the expert by segment length, beside its layer and always keeping it",
    )


def reuse(
    run: store.Run, *, frames: Frames = fresh, theme: Theme = "light", layer: str | None = None, expert: int = 0
) -> Exhibit:
    """How soon an expert is used again."""
    where = place(run, layer, expert)
    _needs_trace("When an expert is used again", run)
    frame = frames(expert_cache.reuse, run, **where)
    return Exhibit(
        figure=cache_figures.reuse_curve(frame, title=f"How soon it is used again, {_name(where)}", theme=theme),
        frame=frame,
        read="Above the dashed line its uses come in bursts beyond what the sequence's topic explains; above the "
        "dotted one, beyond its popularity. A cache profits from both.",
        rests_on=f"{frame['uses'][0]:,} uses with tokens behind them." if len(frame) else "",
        alt="Curves: share of the expert's uses that are followed by another within so many tokens, and by chance",
    )


def hit_rate(
    run: store.Run, *, frames: Frames = fresh, theme: Theme = "light", layer: str | None = None, expert: int = 0
) -> Exhibit:
    """How often an LRU cache of its layer holds an expert."""
    where = place(run, layer, expert)
    _needs_trace("How often a cache holds an expert", run)
    found = layer_info(run, where["label"])
    depths = frames(expert_cache.depths, run, label=where["label"])
    frame = expert_cache.hit_rates(depths, expert=expert, experts=found.num_experts)
    return Exhibit(
        figure=cache_figures.hit_rate_curve(
            frame, title=f"Hits in an LRU cache of layer {safe(where['label'])}, expert {expert}", top_k=found.top_k,
            theme=theme,
        ),
        frame=frame,
        read="Above the dashed line a cache holds it more often than the layer's other experts: it is used often or in "
        "bursts. Every sequence starts with an empty cache, so a first use finds nothing.",
        rests_on=f"{frame['uses'][0]:,} uses of {depths['requests'].sum():,} in the layer." if len(frame) else "",
        alt="Curves: hit rate of the expert and of its layer by the slots of an LRU cache",
    )  # fmt: skip


def place(run: store.Run, layer: str | None, expert: int) -> dict[str, Any]:
    """Label and expert for frames; None = the first layer.

    Raises:
        InputError: there is no such MoE layer, or it has no such expert.
        Absent: the run has no layer yet.
    """
    labels = layer_labels(run)
    if not labels:
        raise Absent("No layer of this run has been recorded.")
    label = layer if layer is not None else labels[0]
    layer_info(run, label, expert)
    return {"label": label, "expert": expert}


def _needs_trace(what: str, run: store.Run) -> None:
    require(what, run, "trace", "order")
    if not run.has_trace:
        raise Absent(f"{what} needs the trace; this run holds counts only.")


def _name(where: dict[str, Any]) -> str:
    return f"layer {safe(where['label'])}, expert {where['expert']}"


EXHIBITS = (
    Entry("experts-of-layer", experts_of_layer, "Experts of a layer by load", page="expert", report=False),
    Entry("expert-domains", domains, "An expert's domains", page="expert", report=False),
    Entry("expert-importance", importance, "An expert's rank by every score", page="expert", report=False),
    Entry("expert-widths", widths, "An expert in fewer bits", page="expert", report=False),
    Entry("expert-consistency", consistency, "An expert's local consistency", page="expert", report=False),
    Entry("expert-reuse", reuse, "How soon an expert is used again", page="expert", report=False),
    Entry("expert-hit-rate", hit_rate, "An expert's hit rate in a cache", page="expert", report=False),
)
