"""Published methods by the taxonomy of the survey of inference optimisation for MoE models (arXiv 2412.14219), and what
each is here. The names of its classes were not compared with the text of the paper.

What a registry holds (presets, cache policies, ways to foresee and to place) is read from it, so that a new one appears
by itself. The rest stands in :data:`METHODS`, with what is not built marked as such.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

Level = Literal["model", "system", "hardware", "analysis"]
Here = Literal["profile", "metric", "plan", "operation", "simulation", "architecture", "not here"]

_PRUNING, _QUANTIZATION, _DECOMPOSITION = (
    "compression: pruning",
    "compression: quantization",
    "compression: decomposition",
)
_EXPERTS, _GATING, _MERGING = "architecture: experts", "algorithm: dynamic gating", "algorithm: expert merging"
_STRATEGY, _BALANCE = "expert parallelism: strategy", "expert parallelism: load balancing"
_ALL_TO_ALL, _TASKS = "expert parallelism: all-to-all", "expert parallelism: task scheduling"
_CACHING, _PREFETCHING, _CPU = "offloading: caching", "offloading: prefetching", "offloading: CPU assistance"

CLASSES: tuple[tuple[Level, str], ...] = (
    ("model", "architecture: attention"),
    ("model", _EXPERTS),
    ("model", _PRUNING),
    ("model", _QUANTIZATION),
    ("model", _DECOMPOSITION),
    ("model", "compression: distillation"),
    ("model", _GATING),
    ("model", _MERGING),
    ("model", "algorithm: sparse to dense"),
    ("system", _STRATEGY),
    ("system", _BALANCE),
    ("system", _ALL_TO_ALL),
    ("system", _TASKS),
    ("system", _CACHING),
    ("system", _PREFETCHING),
    ("system", "offloading: loading"),
    ("system", _CPU),
    ("hardware", "accelerators"),
    ("analysis", "routing"),
    ("analysis", "importance"),
    ("analysis", "evaluation"),
)
"""The survey's classes in its order, empty ones too; ``analysis`` is ours, for what the survey has no class for."""


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        level: of the survey; ``analysis`` stands beside it.
        group: its class there.
        name: of the method.
        paper: where it was published; empty where that is not known here.
        here: what it is in moescope.
        where: ``KIND:NAME`` of what does it (see :func:`address`); empty for what is not here.
        needs: what a run must have: levels (``a|b`` = either), or words of ``app.frames.methods.HAVE``.
        remark: what of it is here, or why it is not.
    """

    level: Level
    group: str
    name: str
    paper: str
    here: Here
    where: str = ""
    needs: tuple[str, ...] = ()
    remark: str = ""


def address(where: str) -> str:
    """``KIND:NAME`` as what is opened or typed: a page, a command, or a file of docs."""
    kind, _, name = where.partition(":")
    return {
        "page": f"page {name}",
        "command": f"moescope {name}",
        "preset": f"moescope plan RUN --preset {name}",
        "policy": "moescope cache RUN --beside",
        "prefetch": "moescope cache RUN --beside",
        "place": f"moescope place RUN --method {name} --devices 8",
        "view": f"moescope show RUN {name}",
        "metric": f"docs/metrics.md, {name}",
        "score": f"docs/importance.md, {name}",
        "docs": f"docs/{name}",
        "": "",
    }[kind]


def _absent(level: Level, group: str, name: str, paper: str = "", remark: str = "") -> Method:
    return Method(level, group, name, paper, "not here", remark=remark or "not built")


METHODS: tuple[Method, ...] = (
    Method("model", _EXPERTS, "DeepSeekMoE: shared experts", "arXiv 2401.06066", "architecture", "page:architecture",
           ("shared experts",), "counted and valued apart; their output beside the routed one, by layer and domain"),
    Method("model", _EXPERTS, "MoE++: experts without computation", "arXiv 2410.07348", "architecture",
           "page:architecture", ("zero, copy or constant experts",), "kinds by layer, domain and token"),
    Method("model", _EXPERTS, "Chain-of-Experts", "arXiv 2506.18945", "architecture",
           "page:architecture",
           ("several calls per layer",), "each call is a step of its layer: maps, transitions, repeats and entropy"),
    Method("model", _EXPERTS, "Union of Experts: one choice per sequence", "arXiv 2503.02495", "architecture",
           "docs:adapters.md", ("choices per sequence",), "choices of whole sequences are recorded as such"),
    Method("model", _EXPERTS, "ReXMoE: experts of other layers", "", "architecture", "docs:adapters.md",
           ("experts of other layers",), "the layer that owns each expert is recorded"),
    Method("model", _EXPERTS, "ReXMoE: affinity of neighbouring layers", "", "metric", "page:architecture",
           ("lookahead|activations",), "a router on its neighbour's input; likeness of mean outputs"),
    Method("model", _EXPERTS, "RMoE: a router with a memory", "arXiv 2408.06793", "architecture", "docs:adapters.md",
           ("a recurrent router",), "watched through an adapter"),
    Method("model", _EXPERTS, "RMoE: what a router could remember", "arXiv 2408.06793", "metric", "page:architecture",
           ("trace",), "entropy of a choice given one and two layers before, beside shuffled choices"),
    Method("model", _EXPERTS, "Sigma-MoE-Tiny: f against P", "arXiv 2512.16248", "metric", "page:architecture",
           ("logits",), "load and router probability beside each other; its way to train is not here"),
    Method("model", _EXPERTS, "DiT-MoE: timestep, patch and class as axes", "arXiv 2407.11633", "metric",
           "page:architecture", ("trace",), "any label of a sequence is an axis; the patch is the position"),
    Method("model", _EXPERTS, "SMoE-Dropout: is the router random?", "arXiv 2303.01610", "metric", "page:architecture",
           ("activations",), "cosines and norms of router rows beside random ones"),
    _absent("model", _EXPERTS, "Compressed experts", "arXiv 2503.00634"),
    Method("model", _PRUNING, "PreMoe: experts for a task, retrieved", "arXiv 2505.17639", "plan",
           "command:plan RUN --nearest-to OTHER", ("logits",)),
    Method("model", _PRUNING, "Compressing into 3 MB: search for a plan", "arXiv 2208.07120", "plan",
           "command:recommend RUN --memory 12GiB --search 6", ("activations",),
           "genetic search over plans; no training after it"),
    Method("model", _PRUNING, "SlimMoE: one-shot slimming", "arXiv 2506.18349", "plan", "score:taylor", ("gradients",),
           "Taylor scores of neurons; the stages of distillation are not here"),
    Method("model", _PRUNING, "Depth and width probes of a multimodal model", "arXiv 2512.02351", "profile",
           "view:width",
           ("activations",), "per domain; image, video and audio tokens are domains of their own"),
    _absent("model", "compression: distillation", "SlimMoE: staged distillation", "arXiv 2506.18349"),
    _absent("model", "compression: distillation", "Merge, then compress: recovery by distillation", "arXiv 2310.01334"),
    _absent("model", "compression: distillation", "EControl: compressed gradients with error control"),
    Method("model", _GATING, "Top-p routing: harder tasks need more experts", "arXiv 2403.07652", "architecture",
           "docs:examples/top_p_router.py", ("a number of experts that varies",),
           "models with it are watched"),
    Method("model", _GATING, "Top-p routing put upon a model with fixed k", "arXiv 2403.07652", "operation",
           "command:sweep MODEL --rule top_p=0.3,0.4 --data PATH", ("the model",),
           "loss per domain, and experts per token against the token's loss"),
    Method("model", _GATING, "DeepSeekMoE: test of redundancy", "arXiv 2401.06066", "operation",
           "command:sweep MODEL --redundancy --data PATH", ("the model",),
           "the best experts of each token masked, and the shared ones"),
    Method("model", _GATING, "AdaMoE: null experts", "arXiv 2406.13233", "architecture", "docs:adapters.md",
           ("zero, copy or constant experts",), "models with them are watched; biasing their router is not here"),
    Method("model", _GATING, "MC-MoE: online pruning of experts (ODP)", "arXiv 2410.06270", "operation",
           "command:sweep MODEL --rule ratio=odp --data PATH", ("the model",),
           "its ratio rule with medians of other text; protected tokens and the choice of layers are not here"),
    _absent("model", _GATING, "MC#: trained token masks (OTP)", "arXiv 2510.10962"),
    Method("model", _GATING, "Sparse MoE as the new dropout: sweep of k", "arXiv 2303.01610", "operation",
           "command:sweep MODEL --rule top_k=1,2,3,4 --data PATH", ("the model",),
           "loss over k and whether it falls all along; training with a growing k is not here"),
    Method("model", _GATING, "SCMoE: contrast with experts not chosen", "arXiv 2405.14507", "operation",
           "command:sweep MODEL --contrast --data PATH", ("the model",), "judged on given text, not on its own words"),
    Method("model", _GATING, "Rewiring experts on the fly", "arXiv 2510.14853", "operation",
           "command:sweep MODEL --rerouting --data PATH", ("the model",),
           "judged by the loss of what follows; its layers, steps and learning rate were not verified"),
    Method("model", _GATING, "Top-p, ratio, threshold, tiers and k on a trace",
           "arXiv 2403.07652, 2410.06270, 2411.01433", "simulation", "page:what-if", ("trace", "weights"),
           "experts, mass and load under a rule, without the model"),
    Method("model", _GATING, "AdaMoE: null experts of constant logit on a trace", "arXiv 2406.13233", "simulation",
           "page:what-if", ("trace", "scores"), "trained null experts are not here"),
    Method("model", _GATING, "Auxiliary-loss-free balancing: biases that even out the load", "arXiv 2408.15664", "plan",
           "command:route RUN --balance", ("trace", "scores"),
           "on a fixed model; judged on text that they were not fitted on"),
    Method("model", _GATING, "Rewiring by hand: biases on the router's logits", "arXiv 2510.14853", "plan",
           "page:what-if", ("trace", "scores"), "the page's section Steering; vectors that are fitted are sweeps"),
    Method("model", _GATING, "Selective Sinkhorn routing", "arXiv 2511.08972", "simulation", "page:what-if",
           ("trace", "scores"), "the price of balance on a recorded batch; training with it is not here"),
    Method("model", _GATING, "Similarity-aware routing: smoothing over neighbours", "arXiv 2505.00792", "simulation",
           "page:what-if", ("trace", "scores"), "likeness from router logits, not from attention"),
    Method("model", _GATING, "Dynamic experts search", "arXiv 2509.22572", "operation",
           "command:sweep MODEL --items FILE --data PATH", ("the model",),
           "items solved over several k against samples at equal FLOPs; the search with a verifier is not here"),
    Method("model", _GATING, "Graph of tokens: fluctuation of routing", "arXiv 2505.00792", "metric",
           "command:compare RUN OTHER", ("trace",),
           "choices that move between checkpoints"),
    _absent("model", "algorithm: sparse to dense", "Read-ME: dense models into experts", "arXiv 2410.19123",
            "not built; its score of neurons and its cache are"),
    Method("system", _STRATEGY, "MoE^2: variants of a model on unequal devices", "arXiv 2501.09410", "plan",
           "command:place --choices FILE", (), "solved exactly from given figures; its gating is not here"),
    Method("system", _STRATEGY, "ExpertWeave: memory of adapters", "arXiv 2508.17624", "plan",
           "command:place RUN --adapters FILE", ()),
    Method("system", _TASKS, "ExpertFlow: tokens regrouped", "arXiv 2410.17954", "simulation",
           "command:cache RUN --beside", ("trace",)),
    Method("system", _TASKS, "Read-ME: most wanted expert first", "arXiv 2410.19123", "simulation",
           "command:cache RUN --beside", ("trace",)),
    Method("system", _TASKS, "Symbolic-MoE: requests grouped by experts", "arXiv 2503.05641", "simulation",
           "command:cache RUN --beside", ("trace",)),
    Method("system", _CACHING, "Does caching pay on a machine?", "ours", "simulation", "page:cache", ("trace",
           "order")),
    Method("system", _CACHING, "EMS: room for keys and values", "", "simulation", "page:cache", ("trace", "order"),
           "keys and values count against the memory of experts; merging them is not here"),
    Method("system", _CACHING, "HOBBIT: experts in several widths", "arXiv 2411.01433", "simulation",
           "page:what-if", ("trace", "weights"),
           "shares and bits of its tiers on a trace; recommend prices and replays widths"),
    Method("system", "offloading: loading", "D2MoE: hottest experts' bits first", "arXiv 2504.15299", "simulation",
           "command:cache RUN --beside", ("trace",)),
    Method("system", _CPU, "Misses computed by the CPU", "ours, after KTransformers", "simulation", "page:cache",
           ("trace", "order")),
    Method("analysis", "routing", "Local routing consistency: SRP and SCH", "arXiv 2505.16056", "metric",
           "page:local-consistency", ("trace", "order")),
    Method("analysis", "routing", "Super experts", "arXiv 2507.23279", "profile", "page:super-experts",
           ("activations",)),
    Method("analysis", "routing", "OLMoE: specialisation and saturation", "arXiv 2409.02060", "metric", "page:routing",
           ("trace",)),
    Method("analysis", "routing", "A closer look: similarity of experts", "arXiv 2406.18219", "metric",
           "page:similarity",
           ("similarity",)),
    Method("analysis", "routing", "Fate: cross-layer gates", "arXiv 2502.12224", "metric", "view:lookahead",
           ("lookahead",)),
    Method("analysis", "importance", "ESFT: experts to fine-tune for a task", "arXiv 2407.01906", "plan",
           "command:plan RUN --esft DOMAIN", ("weights",)),
    Method("analysis", "importance", "EAQuant: coverage of experts by the text", "arXiv 2506.13329", "metric",
           "view:coverage", ()),
    Method("analysis", "evaluation", "LLM-KICK: beyond perplexity", "arXiv 2310.01382", "operation",
           "command:evaluate MODEL --against MODEL --data PATH", ("the model",),
           "probes made of your own text, in its spirit"),
    Method("analysis", "evaluation", "One model against another: KL, flips, generations", "standard", "operation",
           "command:evaluate MODEL --against MODEL --data PATH", ("the model",)),
    _absent("analysis", "evaluation", "ExpertRAG: uncertainty of the router foretells errors", "",
            "not built; closed- and open-book probes are part of evaluate"),
    _absent("analysis", "evaluation", "Agentic systems: bits about the prompt per token"),
    _absent("analysis", "evaluation", "Open knowledge: examples that rank plans"),
    _absent("analysis", "evaluation", "ConCISE: confidence per reasoning step"),
)  # fmt: skip
"""What no registry holds, in the order of :data:`CLASSES`."""

_OF_STEP = {"drop": _PRUNING, "slim": _PRUNING, "merge": _MERGING, "quantize": _QUANTIZATION, "factor": _DECOMPOSITION}
_READS = {
    **dict.fromkeys(("tcess", "mc_smoe", "m_smoe"), "logits"),
    **dict.fromkeys(("gate_mass", "dern_score", "dern"), "weights"),
}
"""What presets need of level routing that not every source has."""
_OF_PLACING = {"affinity": _ALL_TO_ALL, "contiguous": _STRATEGY}


@cache
def methods() -> tuple[Method, ...]:
    """All methods, class by class; those of registries first."""
    every = [*_presets(), *_policies(), *_foreseeing(), *_placing(), *METHODS]
    order = {known: index for index, known in enumerate(CLASSES)}
    return tuple(sorted(every, key=lambda one: order[one.level, one.group]))


def _presets() -> list[Method]:
    from planner.presets import PRESETS

    return [
        Method("model", _OF_STEP[one.step], one.title, one.source, "plan", f"preset:{one.name}",
               (*(level for level in one.level.split(",") if level != "routing"),
                *([_READS[one.name]] if one.name in _READS else [])),
               "ours differs from what was published; docs/plan.md says how" if one.differs else "")
        for one in PRESETS
    ]  # fmt: skip


def _policies() -> list[Method]:
    from planner.simulate.policies.registry import POLICIES

    needs = {"ids": "trace", "weights": "weights", "requests": "order"}
    return [
        Method("system", _CACHING, f"Cache: {one.title}", one.source, "simulation", f"policy:{one.name}",
               tuple(needs[need] for need in one.needs), "a bound that no engine can reach" if one.bound else "")
        for one in POLICIES
    ]  # fmt: skip


def _foreseeing() -> list[Method]:
    from planner.simulate.prefetch import METHODS as WAYS

    more = {"recorded": "lookahead", "tokens": "text"}
    return [
        Method("system", _PREFETCHING, one.title, one.source, "simulation", f"prefetch:{one.name}",
               ("trace", *(more[need] for need in one.needs if need in more)),
               "drawn from recorded or given accuracy, not predicted" if one.drawn else "")
        for one in WAYS
    ]  # fmt: skip


def _placing() -> list[Method]:
    from planner.place.methods import METHODS as PLACEMENTS

    return [
        Method("system", _OF_PLACING.get(one.name, _BALANCE), f"Placement: {one.title}", one.source, "plan",
               f"place:{one.name}", ("trace",) if one.needs_trace else ())
        for one in PLACEMENTS
    ]  # fmt: skip
