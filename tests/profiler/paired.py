"""Small runs of given sequences and selections, for tests that compare two of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

import store
from store import LayerInfo, RunInfo, RunWriter, pack_trace

EXPERTS, TOP_K, LAYERS = 8, 3, (1, 2)


def draw(rng: np.random.Generator, tokens: int, *, top_k: int = TOP_K, missing: float = 0.0) -> np.ndarray:
    """(tokens, k) distinct experts, some missing from the end."""
    ids = np.argsort(rng.random((tokens, EXPERTS)), axis=1)[:, :top_k].astype(np.int16)
    for row in np.flatnonzero(rng.random(tokens) < missing):
        ids[row, rng.integers(0, top_k) :] = -1
    return ids


def texts(rng: np.random.Generator, lengths: list[int]) -> list[np.ndarray]:
    return [rng.integers(0, 12, length) for length in lengths]


def write(
    folder: Path,
    name: str,
    tokens: list[np.ndarray],
    ids: list[np.ndarray],
    *,
    experts: int = EXPERTS,
    layers: tuple[int, ...] = LAYERS,
    pieces: dict[int, bytes] | None = None,
    keep_text: bool = True,
) -> store.Run:
    """A run of these sequences; ``ids`` (layers, tokens, k) of each. Sequence numbers are 3, 6, 9, ..."""
    writer = RunWriter.create(folder, name, RunInfo(model="m", num_layers=4, hidden_size=8))
    numbers = [3 * (place + 1) for place in range(len(tokens))]
    shard: dict[str, pl.DataFrame] = {
        "layer": pl.DataFrame(
            [vars(LayerInfo(layer=layer, num_experts=experts, top_k=TOP_K)) for layer in layers]
        ),
        "sequence": pl.DataFrame(
            {
                "sequence": numbers, "domain": ["ab"[number % 2] for number in numbers], "source": [""] * len(numbers),
                "tokens": [len(one) for one in tokens], "prompt_tokens": [len(one) for one in tokens],
            }
        ),
        "route_chunk": pl.concat(
            pack_trace(
                layer=layer, sequence=np.full(len(one), number), position=np.arange(len(one)), ids=chosen[axis],
                weights=np.where(chosen[axis] >= 0, 1.0 / np.arange(1, TOP_K + 1), 0.0), num_experts=experts,
            )
            for axis, layer in enumerate(layers)
            for number, one, chosen in zip(numbers, tokens, ids, strict=True)
        ),
    }  # fmt: skip
    if keep_text:
        pieces = pieces or {token: f"<{token}>".encode() for token in range(40)}
        shard["sequence_token"] = pl.DataFrame(
            {
                "sequence": numbers, "start": [0] * len(numbers), "token_ids": [one.tolist() for one in tokens],
                "special": [[False] * len(one) for one in tokens],
            }
        )  # fmt: skip
        shard["vocabulary"] = pl.DataFrame({"token_id": list(pieces), "bytes": list(pieces.values())})
    writer.write_shard(shard)
    return store.open_run(writer.finish())


def routed(rng: np.random.Generator, tokens: list[np.ndarray], layers: int = len(LAYERS)) -> list[np.ndarray]:
    return [np.stack([draw(rng, len(one)) for _ in range(layers)]) for one in tokens]
