"""What several frames share: the MoE layers of a run, their names, and phases."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

import store

LAYER_COLUMNS = {"layer": pl.Int32, "step": pl.Int32, "label": pl.String}


def layer_label(layer: int, step: int = 0) -> str:
    """The name of a MoE layer on an axis: its decoder-layer index, and the step where the layer has several."""
    return str(layer) if step == 0 else f"{layer}.{step}"


def parse_layer(label: str) -> tuple[int, int]:
    """The reverse of :func:`layer_label`."""
    layer, _, step = label.partition(".")
    return int(layer), int(step or 0)


def layer_labels(run: store.Run) -> list[str]:
    """The names of all MoE layers, in the order of a trace's axis 0."""
    return [layer_label(layer.layer, layer.step) for layer in run.layers]


def layer_grid(layers: Sequence[store.LayerInfo]) -> pl.DataFrame:
    """One row per routed expert of every MoE layer: layer, step, label, expert, num_experts, top_k."""
    rows = [
        (layer.layer, layer.step, layer_label(layer.layer, layer.step), layer.num_experts, layer.top_k)
        for layer in layers
    ]
    schema = {**LAYER_COLUMNS, "num_experts": pl.Int32, "top_k": pl.Int32}
    each = pl.DataFrame(rows, schema=schema, orient="row").filter(pl.col("num_experts") > 0)
    each = each.with_columns(pl.int_ranges(0, "num_experts", dtype=pl.Int32).alias("expert")).explode("expert")
    return each.select(*LAYER_COLUMNS, "expert", "num_experts", "top_k")


def with_label(frame: pl.DataFrame) -> pl.DataFrame:
    """The frame with a column ``label`` made from ``layer`` and ``step``."""
    name = pl.col("layer").cast(pl.String)
    step = pl.col("step").fill_null(0)
    return frame.with_columns(pl.when(step == 0).then(name).otherwise(name + "." + step.cast(pl.String)).alias("label"))


def phases(run: store.Run) -> list[str]:
    """The phases that the run saw, prompt before decode."""
    found = set(run.table("router_load")["phase"].to_list()) | set(run.table("expert_load")["phase"].to_list())
    return [phase for phase in ("prompt", "decode") if phase in found]


def select(frame: pl.DataFrame, *, domain: str | None = None, phase: str | None = None) -> pl.DataFrame:
    """The rows of one domain and one phase; None keeps all."""
    if domain is not None:
        frame = frame.filter(pl.col("domain") == domain)
    if phase is not None:
        frame = frame.filter(pl.col("phase") == phase)
    return frame


def most(values: pl.Series) -> float:
    """The largest value; 0 where there is none."""
    largest = values.drop_nulls().max()
    return float(largest) if isinstance(largest, int | float) else 0.0
