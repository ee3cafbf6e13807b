"""A generated run of any shape: aggregates as of many tokens, a trace as long as asked. For tests and benchmarks.

Its figures mean nothing; its tables are as large as those of a real run of that shape. Popularity is uneven, differs by
domain and layer, and neighbouring tokens share experts, so that every metric has something to say.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

import store
from profiler.headline import Part, Tell, compute
from profiler.headline.coverage import coverage_rows
from profiler.headline.load import LOAD
from profiler.headline.local_consistency import SEGMENTS
from profiler.headline.repetition import REPETITION
from profiler.headline.similarity import similarity_rows
from profiler.headline.super_experts import super_expert_rows
from store import LayerInfo, RunInfo, RunWriter

DOMAINS = ("code", "english", "german", "math")
SEQUENCE = 512
WIDTH = 64
"""Length of hidden states: of router rows, and of sums of outputs."""
SHARD = 1_000_000
"""Tokens, counted once per layer, that one shard of the trace holds."""
QUANTITIES = {
    "entropy": 4.0, "top_probability": 1.0, "selected_probability": 1.0, "first_margin": 6.0, "boundary_margin": 2.0,
}  # fmt: skip

QUICK: tuple[Part, ...] = (
    LOAD, SEGMENTS, super_expert_rows, REPETITION, similarity_rows, coverage_rows,
)  # fmt: skip
"""Metrics that a run of the largest shape gets within a minute."""


@dataclass(frozen=True)
class Shape:
    """Layers, experts, experts per token, tokens counted, and sequences of 512 tokens in the trace.

    With similarity, router rows and similarities of every pair, which of the largest shape are 0.2 GB.
    """

    layers: int = 94
    experts: int = 384
    top_k: int = 8
    tokens: int = 10_000
    traced: int = 2
    outputs: bool = True
    similarity: bool = False


def write(directory: Path, name: str, shape: Shape, *, parts: Sequence[Part] = QUICK, tell: Tell | None = None) -> Path:
    """Write a finished run of that shape, with the headline metrics of the given parts."""
    rng = np.random.default_rng(0)
    count = max(shape.tokens // SEQUENCE, shape.traced, len(DOMAINS))
    domains = [DOMAINS[number % len(DOMAINS)] for number in range(count)]
    info = RunInfo(
        model="generated", model_class="GeneratedForCausalLM", num_layers=shape.layers, hidden_size=WIDTH,
        dtype="bfloat16", device="cpu", backend="grouped_mm", origin="collect",
        levels=",".join(["routing", *["activations"] * shape.outputs, *["similarity"] * shape.similarity]),
        text_kept=False,
        sequences=count, tokens=count * SEQUENCE,
    )  # fmt: skip
    writer = RunWriter.create(directory, name, info)
    popularity = _popularity(shape, rng)
    tables = {
        "layer": _layers(shape),
        "sequence": pl.DataFrame({
            "sequence": np.arange(count), "domain": domains, "source": [""] * count, "tokens": [SEQUENCE] * count,
            "prompt_tokens": [SEQUENCE] * count,
        }),
        "expert_load": _load(shape, popularity, count * SEQUENCE // len(DOMAINS)),
        "router_load": _router(shape, count * SEQUENCE // len(DOMAINS)),
        "router_histogram": _histograms(shape, count * SEQUENCE // len(DOMAINS)),
        "check": pl.DataFrame({
            "name": ["layers_seen"], "status": ["pass"], "value": [float(shape.layers)],
            "tolerance": [float(shape.layers)], "detail": ["generated"],
        }),
    }  # fmt: skip
    if shape.outputs:
        tables |= {"expert_output": _outputs(shape, popularity, rng), "residual": _residual(shape)}
    writer.write_shard({table: frame for table, frame in tables.items() if len(frame)})
    for part in (_trace(shape, popularity, rng), _similarity(shape, rng) if shape.similarity else ()):
        for shard in part:
            writer.write_shard(shard)
    path = writer.finish(seconds=1.0)
    with store.open_run(path) as run:
        values, vectors = compute(run, parts=parts, tell=tell)
    store.write_metrics(path, values, vectors)
    return path


def _popularity(shape: Shape, rng: np.random.Generator) -> NDArray[np.float64]:
    """(layers, domains, experts) shares of the selections."""
    common = rng.lognormal(0.0, 0.7, (shape.layers, 1, shape.experts))
    own = rng.lognormal(0.0, 0.4, (shape.layers, len(DOMAINS), shape.experts))
    mixed = common * own
    return np.asarray(mixed / mixed.sum(axis=-1, keepdims=True))


def _grid(shape: Shape) -> pl.DataFrame:
    """One row per layer, domain and expert."""
    layers, names, experts = np.meshgrid(
        np.arange(shape.layers), np.arange(len(DOMAINS)), np.arange(shape.experts), indexing="ij"
    )
    return pl.DataFrame(
        {"layer": layers.ravel(), "expert": experts.ravel(), "domain": np.array(DOMAINS)[names.ravel()]}
    )


def _layers(shape: Shape) -> pl.DataFrame:
    rows = [
        LayerInfo(layer, 0, f"model.layers.{layer}.mlp.experts", "Experts", "Router", shape.experts, shape.top_k, 0, 32)
        for layer in range(shape.layers)
    ]
    return pl.DataFrame([vars(row) for row in rows])


def _load(shape: Shape, popularity: NDArray[np.float64], tokens: int) -> pl.DataFrame:
    counts = np.rint(popularity * tokens * shape.top_k).astype(np.int64).ravel()
    return _grid(shape).with_columns(
        pl.lit(0).alias("step"), pl.lit("routed").alias("kind"), pl.lit("prompt").alias("phase"),
        pl.Series("tokens", counts), pl.Series("first_choices", counts // shape.top_k),
        pl.lit(0).alias("first_positions"), pl.Series("gate_sum", counts / shape.top_k),
        pl.Series("gate_square_sum", counts / shape.top_k**2), pl.Series("gate_share_sum", counts / shape.top_k),
        pl.Series("probability_sum", popularity.ravel() * tokens),
    )  # fmt: skip


def _router(shape: Shape, tokens: int) -> pl.DataFrame:
    layers, names = np.meshgrid(np.arange(shape.layers), np.arange(len(DOMAINS)), indexing="ij")
    depth = layers.ravel() / max(shape.layers - 1, 1)
    return pl.DataFrame({"layer": layers.ravel(), "domain": np.array(DOMAINS)[names.ravel()]}).with_columns(
        pl.lit(0).alias("step"), pl.lit("prompt").alias("phase"), pl.lit(tokens).alias("tokens"),
        pl.lit(tokens * shape.top_k).alias("selections"), pl.lit(tokens).alias("logit_tokens"),
        pl.lit(0).alias("nonfinite_tokens"), pl.Series("entropy_sum", (3.0 - depth) * tokens),
        pl.Series("top_probability_sum", (0.2 + 0.2 * depth) * tokens),
        pl.lit(0.6 * tokens).alias("selected_probability_sum"), pl.lit(1.2 * tokens).alias("weight_entropy_sum"),
        pl.lit(0.8 * tokens).alias("first_margin_sum"), pl.lit(0.2 * tokens).alias("boundary_margin_sum"),
        pl.lit(0).alias("boundary_ties"), pl.lit(4.0 * tokens).alias("log_partition_square_sum"),
    )  # fmt: skip


def _histograms(shape: Shape, tokens: int) -> pl.DataFrame:
    parts = []
    weights = np.exp(-((np.arange(20) - 8) ** 2) / 12)
    counts = np.rint(weights / weights.sum() * tokens).astype(np.int64)
    for quantity, top in QUANTITIES.items():
        edges = np.linspace(0, top, 21)
        bins = pl.DataFrame({"lower": edges[:-1], "upper": edges[1:], "tokens": counts})
        parts.append(bins.with_columns(pl.lit(quantity).alias("quantity")))
    places = pl.DataFrame({"layer": range(shape.layers)}).join(pl.DataFrame({"domain": DOMAINS}), how="cross")
    constant = {"step": pl.lit(0), "phase": pl.lit("prompt")}
    return places.join(pl.concat(parts), how="cross").with_columns(**constant)


def _outputs(shape: Shape, popularity: NDArray[np.float64], rng: np.random.Generator) -> pl.DataFrame:
    grid = _grid(shape)
    tokens = np.rint(popularity.ravel() * 1000 * shape.top_k).astype(np.int64) + 1
    largest = rng.lognormal(1.0, 0.7, len(grid))
    largest[min(5, shape.experts - 1)] = 900.0
    return grid.with_columns(
        pl.lit(0).alias("step"), pl.lit("routed").alias("kind"), pl.lit("prompt").alias("phase"),
        pl.Series("tokens", tokens), pl.Series("norm_sum", tokens * 1.0), pl.Series("norm_square_sum", tokens * 1.2),
        pl.Series("gated_norm_sum", tokens * 0.2), pl.Series("gated_norm_square_sum", tokens * 0.1),
        pl.Series("output_max", largest), pl.lit(3).alias("output_max_channel"), pl.lit(0).alias("output_max_sequence"),
        pl.lit(0).alias("output_max_position"), pl.Series("gated_output_max", largest / 2),
        pl.Series("first_routed_output_max", largest * 0.9), pl.lit(3.0).alias("input_max"),
    )  # fmt: skip


def _residual(shape: Shape) -> pl.DataFrame:
    layers = np.arange(shape.layers)
    return pl.DataFrame({"layer": layers, "absolute_max": np.where(layers > 1, 900.0, 6.0)}).with_columns(
        pl.lit(DOMAINS[0]).alias("domain"), pl.lit("prompt").alias("phase"), pl.lit(50).alias("tokens"),
        pl.lit(300.0).alias("norm_sum"), pl.lit(3).alias("channel"), pl.lit(0).alias("sequence"),
        pl.lit(0).alias("position"), pl.lit(0.4).alias("median_there"), pl.lit(8.0).alias("later_max"),
    )  # fmt: skip


def _trace(
    shape: Shape, popularity: NDArray[np.float64], rng: np.random.Generator
) -> Iterator[dict[str, pl.DataFrame]]:
    """Selections of layer after layer, in shards of about a million tokens.

    Ranks are drawn once per token: the largest of popularity x noise, where six tokens of ten keep what the token
    before has. A layer takes half of them from another token, and gives every rank to its own expert of the domain.
    """
    tokens = shape.traced * SEQUENCE
    if not tokens:
        return
    sequences = np.repeat(np.arange(shape.traced), SEQUENCE)
    ranks = _ranks(shape, tokens, rng)
    order = np.argsort(-popularity, axis=2).astype(np.int16)
    parts = []
    for layer in range(shape.layers):
        other = rng.random(tokens) < 0.5
        mixed = np.where(other[:, None], np.roll(ranks, 97 * layer * SEQUENCE + 7 * layer, axis=0), ranks)
        parts.append(
            store.pack_trace(
                layer=layer, sequence=sequences, position=np.tile(np.arange(SEQUENCE), shape.traced),
                ids=order[layer][sequences[:, None] % len(DOMAINS), mixed],
                weights=np.sort(rng.dirichlet(np.ones(shape.top_k), tokens).astype(np.float32))[:, ::-1],
                num_experts=shape.experts,
            )
        )  # fmt: skip
        if len(parts) * tokens >= SHARD or layer == shape.layers - 1:
            yield {"route_chunk": pl.concat(parts)}
            parts = []


def _ranks(shape: Shape, tokens: int, rng: np.random.Generator) -> NDArray[np.int16]:
    """(tokens, k) places in the order of popularity."""
    favour = np.sort(rng.normal(0.0, 0.8, shape.experts))[::-1].astype(np.float32)
    ranks = np.empty((tokens, shape.top_k), np.int16)
    for start in range(0, tokens, 8192):
        part = ranks[start : start + 8192]
        scores = favour + rng.gumbel(size=(len(part), shape.experts)).astype(np.float32)
        part[:] = np.argsort(-scores, axis=1)[:, : shape.top_k]
    keeps = rng.random(tokens) < 0.6
    keeps[::SEQUENCE] = False
    return ranks[np.maximum.accumulate(np.where(keeps, 0, np.arange(tokens)))]


def _similarity(shape: Shape, rng: np.random.Generator) -> Iterator[dict[str, pl.DataFrame]]:
    """Router rows, and the sums of similarity of all pairs, layer after layer."""
    for layer in range(shape.layers):
        rows = (rng.normal(size=(shape.experts, WIDTH)) + rng.normal(size=WIDTH)).astype(np.float32)
        products = rows.astype(float) @ rows.T
        lengths = np.sqrt(np.diag(products))
        cosine = np.clip(products / np.outer(lengths, lengths) + rng.normal(0.0, 0.02, products.shape), -1, 1)
        cosine = (cosine + cosine.T) / 2
        places = pl.DataFrame({"layer": layer, "step": 0, "expert": np.arange(shape.experts)})
        yield {
            "router_row": places.with_columns(weights=pl.Series(list(rows))),
            "expert_similarity": places.with_columns(
                pl.lit(DOMAINS[0]).alias("domain"), pl.lit("prompt").alias("phase"), pl.lit(4096).alias("tokens"),
                pl.Series("output_sum", list(rows)), pl.Series("cosine_sum", list(cosine * 4096)),
                pl.Series("product_sum", list(products * 4096)),
            ),
        }  # fmt: skip
