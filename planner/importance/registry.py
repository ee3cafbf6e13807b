"""Every importance score, in the order in which pages and reports list them. docs/importance.md has a section for each.

A new score is one file beside this one, named like the score and holding a function of that name, and one line here; a
test holds the files, the lines and the sections together.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import polars as pl

from moescope.errors import PlanError

Granularity = Literal["expert", "neuron", "channel"]


@dataclass(frozen=True)
class Score:
    """What one score is.

    Attributes:
        name: how it is asked for; also the name of its module and function.
        title: its section in docs/importance.md.
        level: what has to be recorded, a comma list.
        granularity: what it values: a whole expert, one of its neurons, or a channel of its input.
        unit: of the value.
        source: where it was published.
        differs: ours differs from the published code, and the section says how.
    """

    name: str
    title: str
    level: str
    granularity: Granularity
    unit: str
    source: str
    differs: bool = False

    @property
    def function(self) -> Callable[..., pl.DataFrame]:
        """``function(statistics, **parameters)`` -> key columns and ``value``."""
        module = importlib.import_module(f"planner.importance.{self.name}")
        return cast(Callable[..., pl.DataFrame], getattr(module, self.name))

    @property
    def docs_anchor(self) -> str:
        """Anchor of the score's section in docs/importance.md."""
        return "".join(letter for letter in self.title.lower().replace(" ", "-") if letter.isalnum() or letter in "-_")


_R, _X, _G = "routing", "activations", "gradients"

SCORES: tuple[Score, ...] = (
    Score("frequency", "Frequency", _R, "expert", "selections", "arXiv 2303.01610"),
    Score("gate_mass", "Gate mass", _R, "expert", "gate weight", "standard"),
    Score("dern", "DERN-style gate share", _R, "expert", "gate share per token", "DERN, EMNLP Findings 2025", True),
    Score("esft_gate", "ESFT gate score", _R, "expert", "share of the layer", "arXiv 2407.01906", True),
    Score("esft_token", "ESFT token ratio", _R, "expert", "share of the layer", "arXiv 2407.01906", True),
    Score("tcess", "TCESS", _R, "expert", "logits per token", "PreMoe, arXiv 2505.17639", True),
    Score("reap", "REAP", _X, "expert", "activation", "arXiv 2510.13999", True),
    Score("ean", "EAN", _X, "expert", "activation", "REAP's code, ean_sum"),
    Score("man", "MAN", _X, "expert", "activation", "arXiv 2606.15716", True),
    Score("msan", "MSAN", _X, "expert", "squared activation", "arXiv 2606.15716", True),
    Score("easy_ep", "EASY-EP", _X, "expert", "share of the layer, or activation", "arXiv 2504.06792", True),
    Score("masking_error", "Masking error", _X, "expert", "squared activation", "ours"),
    Score("output_max", "Output maximum", _X, "expert", "activation", "arXiv 2507.23279", True),
    Score("camera", "CAMERA energy", _X, "neuron", "squared activation", "CAMERA, AAAI 2026", True),
    Score("width", "Width score", _X, "neuron", "activation", "arXiv 2512.02351", True),
    Score("read_me", "Read-ME activation", _X, "neuron", "activation", "arXiv 2410.19123"),
    Score("wanda_down", "Wanda norm of neurons", _X, "neuron", "activation", "arXiv 2306.11695"),
    Score("wanda_input", "Wanda norm of inputs", _X, "channel", "activation", "arXiv 2306.11695"),
    Score("heapr", "HEAPr", _G, "neuron", "squared loss", "HEAPr, ICLR 2026", True),
    Score("taylor", "Taylor", _G, "neuron", "loss", "arXiv 1611.06440", True),
    Score("fisher", "Fisher", _G, "neuron", "squared loss", "standard"),
    Score("expert_taylor", "Expert Taylor", _G, "expert", "loss", "arXiv 1611.06440"),
    Score("expert_fisher", "Expert Fisher", _G, "expert", "squared loss", "standard"),
)


def find(name: str) -> Score:
    """The score of that name.

    Raises:
        PlanError: there is none; the message names the nearest.
    """
    known = {one.name: one for one in SCORES}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
        raise PlanError(f"no importance score {name!r}: {hint}")
    return known[name]
