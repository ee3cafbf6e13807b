"""How fast two models are, prompt and decode, in interleaved rounds: what slows the machine for a while slows both."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from moescope.errors import RunError
from profiler.evaluation.generation import GREEDY
from profiler.metrics.perplexity import Estimate
from profiler.running import evaluating, input_device

ROUNDS = 7
DECODE_TOKENS = 16
BOOTSTRAP = 2000


@dataclass(frozen=True)
class Speed:
    """Tokens per second of one phase.

    Attributes:
        model: median over the rounds, with their smallest and largest value.
        base: the same.
        ratio: the model's over the base's: median over the rounds with its 95 % interval; above 1 = faster.
        rounds: how many.
        tokens: of one round.
    """

    model: Estimate
    base: Estimate
    ratio: Estimate
    rounds: int
    tokens: int


def measure_speed(
    model: nn.Module,
    base: nn.Module,
    prompts: NDArray[np.int64],
    *,
    rounds: int = ROUNDS,
    decode_tokens: int = DECODE_TOKENS,
    progress: Callable[[float], None] | None = None,
) -> dict[str, Speed]:
    """``prompt`` and ``decode`` of both models on this machine, with this batch; other engines differ.

    Decoding is timed with the prompt's time taken off: a continuation of ``decode_tokens + 1`` tokens less one of 1.

    Args:
        model: what is measured.
        base: what it is compared with.
        prompts: (batch, length) ids.
        rounds: how often; one more warms up.
        decode_tokens: new tokens per prompt that are timed.
        progress: told which share is done.

    Raises:
        RunError: every round was disturbed.
    """
    both = {"model": model, "base": base}
    seconds: dict[str, dict[str, list[float]]] = {name: {who: [] for who in both} for name in ("prompt", "decode")}
    for turn in range(rounds + 1):
        found = {}
        for who in ("base", "model") if turn % 2 else ("model", "base"):
            prompt = _timed(both[who], prompts, 1)
            found[who] = prompt, _timed(both[who], prompts, decode_tokens + 1) - prompt
        # The first round warms up; where a hiccup hides the decoding, the round is no measurement.
        if turn and all(decode > 0 for _, decode in found.values()):
            for who, (prompt, decode) in found.items():
                seconds["prompt"][who].append(prompt)
                seconds["decode"][who].append(decode)
        if progress is not None:
            progress((turn + 1) / (rounds + 1))
    tokens = {"prompt": prompts.size, "decode": len(prompts) * decode_tokens}
    if not seconds["prompt"]["model"]:
        raise RunError("the speed cannot be told: no decoding took longer than its prompt; use --skip speed")
    return {name: summarize(seconds[name], tokens[name]) for name in seconds}


def summarize(seconds: Mapping[str, list[float]], tokens: int) -> Speed:
    """Speeds from the seconds of each round, of ``model`` and ``base``."""
    rates = {who: tokens / np.array(values) for who, values in seconds.items()}
    ratios = rates["model"] / rates["base"]
    picks = np.random.default_rng(0).integers(0, len(ratios), (BOOTSTRAP, len(ratios)))
    low, high = np.quantile(np.median(ratios[picks], axis=1), [0.025, 0.975])
    return Speed(
        model=_spread(rates["model"]),
        base=_spread(rates["base"]),
        ratio=Estimate(float(np.median(ratios)), float(low), float(high)),
        rounds=len(ratios),
        tokens=tokens,
    )


def _spread(rates: NDArray[np.float64]) -> Estimate:
    return Estimate(float(np.median(rates)), float(rates.min()), float(rates.max()))


def _timed(model: Any, prompts: NDArray[np.int64], new_tokens: int) -> float:
    """Seconds of a greedy continuation that no end token breaks off."""
    ids = torch.from_numpy(prompts).to(input_device(model))
    _wait()
    began = time.perf_counter()
    with evaluating(model), torch.no_grad():
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            pad_token_id=0,
            **GREEDY,
        )
    _wait()
    return time.perf_counter() - began


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
