"""Every preset by its published name: which method, with which defaults, from where. Plain data.

``planner.make(run, preset=NAME, ...)`` takes them; docs/plan.md has a section for each.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, cast

from moescope.errors import PlanError

StepWord = Literal["drop", "merge", "slim", "factor", "quantize"]


@dataclass(frozen=True)
class Preset:
    """One published method, or one of ours, with its defaults.

    Attributes:
        name: how it is asked for.
        title: its section in docs/plan.md.
        step: what it does: drop, merge, slim, factor or quantize.
        target: module of the method, whose function ``draft(task, **parameters)`` is called.
        level: what the run has to record, a comma list; ``a|b`` = either.
        source: where it was published.
        defaults: parameters of the method.
        forms: how its result may be stored; the first is taken unless another is asked for.
        differs: ours differs from what was published, and the section says how.
    """

    name: str
    title: str
    step: StepWord
    target: str
    level: str
    source: str
    defaults: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    forms: tuple[str, ...] = ("uniform", "per_layer", "padded")
    differs: bool = True

    @property
    def function(self) -> Callable[..., Any]:
        """``draft(task, **parameters)`` -> Draft."""
        return cast(Callable[..., Any], importlib.import_module(self.target).draft)

    @property
    def wanted(self) -> str:
        """What ``moescope collect --level`` takes so that the run has it all, of either both."""
        return self.level.replace("|", ",")

    def lacking(self, recorded: str) -> tuple[str, ...]:
        """What a run of these levels, a comma list, has not of those that it needs, in words."""
        known = {"routing", *(level.strip() for level in recorded.split(","))}
        needs = (need.split("|") for need in self.level.split(","))
        return tuple(" or ".join(need) for need in needs if not known & set(need))

    @property
    def takes_no_budget(self) -> bool:
        """Its parameters alone may say how much: a width, without bits or memory."""
        return "weight_bits" in self.defaults

    @property
    def docs_anchor(self) -> str:
        """Anchor of the preset's section in docs/plan.md."""
        return "".join(letter for letter in self.title.lower().replace(" ", "-") if letter.isalnum() or letter in "-_")


_R, _X, _S, _G = "routing", "activations", "similarity", "gradients"
_E = f"{_X}|errors"
_SLIM_MASKED, _SLIM_UNIFORM = ("masked", "uniform", "per_layer"), ("uniform", "per_layer", "masked")
_WHOLE = ("uniform",)
_MERGED = ("uniform", "shared")
_PACKED, _DENSE = ("packed", "dense"), ("dense", "packed")


def _scored(name: str, title: str, level: str, source: str, *, differs: bool = True, **parameters: Any) -> Preset:
    defaults = MappingProxyType({"score": name, **parameters})
    return Preset(name, title, "drop", "planner.drop.scored", level, source, defaults, differs=differs)


def _preset(
    name: str, title: str, step: StepWord, target: str, level: str, source: str, *,
    forms: tuple[str, ...] = ("uniform", "per_layer", "padded"), differs: bool = True, **parameters: Any,
) -> Preset:  # fmt: skip
    return Preset(name, title, step, f"planner.{target}", level, source, MappingProxyType(parameters), forms, differs)


def _ranked(score: str, name: str, title: str, level: str, granularity: str) -> Preset:
    defaults = MappingProxyType({"score": score, "widths": (2, 4), "granularity": granularity})
    source = "QuantMoE-Bench, arXiv 2406.08155"
    return Preset(name, title, "quantize", "planner.quantize.ranked", level, source, defaults, _PACKED)


DEFAULT = "budgeted_reap"
"""The preset that is taken where none is named; benchmarks/compression.py compares it with the others."""

DEFAULT_UNIFORM = "even_search"
"""The one where every layer has to keep as many experts."""

DEFAULT_QUANTIZER = "error_bits"
"""The preset that finds widths where a cut is followed by bits and none is named."""

