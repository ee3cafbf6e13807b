"""What a session refuses before it begins: levels that the experts do not show, and runs that it cannot go on with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import store as run_store
from compressor.families import expert_map_of
from moescope.errors import InputError, ModelError
from profiler.capture.discovery import MoELayer
from profiler.capture.stacks import DECODER

SHARED = (
    "keeps experts that stand for several rows of their router (form shared): a token may run one twice, which no table"
    " of a run can hold; profile the model that it was made from, or measure it with moescope evaluate"
)


def require_one_to_one(layers: Sequence[MoELayer]) -> None:
    """Refuse layers whose router has more rows than there are experts."""
    for layer in layers:
        if expert_map_of(layer.experts) is not None:
            raise ModelError(f"{layer.name} {SHARED}")


def require_rows(layers: Sequence[MoELayer], levels: Sequence[str]) -> None:
    """Refuse levels that look into experts whose weights nobody can read; packed ones still show what they put out."""
    for layer in layers:
        if layer.adapter.method != "forward" and "lookahead" in levels:
            raise ModelError(
                f"level lookahead needs routers that run, but {layer.name} ({type(layer.experts).__name__}) is routed"
                " by a kernel: leave lookahead out, or load the model dequantized"
            )
        wanted = {"similarity", "errors", "gradients"} | (set() if layer.adapter.packed else {"activations"})
        refused = [level for level in levels if level in wanted]
        if layer.layout is None and refused:
            raise ModelError(
                f"level {refused[0]} needs plain weights, but {layer.name} ({type(layer.experts).__name__}) keeps them"
                f" packed: leave {refused[0]} out, or load the model dequantized"
            )


def require_weights(layers: Sequence[MoELayer], levels: Sequence[str]) -> None:
    """Refuse level ``errors`` where experts are in memory only while they run: it reads them between forwards."""
    for layer in layers if "errors" in levels else ():
        if any(getattr(getattr(part, "_hf_hook", None), "offload", False) for part in layer.experts.modules()):
            raise ModelError(
                f"level errors reads weights between forwards, but {layer.name} ({type(layer.experts).__name__}) waits"
                " on the CPU or disk until it runs: leave errors out, or collect with --layer-stream"
            )


def require_predictions(model: Any, stack: str, *, keeps_text: bool) -> None:
    """Refuse level ``predictions`` where there is no text to keep it beside, or no head to ask."""
    if not keeps_text:
        raise InputError(
            "level predictions keeps the model's next tokens beside the text, and no text is kept: leave out --no-text"
            " (watch: give a tokenizer), or leave out predictions"
        )
    if stack != DECODER:
        raise InputError(f"level predictions asks the decoder, but the stack {stack!r} is watched: leave it out")
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        raise ModelError(
            f"{type(model).__name__} has no language-model head, so it predicts no tokens: level predictions needs the"
            " causal language model (load it with AutoModelForCausalLM)"
        )


def require_same(name: str, before: run_store.RunInfo, now: run_store.RunInfo) -> None:
    """Refuse to mix what two collections saw in one run."""
    if ("layer_stream" in before.settings) != ("layer_stream" in now.settings):
        how = "with" if "layer_stream" in before.settings else "without"
        raise InputError(f"run {name!r} was begun {how} --layer-stream: resume it so")
    if before.model_fingerprint and before.model_fingerprint != now.model_fingerprint:
        raise InputError(f"run {name!r} was begun with another model ({before.model}): resume it with that one")
    if before.levels != now.levels:
        raise InputError(f"run {name!r} was begun with level {before.levels!r}: resume it with that level")
    stacks = [str(info.settings.get("stack", DECODER)) for info in (before, now)]
    if stacks[0] != stacks[1]:
        raise InputError(f"run {name!r} was begun with stack {stacks[0]!r}: resume it with that stack")
    corpora = [info.settings.get("corpus_sha256") for info in (before, now)]
    if all(corpora) and corpora[0] != corpora[1]:
        raise InputError(f"run {name!r} was begun with another corpus: resume it with the same data and options")
    kept = [info.settings.get("recording", {}) for info in (before, now)]
    if kept[0] != kept[1]:
        raise InputError(f"run {name!r} was begun with other options ({kept[0]}, not {kept[1]}): resume it with those")
    answers = [info.settings.get("generation") for info in (before, now)]
    if answers[0] != answers[1]:
        raise InputError(f"run {name!r} was begun with generation {answers[0]}, not {answers[1]}: resume it with that")
