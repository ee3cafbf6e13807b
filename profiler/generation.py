"""Answers of the model itself as calibration: each batch of prompts is answered, and prompt and decode are recorded.

Offloading, caching and decode-time skipping are about decode, where a token's text is the model's own. A corpus of
finished texts shows none of that. Here the texts are prompts, and what follows them is drawn from the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moescope.errors import InputError, ModelError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from profiler.corpus import TokenBatch


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: of the softmax that it is drawn from; 0 takes the likeliest token each time.
        top_p: draw from the fewest tokens that have so much probability together, in (0, 1].
        seed: of the draws; each batch has its own, so that a resumed run draws as an uninterrupted one.

    Raises:
        InputError: a value out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature is {self.temperature}: give 0 (the likeliest token) or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top-p is {self.top_p}: give a probability above 0 and at most 1")
        if self.temperature == 0 and self.top_p != 1:
            raise InputError(f"top-p {self.top_p} draws nothing at temperature 0: give --temperature, such as 0.7")

    def options(self) -> dict[str, Any]:
        """Arguments for ``generate``; they overrule what the checkpoint suggests."""
        if self.temperature == 0:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


class Generation:
    """Answers batches of prompts with the model's own ``generate`` and a key-value cache.

    What ``generate`` feeds is what a server feeds: the prompt, then each new token but the last of an answer, which
    nothing follows. Rows that have ended are fed on for the sake of the others; the session leaves that out.

    Args:
        model: the model, with its language-model head.
        new_tokens: longest answer, in tokens.
        sampling: how tokens are chosen.
        device: where the inputs go.

    Raises:
        InputError: fewer than 2 new tokens: the first comes out of the prompt, so that no decode step would run.
        ModelError: a model without ``generate``.
    """

    def __init__(self, model: nn.Module, *, new_tokens: int, sampling: Sampling, device: torch.device) -> None:
        if new_tokens < 2:
            raise InputError(
                f"{new_tokens} generated token leaves nothing to decode: the first one comes out of the prompt; give 2"
                " or more"
            )
        if not getattr(model, "can_generate", lambda: False)():
            raise ModelError(f"{type(model).__name__} has no language-model head to generate with")
        self._model: Any = model
        self._new_tokens, self._sampling, self._device = new_tokens, sampling, device

    def settings(self) -> dict[str, Any]:
        """What the run keeps about it."""
        return {"new_tokens": self._new_tokens, **asdict(self._sampling)}

    def answer(self, batch: TokenBatch) -> Tensor:
        """Answer the prompts of a batch.

        Returns:
            (n,) int64, equal for two calls if and only if they fed the same tokens and saw the same scores at each
            step, to the bit: all token ids, then 8 bytes of a hash of each step's scores.
        """
        import torch
        from transformers import LogitsProcessorList

        ids, mask = left_padded(batch.input_ids, batch.attention_mask)
        trail = _Trail()
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.no_grad():
            torch.manual_seed(_seed(self._sampling.seed, batch.sequences))
            fed: Tensor = self._model.generate(
                input_ids=torch.from_numpy(ids).to(self._device),
                attention_mask=torch.from_numpy(mask).to(self._device),
                max_new_tokens=self._new_tokens,
                num_beams=1,
                use_cache=True,
                pad_token_id=_padding(self._model),
                logits_processor=LogitsProcessorList([trail]),
                return_dict_in_generate=False,
                **self._sampling.options(),
            )
        return torch.cat([fed.reshape(-1).cpu(), torch.tensor(trail.steps, dtype=torch.int64)])


class _Trail:
    """Sees the scores of each step before a token is chosen, and changes nothing."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        import torch

        data = scores.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes()
        self.steps.append(int.from_bytes(hashlib.sha256(data).digest()[:8], "little", signed=True))
        return scores


def left_padded(ids: np.ndarray[Any, Any], mask: np.ndarray[Any, Any]) -> tuple[Any, Any]:
    """(batch, length) ids and mask with the padding of each row moved from its end to its beginning.

    New tokens are appended on the right, where padding would stand between a prompt and its answer.
    """
    shifts = mask.shape[1] - mask.sum(1)
    columns = (np.arange(mask.shape[1])[None] - shifts[:, None]) % mask.shape[1]
    return np.take_along_axis(ids, columns, 1), np.take_along_axis(mask, columns, 1)


def _seed(seed: int, sequences: Sequence[int] | np.ndarray[Any, Any]) -> int:
    """The seed of a batch: its own, whichever batches ran before it."""
    digest = hashlib.sha256(f"{seed}/{int(min(sequences))}".encode()).digest()
    return int.from_bytes(digest[:7], "little")


def _padding(model: Any) -> int:
    """An id for rows that have ended: the model's padding token, or its first end token."""
    config = model.generation_config
    ends = config.eos_token_id
    for value in (config.pad_token_id, ends[0] if isinstance(ends, (list, tuple)) else ends):
        if value is not None:
            return int(value)
    return 0
