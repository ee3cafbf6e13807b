"""A small run that holds every table: built through the store, without a model."""

from __future__ import annotations

import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

import store
from store import LayerInfo, Progress, RunInfo, RunWriter

LAYERS = (1, 2, 3, 5)
NUM_LAYERS = 6
EXPERTS = 16
TOP_K = 2
TOKENS = 80
DOMAINS = ("code", "deutsch", "日本語")
HOSTILE = "<script>window.hacked = true</script><img src=x onerror='window.hacked = true'>"
SUPER_EXPERT = (2, 5)

Frames = dict[str, pl.DataFrame]


def selections(sequences: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """ids (layers, sequences, tokens, k) that repeat over neighbours and differ by domain; weights alike."""
    rng = np.random.default_rng(seed)
    shape = (len(LAYERS), sequences, TOKENS, TOP_K)
    ids = np.empty(shape, int)
    for layer in range(len(LAYERS)):
        for sequence in range(sequences):
            domain = sequence % len(DOMAINS)
            popularity = np.roll(np.linspace(3.0, 0.2, EXPERTS - 1), 4 * domain + layer)
            for token in range(TOKENS):
                if token and rng.random() < 0.6:
                    ids[layer, sequence, token] = ids[layer, sequence, token - 1]
                else:
                    # The last expert is never chosen: a dead expert in every layer.
                    ids[layer, sequence, token] = rng.choice(
                        EXPERTS - 1, TOP_K, replace=False, p=popularity / popularity.sum()
                    )
    first = rng.uniform(0.5, 0.95, shape[:-1])
    return ids, np.stack([first, 1 - first], axis=-1)


def tables(
    sequences: int = 9, *, text: bool = True, activations: bool = True, hostile: bool = False, start: int = 0
) -> Frames:
    """The frames of one shard of ``sequences`` sequences, numbered from ``start``."""
    ids, weights = selections(sequences, seed=start)
    numbers = np.arange(start, start + sequences)
    domains = [DOMAINS[number % len(DOMAINS)] for number in numbers]
    if hostile:
        domains = [HOSTILE if domain == "code" else domain for domain in domains]
    frames = {
        "layer": _layers(),
        "sequence": pl.DataFrame(
            {
                "sequence": numbers,
                "domain": domains,
                "source": [f"{HOSTILE if hostile else 'file'} {n}" for n in numbers],
                "tokens": [TOKENS] * sequences,
                "prompt_tokens": [TOKENS] * sequences,
            }
        ),
        "route_chunk": _chunks(ids, weights, numbers),
        "expert_load": _load(ids, weights, domains),
        "router_load": _router(domains),
        "router_histogram": _histograms(domains),
        "check": _checks() if start == 0 else pl.DataFrame(),
    }
    if text:
        frames |= _text(numbers, hostile=hostile)
    if activations:
        frames |= {"expert_output": _outputs(domains), "residual": _residual(domains), "router_row": _router_rows()}
    return {name: frame for name, frame in frames.items() if len(frame)}


def info(*, text: bool = True, activations: bool = True, sequences: int = 9, model: str = "tiny-moe") -> RunInfo:
    """Provenance that belongs to :func:`tables`."""
    return RunInfo(
        model=model,
        model_class="TinyMoeForCausalLM",
        num_layers=NUM_LAYERS,
        hidden_size=32,
        dtype="float32",
        device="cpu",
        backend="grouped_mm",
        origin="collect",
        levels="routing,activations" if activations else "routing",
        text_kept=text,
        sequences=sequences,
        tokens=sequences * TOKENS,
    )


def finished(directory: Path, name: str = "synthetic", *, metrics: bool = True, **options: Any) -> Path:
    """A finished run, with derived metrics: made once for the same options, and copied."""
    made = _made(name, metrics, tuple(sorted(options.items())))
    directory.mkdir(parents=True, exist_ok=True)
    for file in made.iterdir():
        shutil.copyfile(file, directory / file.name)
    return directory / f"{name}.duckdb"


@cache
def _made(name: str, metrics: bool, given: tuple[tuple[str, Any], ...]) -> Path:
    """A folder with the files of a finished run; it goes when the process ends."""
    directory, options = Path(tempfile.mkdtemp(dir=_FOLDER.name)), dict(given)
    text, activations = options.get("text", True), options.get("activations", True)
    model = HOSTILE if options.get("hostile") else "tiny-moe"
    writer = RunWriter.create(directory, name, info(text=text, activations=activations, model=model))
    writer.write_shard(tables(**options))
    path = writer.finish(seconds=1.5)
    if metrics:
        store.write_metrics(path, derived(activations=activations))
    return directory


_FOLDER = tempfile.TemporaryDirectory(prefix="moescope-runs-")


def live(directory: Path, name: str = "growing", *, shards: int = 1) -> RunWriter:
    """A run that is being collected by this process."""
    writer = RunWriter.create(directory, name, info())
    for shard in range(shards):
        writer.write_shard(tables(3, start=3 * shard))
    writer.write_progress(
        Progress(tokens=240 * shards, token_budget=10_000, tokens_per_second=120.0, seconds_left=75.0)
    )
    return writer


def _layers() -> pl.DataFrame:
    return pl.DataFrame(
        [
            vars(
                LayerInfo(
                    layer, 0, f"model.layers.{layer}.mlp.experts", "TinyExperts", "TinyRouter", EXPERTS, TOP_K, 1, 64
                )
            )
            for layer in LAYERS
        ]
    )


def _chunks(ids: np.ndarray, weights: np.ndarray, numbers: np.ndarray) -> pl.DataFrame:
    sequence, position = np.repeat(numbers, TOKENS), np.tile(np.arange(TOKENS), len(numbers))
    return pl.concat(
        [
            store.pack_trace(
                layer=layer,
                sequence=sequence,
                position=position,
                ids=ids[axis].reshape(-1, TOP_K),
                weights=weights[axis].reshape(-1, TOP_K),
                num_experts=EXPERTS,
            )
            for axis, layer in enumerate(LAYERS)
        ]
    )


def _load(ids: np.ndarray, weights: np.ndarray, domains: list[str]) -> pl.DataFrame:
    rows = []
    for axis, layer in enumerate(LAYERS):
        for domain in sorted(set(domains)):
            chosen = [index for index, name in enumerate(domains) if name == domain]
            part, mass = ids[axis, chosen].reshape(-1, TOP_K), weights[axis, chosen].reshape(-1, TOP_K)
            for expert in range(EXPERTS):
                hit = part == expert
                if hit.any():
                    rows.append(
                        {
                            "layer": layer,
                            "step": 0,
                            "expert": expert,
                            "kind": "routed",
                            "domain": domain,
                            "phase": "prompt",
                            "tokens": int(hit.sum()),
                            "first_choices": int(hit[:, 0].sum()),
                            "first_positions": 0,
                            "gate_sum": float(mass[hit].sum()),
                            "gate_square_sum": float((mass[hit] ** 2).sum()),
                            "gate_share_sum": float(mass[hit].sum()),
                        }
                    )
            rows.append(
                {
                    "layer": layer,
                    "step": 0,
                    "expert": 0,
                    "kind": "shared",
                    "domain": domain,
                    "phase": "prompt",
                    "tokens": len(part),
                }
            )
    return pl.DataFrame(rows)


def _router(domains: list[str]) -> pl.DataFrame:
    rows = []
    for depth, layer in enumerate(LAYERS):
        for domain in sorted(set(domains)):
            tokens = domains.count(domain) * TOKENS
            rows.append(
                {
                    "layer": layer,
                    "step": 0,
                    "domain": domain,
                    "phase": "prompt",
                    "tokens": tokens,
                    "selections": tokens * TOP_K,
                    "logit_tokens": tokens,
                    "nonfinite_tokens": 0,
                    "entropy_sum": (2.0 - 0.2 * depth) * tokens,
                    "top_probability_sum": (0.4 + 0.05 * depth) * tokens,
                    "selected_probability_sum": 0.6 * tokens,
                    "weight_entropy_sum": 0.5 * tokens,
                    "first_margin_sum": 0.8 * tokens,
                    "boundary_margin_sum": 0.3 * tokens,
                    "boundary_ties": 0,
                    "log_partition_square_sum": 4.0 * tokens,
                }
            )
    return pl.DataFrame(rows)


def _histograms(domains: list[str]) -> pl.DataFrame:
    rows = []
    for depth, layer in enumerate(LAYERS):
        for quantity, top in (
            ("entropy", 2.8),
            ("top_probability", 1.0),
            ("selected_probability", 1.0),
            ("first_margin", 4.0),
            ("boundary_margin", 2.0),
        ):
            edges = np.linspace(0, top, 21)
            counts = np.exp(-((np.arange(20) - 8 - depth) ** 2) / 12)
            for domain in sorted(set(domains)):
                spread = (counts / counts.sum() * domains.count(domain) * TOKENS).round().astype(int)
                rows += [
                    {
                        "layer": layer,
                        "step": 0,
                        "domain": domain,
                        "phase": "prompt",
                        "quantity": quantity,
                        "lower": low,
                        "upper": high,
                        "tokens": int(count),
                    }
                    for low, high, count in zip(edges[:-1], edges[1:], spread, strict=True)
                ]
    return pl.DataFrame(rows)


def _checks() -> pl.DataFrame:
    rows = [
        {
            "name": "layers_seen",
            "status": "pass",
            "value": 4.0,
            "tolerance": 4.0,
            "detail": "every MoE layer was seen on every forward",
        }
    ]
    rows += [
        {
            "name": "output_recomputed",
            "layer": layer,
            "step": 0,
            "status": "pass",
            "value": 1e-7,
            "tolerance": 1e-5,
            "detail": "layer output recomputed from the captured selections",
        }
        for layer in LAYERS
    ]
    rows.append({"name": "bit_identical", "status": "skipped", "detail": "not checked by watch"})
    return pl.DataFrame(rows, infer_schema_length=None)


def _outputs(domains: list[str]) -> pl.DataFrame:
    rng = np.random.default_rng(7)
    rows = []
    for layer in LAYERS:
        for kind, count in (("routed", EXPERTS - 1), ("shared", 1)):
            for expert in range(count):
                largest = (
                    820.0 if (layer, expert, kind) == (*SUPER_EXPERT, "routed") else float(rng.lognormal(1.0, 0.7))
                )
                rows.append(
                    {
                        "layer": layer,
                        "step": 0,
                        "expert": expert,
                        "kind": kind,
                        "domain": domains[0],
                        "phase": "prompt",
                        "tokens": 50,
                        "norm_sum": 50.0,
                        "norm_square_sum": 60.0,
                        "gated_norm_sum": 25.0,
                        "gated_norm_square_sum": 15.0,
                        "output_max": largest,
                        "output_max_channel": 11,
                        "output_max_sequence": 0,
                        "output_max_position": 0,
                        "gated_output_max": largest / 2,
                        "first_routed_output_max": largest * 0.9,
                        "input_max": 3.0,
                    }
                )
    return pl.DataFrame(rows)


def _residual(domains: list[str]) -> pl.DataFrame:
    rows = []
    for layer in range(NUM_LAYERS):
        massive = 2 <= layer < NUM_LAYERS - 1
        rows.append(
            {
                "layer": layer,
                "domain": domains[0],
                "phase": "prompt",
                "tokens": 50,
                "norm_sum": 300.0,
                "channel": 11,
                "sequence": 0,
                "absolute_max": 900.0 if massive else 6.0 + layer,
                "position": 0,
                "median_there": 0.4,
                "later_max": 8.0 + layer,
            }
        )
    return pl.DataFrame(rows)


def _router_rows() -> pl.DataFrame:
    rows = np.random.default_rng(11).normal(size=(len(LAYERS), EXPERTS, 32))
    return pl.concat(
        pl.DataFrame({"expert": range(EXPERTS), "weights": rows[axis].tolist()}).with_columns(
            layer=pl.lit(layer), step=pl.lit(0)
        )
        for axis, layer in enumerate(LAYERS)
    )


def _text(numbers: np.ndarray, *, hostile: bool) -> Frames:
    words = [
        "<s>",
        " the",
        " of",
        " and",
        "\n",
        " Ü",
        "日"[:1],
        " def",
        " return",
        " =",
        " x",
        HOSTILE if hostile else " plain",
    ]
    pieces = [word.encode() for word in words]
    # Two tokens that are one character together.
    pieces += ["本".encode()[:2], "本".encode()[2:]]
    rng = np.random.default_rng(3)
    rows = []
    for number in numbers:
        ids = rng.integers(1, 11, TOKENS)
        ids[0], ids[3], ids[6:8] = 0, 11, (12, 13)
        rows.append(
            {"sequence": int(number), "start": 0, "token_ids": ids.tolist(), "special": [i == 0 for i in range(TOKENS)]}
        )
    vocabulary = pl.DataFrame({"token_id": range(len(pieces)), "bytes": pieces})
    return {"sequence_token": pl.DataFrame(rows), "vocabulary": vocabulary}


def derived(*, activations: bool = True) -> pl.DataFrame:
    """Rows of every headline metric that the pages read; the values are made up but lie where real ones would."""
    rows: list[dict[str, Any]] = []
    tokens, sequences = 720, 9
    for length, value in ((4, 0.66), (16, 0.53), (64, 0.47)):
        for control, lost in (("observed", 0.0), ("shuffled_in_sequence", 0.12), ("shuffled", 0.15), ("uniform", 0.25)):
            at = {"at": float(length), "control": control, "tokens": tokens, "sequences": sequences}
            rows.append(
                {"metric": "srp", "value": value - lost, "low": value - lost - 0.01, "high": value - lost + 0.012, **at}
            )
            rows.append({"metric": "router_size", "value": 1.0 + lost * 5, **at})
        rows.append(
            {
                "metric": "srp",
                "value": 2 / 9,
                "at": float(length),
                "control": "lower_bound",
                "tokens": tokens,
                "sequences": sequences,
            }
        )
        for axis, layer in enumerate(LAYERS):
            at = {"at": float(length), "layer": layer, "step": 0}
            rows.append({"metric": "srp", "value": value + 0.02 * axis, **at})
            rows.append({"metric": "router_size", "value": 1.1, **at})
            rows += [
                {"metric": "srp", "value": min(0.25 + value * expert / EXPERTS, 1.0), "expert": expert, **at}
                for expert in range(EXPERTS)
            ]
    for policy, gain in (("sch", 0.1), ("lru", 0.0), ("lfu", -0.02), ("belady", 0.16)):
        for shared, most in ((True, EXPERTS * len(LAYERS)), (False, EXPERTS)):
            parameters = ({"segment_length": 16} if policy == "sch" else {}) | ({"shared": True} if shared else {})
            for control, lost in (("observed", 0.0), ("shuffled", 0.1), ("uniform", 0.2)):
                for size in np.unique(np.linspace(1, most, 16).astype(int)):
                    value = float(
                        np.clip((size / most) ** 0.6 + gain * (1 - size / most) - lost * (1 - size / most), 0, 1)
                    )
                    ends = {"low": max(value - 0.01, 0), "high": min(value + 0.01, 1)} if shared else {}
                    rows.append(
                        {
                            "metric": f"hit_rate_{policy}",
                            "parameters": json.dumps(parameters, sort_keys=True),
                            "at": float(size),
                            "value": value,
                            "control": control,
                            "tokens": tokens,
                            "sequences": sequences,
                            **ends,
                        }
                    )
        segment = json.dumps({"segment_length": 16} if policy == "sch" else {})
        rows += [
            {
                "metric": f"hit_rate_{policy}",
                "parameters": segment,
                "at": float(size),
                "value": (size / EXPERTS) ** 0.6,
                "layer": layer,
                "step": 0,
            }
            for layer in LAYERS
            for size in range(1, EXPERTS + 1)
        ]
    for rule, choice in (
        (("paper", "all"), ("paper", "first_routed"), ("code", "all"), ("code", "first_routed")) if activations else ()
    ):
        parameters = json.dumps({"rule": rule, "tokens": choice}, sort_keys=True)
        rows.append({"metric": "super_experts", "parameters": parameters, "value": 82.0})
        rows.append(
            {
                "metric": "super_experts",
                "parameters": parameters,
                "layer": SUPER_EXPERT[0],
                "step": 0,
                "expert": SUPER_EXPERT[1],
                "value": 820.0 if choice == "all" else 738.0,
            }
        )
    for layer in LAYERS:
        for control, value in (("observed", 0.4), ("shuffled", 0.1)):
            rows.append(
                {
                    "metric": "first_choice_repeat",
                    "layer": layer,
                    "step": 0,
                    "control": control,
                    "at": 1.0,
                    "value": value,
                }
            )
            rows.append(
                {
                    "metric": "mean_overlap",
                    "layer": layer,
                    "step": 0,
                    "control": control,
                    "at": 1.0,
                    "value": value + 0.2,
                }
            )
    complete = [{"parameters": "{}", "control": "observed", "version": 1, **row} for row in rows]
    return pl.DataFrame(complete, infer_schema_length=None)
