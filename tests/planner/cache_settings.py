"""Settings of caching studies from workloads, and runs whose tokens choose given experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

import store
from compressor.plan import LayerShape, Source
from planner.cache.setting import Setting
from planner.estimate.memory import ExpertSizes, MemoryBudget
from planner.machine import Link, Machine, Processor
from planner.simulate.timeline import StepCosts
from planner.simulate.workload import Workload
from store import LayerInfo, RunInfo, RunWriter
from tests.planner.workloads import drawn_workload

HIDDEN, WIDTH = 64, 32
EXPERT = 3 * HIDDEN * WIDTH * 2
"""Bytes of one expert of a made run in 16 bits."""


def slow_machine(*, link: float = 1e9, cpu: float = 1e9, vram: int = 1 << 40, ram: int = 1 << 40) -> Machine:
    """A device of 1 TB/s beside a link and a CPU of so many bytes per second; nothing else takes time."""
    return Machine(
        name="slow", title="a machine with a slow link", vram=vram, ram=ram, device=Processor(1e12, 1e15, 0.0),
        cpu=Processor(cpu, 1e15, 0.0), link=Link("slow", link, 0.0), disk=Link("disk", link / 10, 0.0),
    )  # fmt: skip


def setting_for(
    train: Workload, test: Workload, *, machine: Machine | None = None, size: Any = 1e6, batch: int = 1, **changes: Any
) -> Setting:
    """The setting of two workloads; size: bytes of every expert, or (layers, E), 0 where there is none."""
    sizes = np.broadcast_to(np.asarray(size, np.float64), (train.num_layers, train.num_experts)).copy()
    layers = tuple(
        LayerShape(layer=layer, num_experts=int((row > 0).sum()), top_k=k, width=4)
        for (layer, _), row, k in zip(train.layers, sizes, train.top_k, strict=True)
    )
    source = Source(
        model="m", model_type="t", hidden_size=4, expert_size=4, num_layers=len(layers), layers=layers
    )  # fmt: skip
    nothing = StepCosts(dense=np.zeros(1), expert=np.zeros(1), tail=np.zeros(1), size=np.zeros(1))
    found = Setting(
        machine=machine or slow_machine(), source=source,
        sizes=ExpertSizes(train.layers, sizes, (sizes / 2).astype(np.int64)), rest=None,
        budget=MemoryBudget(1 << 40, 0.0, 0.0, 0.0, False), train=train, test=test, test_costs=nothing, context=1,
        batch=batch, dense_bits=16.0, other=0,
    )  # fmt: skip
    return replace(found.on(train, test), **changes)


def drawn_setting(
    seed: int, *, machine: Machine | None = None, size: Any = 1e6, batch: int = 1, **shape: Any
) -> Setting:
    """The setting of two drawn workloads, the second of other requests than the first."""
    shape = {"skew": 0.4, **shape}
    train, test = drawn_workload(seed, **shape), drawn_workload(seed + 1000, **shape)
    return setting_for(train, test, machine=machine, size=size, batch=batch)


def random_routes(seed: int, *, layers: int, experts: int, k: int, requests: int, length: int) -> NDArray[np.int64]:
    """(layers, requests, tokens, k): k distinct experts for every token and layer, all as likely."""
    generator = np.random.default_rng(seed)
    return np.argsort(generator.random((layers, requests, length, experts)), axis=-1)[..., :k]


def sticky_routes(seed: int, *, stay: float, **shape: int) -> NDArray[np.int64]:
    """The same, but that a token chooses what the one before it chose with probability ``stay``, in all layers."""
    ids = random_routes(seed, **shape)
    stays = np.random.default_rng([seed, 1]).random(ids.shape[1:3]) < stay
    for token in range(1, ids.shape[2]):
        mine = stays[:, token]
        ids[:, mine, token] = ids[:, mine, token - 1]
    return ids


def written_run(
    folder: Path,
    ids: NDArray[np.integer[Any]],
    *,
    name: str = "made",
    domains: Sequence[str] | None = None,
    experts: int | Sequence[int] = 16,
    top_k: Sequence[int] | None = None,
    empty: Sequence[tuple[int, int]] = (),
    dtype: str = "bfloat16",
    config: dict[str, Any] | None = None,
    prompt: int | None = None,
    trace: bool = True,
    finish: bool = True,
    shared: int = 0,
    failed: str = "",
) -> store.Run:
    """A run of selections (layers, sequences, tokens, k), -1 = none.

    Args:
        folder: of the run.
        ids: what tokens chose.
        name: of the run.
        domains: (sequences,); None = all alike.
        experts: E, of all layers or of each.
        top_k: of each layer; None = k.
        empty: (layer, expert) that hold no weights.
        dtype: of the model's weights.
        config: of the model; None = one with attention and a small vocabulary.
        prompt: tokens of each sequence that are its prompt; None = all.
        trace: False = the run holds no selections.
        finish: False = it is still being collected.
        shared: experts of each layer that every token uses.
        failed: why a check failed.
    """
    layers, sequences, tokens, k = ids.shape
    counts = [experts] * layers if isinstance(experts, int) else list(experts)
    known = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100}
    writer = RunWriter.create(
        folder, name,
        RunInfo(
            model="made", model_type="mixtral", num_layers=layers, hidden_size=HIDDEN, dtype=dtype,
            model_config=known if config is None else config, sequences=sequences, tokens=sequences * tokens,
        ),
    )  # fmt: skip
    infos = [
        LayerInfo(layer, 0, f"layers.{layer}", "Experts", "Router", counts[layer], k if top_k is None else top_k[layer],
                  shared, WIDTH)
        for layer in range(layers)
    ]  # fmt: skip
    number, position = np.repeat(np.arange(sequences), tokens), np.tile(np.arange(tokens), sequences)
    frames = {
        "layer": pl.DataFrame([vars(one) for one in infos]),
        "sequence": pl.DataFrame({
            "sequence": np.arange(sequences), "domain": list(domains or ["all"] * sequences),
            "source": [""] * sequences, "tokens": [tokens] * sequences,
            "prompt_tokens": [tokens if prompt is None else prompt] * sequences,
        }),
    }  # fmt: skip
    if failed:
        frames["check"] = pl.DataFrame([{"name": "made", "status": "fail", "detail": failed}])
    if empty:
        frames["expert"] = pl.DataFrame(
            [
                {"layer": layer, "step": 0, "expert": one, "kind": "zero" if (layer, one) in empty else "routed"}
                for layer in range(layers)
                for one in range(counts[layer])
            ]
        )
    if trace:
        flat = ids.reshape(layers, -1, k)
        weights = np.where(flat >= 0, 1.0 / k, 0.0)
        frames["route_chunk"] = pl.concat(
            store.pack_trace(
                layer=layer, sequence=number, position=position, ids=flat[layer], weights=weights[layer],
                num_experts=max(counts),
            )
            for layer in range(layers)
        )  # fmt: skip
    writer.write_shard(frames)
    return store.open_run(writer.finish(seconds=1.0) if finish else writer.folder)
