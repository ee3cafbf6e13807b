"""Dynamic Experts Search's question: does trying several numbers of experts solve more than sampling at the same cost?

An item is solved by a branch when its answer is what the branch writes after the prompt, token by token. For greedy
branches that is so exactly when each token of the answer is the likeliest after those before it; for samples, the
probability of the answer at a temperature is known, p, and n samples hold it with 1 - (1 - p)^n. So nothing is drawn,
and the comparison has no noise but that of the items. Both sides have a judge who knows the right branch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from compressor.routing import TopK, rerouted
from moescope.errors import InputError
from profiler import evaluate
from profiler.evaluation.distribution import log_softmax
from profiler.metrics.divergence import mean_of_items
from profiler.running import evaluating, input_device
from profiler.sweep.estimates import plain
from profiler.sweep.items import Item
from profiler.sweep.reading import Progress

TEMPERATURE = 0.8
BATCH = 16


@dataclass(frozen=True)
class Search:
    """What is tried.

    Attributes:
        counts: experts per token of each greedy branch.
        temperature: of the samples at the model's own number, above 0.
    """

    counts: tuple[int, ...]
    temperature: float = TEMPERATURE

    def require_sense(self, num_experts: int) -> None:
        """Refuse what cannot be tried.

        Raises:
            InputError: fewer than two branches, more experts than there are, or no temperature.
        """
        if len(set(self.counts)) < 2:
            raise InputError("--search-k: give two numbers of experts or more, such as 1,2,3,4")
        for count in self.counts:
            if not 1 <= count <= num_experts:
                raise InputError(f"--search-k {count}: a layer has 1 to {num_experts} experts")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise InputError(f"--temperature {self.temperature:g}: give one above 0, such as 0.8")


def search(
    model: nn.Module, items: Sequence[Item], options: Search, *, top_k: int, progress: Progress | None = None
) -> dict[str, Any]:
    """Which items each number of experts solves, and how many as many samples at the model's own number would.

    Args:
        model: the model.
        items: prompts and answers.
        options: what is tried.
        top_k: of the model's own router; the cost of a branch is its tokens x experts.
        progress: told how many tokens were read.

    Returns:
        ``items``; ``counts``: per number of experts ``solved`` (share, with its interval); ``jaccard``: of the solved
        items, per pair (``first``, ``second``, ``value``; null where neither solves any); ``union``: share that any
        solves; ``samples``: as many as cost the same, and ``sampled``: share that they solve; ``samples_sharing``,
        ``sampled_sharing``: the same where samples read their common prompt once; ``difference``: union less sampled,
        paired, with its interval; the same per domain.
    """
    counts = sorted(set(options.counts))
    solved = []
    for count in counts:
        with rerouted(model, TopK(count)):
            solved.append(_answers(model, items, options.temperature, progress)[0])
    chance = _answers(model, items, options.temperature, progress)[1]
    prompts = np.array([len(item.prompt) for item in items])
    answers = np.array([len(item.answer) for item in items])
    work = sum(counts)
    samples = work // top_k
    sharing = int(((work - top_k) * prompts.sum() + work * answers.sum()) // (top_k * answers.sum()))
    table = np.stack(solved)
    domains = np.array([item.domain for item in items])
    whole = np.ones(len(items), dtype=bool)

    def summary(inside: NDArray[np.bool_]) -> dict[str, Any]:
        return _summary(table[:, inside], chance[inside], counts, samples, sharing)

    return {
        "top_k": top_k,
        "temperature": options.temperature,
        "samples": samples,
        "samples_sharing": sharing,
        "prompt_tokens": float(prompts.mean()),
        "answer_tokens": float(answers.mean()),
        **summary(whole),
        "per_domain": {name: summary(domains == name) for name in dict.fromkeys(domains.tolist())},
    }


def _summary(
    table: NDArray[np.bool_], chance: NDArray[np.float64], counts: list[int], samples: int, sharing: int
) -> dict[str, Any]:
    """table (counts, items), chance (items,) that one sample is the answer."""
    union = table.any(0).astype(np.float64)
    sampled: NDArray[np.float64] = 1 - (1 - chance) ** samples
    shared: NDArray[np.float64] = 1 - (1 - chance) ** sharing

    def share(values: Any) -> dict[str, float | None]:
        return plain(mean_of_items(sums=np.asarray(values, np.float64), items=np.ones(table.shape[1])))

    return {
        "items": int(table.shape[1]),
        "counts": [{"k": count, "solved": share(row)} for count, row in zip(counts, table, strict=True)],
        "jaccard": [
            {"first": counts[one], "second": counts[other], "value": _jaccard(table[one], table[other])}
            for one in range(len(counts))
            for other in range(one)
        ],
        "union": share(union),
        "sampled": share(sampled),
        "sampled_sharing": share(shared),
        "difference": share(union - sampled),
    }


def _jaccard(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float | None:
    either = int((first | second).sum())
    return int((first & second).sum()) / either if either else None


def _answers(
    model: nn.Module, items: Sequence[Item], temperature: float, progress: Progress | None
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """(items,) whether the greedy continuation is the answer, and the probability of it at a temperature."""
    greedy, chance = np.zeros(len(items), dtype=bool), np.zeros(len(items))
    lengths = [len(item.prompt) + len(item.answer) for item in items]
    order = np.argsort(lengths, kind="stable")
    device = input_device(model)
    with evaluating(model), torch.no_grad():
        for start in range(0, len(items), BATCH):
            chosen = order[start : start + BATCH]
            ids = torch.zeros((len(chosen), max(lengths[item] for item in chosen)), dtype=torch.int64)
            mask, asked = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
            for row, item in enumerate(items[place] for place in chosen):
                size = len(item.prompt) + len(item.answer)
                ids[row, :size] = torch.from_numpy(np.concatenate([item.prompt, item.answer]))
                mask[row, :size] = 1
                asked[row, len(item.prompt) : size] = True
            right, logs = _along(model, ids.to(device), mask.to(device), temperature)
            wanted = asked[:, 1:]
            greedy[chosen] = (right | ~wanted).all(1).numpy()
            chance[chosen] = torch.where(wanted, logs, 0.0).sum(1).exp().numpy()
            if progress is not None:
                progress(int(mask.sum()))
    return greedy, chance


def _along(
    model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(batch, length - 1) whether the next token is the likeliest, and ln of its probability at a temperature."""
    last = ids.shape[1] - 1
    right, logs = torch.zeros((len(ids), last), dtype=torch.bool), torch.zeros((len(ids), last), dtype=torch.float64)
    for start, part in evaluate.logit_chunks(model, ids, mask):
        stop = min(start + part.shape[1], last)
        if stop > start:
            scores = part[:, : stop - start].float()
            target = ids[:, start + 1 : stop + 1].to(scores.device)
            right[:, start:stop] = (scores.argmax(-1) == target).cpu()
            logs[:, start:stop] = log_softmax(scores / temperature).gather(-1, target[..., None])[..., 0].cpu()
    return right, logs