PRESETS: tuple[Preset, ...] = (
    _preset("budgeted_reap", "REAP, budgeted", "drop", "drop.scored", _X, "ours, with REAP's score",
            forms=("per_layer", "padded"), differs=False, score="reap", allocation="budgeted", weigh="influence"),
    _preset("even_search", "Set search, even use", "drop", "drop.set_search", _X, "ours", differs=False, use="even",
            mix="tokens"),
    _preset("set_search", "Set search", "drop", "drop.set_search", _X, "ours", differs=False),
    _scored("reap", "REAP", _X, "arXiv 2510.13999"),
    _scored("ean", "EAN", _X, "REAP's code, ean_sum"),
    _scored("frequency", "Frequency", _R, "arXiv 2303.01610"),
    _scored("gate_mass", "Gate mass", _R, "standard", differs=False),
    _preset("dern_score", "DERN-style score", "drop", "drop.scored", _R, "DERN, EMNLP Findings 2025", score="dern"),
    _scored("man", "MAN", _X, "arXiv 2606.15716"),
    _scored("msan", "MSAN", _X, "arXiv 2606.15716"),
    _scored("easy_ep", "EASY-EP", _X, "arXiv 2504.06792"),
    _scored("tcess", "TCESS", _R, "PreMoe, arXiv 2505.17639", rank=1),
    _scored("masking_error", "Masking error", _X, "ours", differs=False),
    _preset("random", "Random", "drop", "drop.random", _R, "control", differs=False, seed=0),
    _preset("block_influence", "Decoder layers", "drop", "drop.depth", _X, "ShortGPT, arXiv 2403.03853", forms=_WHOLE,
            what="layers"),
    _preset("moe_blocks", "MoE blocks", "drop", "drop.depth", _X, "ours", forms=_WHOLE, differs=False, what="blocks"),
    _preset("m_smoe", "M-SMoE", "merge", "merge.m_smoe", _R, "MC-SMoE, ICLR 2024",
            forms=("uniform", "per_layer", "padded", "shared")),
    _preset("stun", "STUN, first stage", "merge", "merge.stun", _X, "STUN, ACL 2025", forms=_WHOLE,
            coactivation_weight=1.0),
    _preset("sub_moe", "Sub-MoE", "merge", "merge.sub_moe", _S, "arXiv 2506.23266", forms=_MERGED, seed=0),
    _preset("sub_moe_truncated", "Sub-MoE, truncated", "merge", "merge.sub_moe", f"{_X},{_S},moments",
            "arXiv 2506.23266", forms=_MERGED, seed=0, truncation=0.1),
    _preset("hc_smoe", "HC-SMoE", "merge", "merge.hc_smoe", _S, "HC-SMoE, arXiv 2410.08589", forms=_MERGED),
    _preset("dern", "DERN-style recombination", "merge", "merge.dern", _R, "DERN, EMNLP Findings 2025", threshold=0.6),
    _preset("copies", "Copies", "merge", "merge.copies", _S, "ours",
            forms=("shared", "per_layer", "uniform", "padded"), differs=False, threshold=0.99),
    _preset("camera_p", "CAMERA-P", "slim", "slim.camera_p", _X, "CAMERA, AAAI 2026", forms=_SLIM_MASKED, alpha=0.9),
    _preset("heapr", "HEAPr", "slim", "slim.heapr", _G, "HEAPr, ICLR 2026", forms=_SLIM_MASKED, weighting="mean"),
    _preset("width", "Width", "slim", "slim.width", _X, "arXiv 2512.02351", forms=_SLIM_UNIFORM),
    _preset("stream_slim", "Slim by the stream", "slim", "slim.stream", _X, "ours",
            forms=("per_layer", "uniform", "masked"),
            differs=False),
    _preset("error_bits", "Error bits", "quantize", "quantize.error_bits", _E, "ours", forms=_PACKED, differs=False,
            widths=(2, 3, 4, 8), granularity="matrix", budget="model", weigh="stream", even=0.5),
    _preset("mixed", "Mixed", "quantize", "quantize.joint", _X, "ours", forms=_PACKED, differs=False,
            widths=(2, 3, 4, 8), drop=1.0),
    _preset("pmq", "PMQ", "quantize", "quantize.pmq", _E, "MC-MoE, arXiv 2410.06270", forms=_DENSE, alpha=1.0, beta=1.5,
            gamma=2.0, equal=True, widths=(1, 2, 3)),
    _preset("pmq_code", "PMQ as released", "quantize", "quantize.pmq", _E, "MC-MoE's code", forms=_DENSE, alpha=1.0,
            beta=1.5, gamma=1.0, equal=False, widths=(1, 2, 3)),
    _ranked("frequency", "frequency_bits", "Frequency bits", _R, "expert"),
    _ranked("first_blocks", "first_blocks", "First blocks", _R, "layer"),
    _ranked("outlier", "outlier_bits", "Outlier bits", "errors", "expert"),
    _ranked("block_importance", "block_importance", "Block importance", _X, "layer"),
    _preset("camera_bits", "CAMERA bits", "quantize", "quantize.camera_bits", _X, "CAMERA, AAAI 2026", forms=_PACKED,
            alpha=0.9, widths=(2, 3, 4), granularity="expert"),
    _preset("edgemoe", "EdgeMoE", "quantize", "quantize.edgemoe", _E, "arXiv 2308.14352", forms=_PACKED,
            widths=(2, 4, 8), granularity="expert", weigh="influence"),
    _preset("ternary", "Ternary", "quantize", "quantize.ternary", _E, "MoTE, arXiv 2506.14435", forms=("dense",)),
    _preset("nested", "Nested widths", "quantize", "quantize.nested", _E, "D2MoE, arXiv 2504.15299", forms=("dense",),
            widths=(2, 3, 4), granularity="expert", weigh="influence"),
    _preset("uniform_bits", "Uniform bits", "quantize", "quantize.uniform_bits", _R, "control", forms=_PACKED,
            differs=False, widths=(2, 3, 4, 8)),
    _preset("random_bits", "Random bits", "quantize", "quantize.random_bits", _R, "control", forms=_PACKED,
            differs=False, seed=0, widths=(2, 3, 4, 8), granularity="expert"),
    _preset("eaquant", "EAQuant", "quantize", "quantize.eaquant", _X, "arXiv 2506.13329", forms=("dense",),
            activation_bits=4, smoothing=0.6, weight_bits=None, widths=(2, 3, 4, 8)),
    _preset("mc_smoe", "MC-SMoE", "factor", "factor.mc_smoe", _R, "MC-SMoE, ICLR 2024",
            forms=("uniform", "per_layer", "padded", "shared"), rank=None, density=0.1),
    _preset("compeft", "ComPEFT residuals", "factor", "factor.compeft", _S, "ComPEFT, arXiv 2311.13171",
            forms=("dense",), density=0.2, scale=1.0),
)  # fmt: skip


def default(*, engine: str | None, form: str | None) -> str:
    """The preset where none is named: layers may differ, unless every engine has to load the result."""
    return DEFAULT_UNIFORM if engine in ("any", "vllm") or form == "uniform" else DEFAULT


def find(name: str) -> Preset:
    """The preset of that name.

    Raises:
        PlanError: there is none; the message names the nearest.
    """
    known = {one.name: one for one in PRESETS}
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
        raise PlanError(f"no preset {name!r}: {hint}")
    return known[name]
