"""Axes, chained steps, memory and neighbours as headline metrics: what was planted is found, controls lack it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import store
from profiler.headline.axes import MOST_VALUES, axis_distance_rows, axis_names, axis_of
from profiler.headline.layer_memory import layer_memory_rows, step_repeat_rows
from profiler.headline.neighbours import neighbour_rows
from profiler.headline.subject import Subject
from store import LayerInfo, RunInfo, RunWriter, pack_trace

EXPERTS, LENGTH, SEQUENCES = 8, 40, 160
STEPS = (0, 250, 500, 1000)
"""Values of the timestep: of layer 0, it decides the half of the experts that a token chooses from."""


def planted(directory: Path, *, labels: bool = True) -> store.Run:
    """Layer 0 follows the timestep; layer 1 calls its experts twice, the second time mostly the same; layer 2 sums the
    first choices of the two entries before it."""
    rng = np.random.default_rng(0)
    late = np.repeat(np.arange(SEQUENCES) % 4 >= 2, LENGTH)
    first = rng.integers(0, EXPERTS // 2, SEQUENCES * LENGTH) + np.where(late, EXPERTS // 2, 0)
    once = rng.integers(0, EXPERTS, len(first))
    again = np.where(rng.random(len(first)) < 0.75, once, rng.integers(0, EXPERTS, len(first)))
    entries = {(0, 0): first, (1, 0): once, (1, 1): again, (2, 0): (once + again) % EXPERTS}
    chunks = [
        pack_trace(
            layer=layer, step=step, sequence=np.repeat(np.arange(SEQUENCES), LENGTH),
            position=np.tile(np.arange(LENGTH), SEQUENCES), ids=ids[:, None].astype(np.int16),
            weights=np.ones((len(ids), 1), np.float32), num_experts=EXPERTS,
        )
        for (layer, step), ids in entries.items()
    ]  # fmt: skip
    layers = [vars(LayerInfo(layer, step, f"layers.{layer}", "E", "R", EXPERTS, 1, 0, 4)) for layer, step in entries]
    numbers = list(range(SEQUENCES))
    shard: dict[str, Any] = {
        "layer": pl.DataFrame(layers),
        "route_chunk": pl.concat(chunks),
        "sequence": pl.DataFrame({"sequence": numbers, "tokens": [LENGTH] * SEQUENCES, "domain": ["a"] * SEQUENCES}),
    }
    if labels:
        shard["sequence_label"] = pl.DataFrame(
            {
                "sequence": numbers * 2,
                "axis": ["timestep"] * SEQUENCES + ["class"] * SEQUENCES,
                "value": [str(STEPS[n % 4]) for n in numbers] + ["<b>cat" if n % 3 else "dog" for n in numbers],
            }
        )
    writer = RunWriter.create(directory, "planted", RunInfo(model="m", num_layers=3))
    writer.write_shard(shard)
    return store.open_run(writer.finish())


def distances(
    rows: list[dict[str, Any]], axis: str, layer: int, control: str = "observed"
) -> dict[str, dict[str, Any]]:
    """Rows of one axis and layer (step 0) by value of the axis, "" = the whole axis, in the order of the values."""
    found = [
        (json.loads(row["parameters"]), row)
        for row in rows
        if (row["layer"], row["step"], row.get("control", "observed")) == (layer, 0, control)
    ]
    mine = [(named.get("place", -1), named.get("value", ""), row) for named, row in found if named["axis"] == axis]
    return {value: row for _, value, row in sorted(mine, key=lambda one: one[0])}


def test_the_axis_that_decides_is_told_from_those_that_do_not(tmp_path: Path) -> None:
    run = planted(tmp_path)
    assert axis_names(run) == ["class", "timestep", "position"]
    assert axis_of(run, "class").names == ("<b>cat", "dog")
    rows = axis_distance_rows(Subject(run))
    seen, chance = (distances(rows, "timestep", 0, control) for control in ("observed", "exchanged"))
    assert list(seen) == ["", "0", "250", "500", "1000"]  # as numbers, not as words
    for value in seen:  # half of the selections would have to go to the other half of the experts
        assert seen[value]["value"] == pytest.approx(0.5, abs=0.01)
        assert seen[value]["low"] > chance[value]["high"] > chance[value]["value"]
        assert chance[value]["value"] < 0.25
    assert seen["250"]["tokens"] == SEQUENCES // 4 * LENGTH
    for axis, layer in (("class", 0), ("position", 0), ("timestep", 1), ("timestep", 2)):
        whole, nothing = (distances(rows, axis, layer, control)[""] for control in ("observed", "exchanged"))
        assert whole["value"] < 2 * nothing["value"] < 0.3, (axis, layer)


def test_positions_and_many_values_come_in_ranges(tmp_path: Path) -> None:
    run = planted(tmp_path, labels=False)
    assert axis_names(run) == ["position"]
    axis = axis_of(run, "position")
    assert axis.names[:3] == ("0", "1 to 3", "4 to 5")
    assert axis.names[-1].endswith(f"to {LENGTH - 1}")
    place = axis.of_tokens(np.arange(2), np.array([LENGTH, 3]))
    assert place.tolist() == [
        next(at for at, name in reversed(list(enumerate(axis.names))) if int(name.split()[0]) <= position)
        for position in (*range(LENGTH), 0, 1, 2)
    ]
    assert axis_of(run, "nothing").names == ()


def test_many_numbers_become_ranges_and_many_words_the_frequent_ones(tmp_path: Path) -> None:
    writer = RunWriter.create(tmp_path, "many", RunInfo(model="m", num_layers=1))
    sigma = [f"{number / 7:.4f}" for number in range(200)]
    words = ["often"] * 100 + [f"word {number}" for number in range(100)]
    labels = {"sequence": [*range(200)] * 2, "axis": ["sigma"] * 200 + ["word"] * 200, "value": sigma + words}
    writer.write_shard({"sequence_label": pl.DataFrame(labels)})
    run = store.open_run(writer.finish())
    axis = axis_of(run, "sigma")
    assert len(axis.names) == 16
    assert axis.names[0] == "0 to 1.5714"
    places = [axis.place[number] for number in range(200)]
    assert places == sorted(places)  # in the order of the numbers
    assert max(np.bincount(places)) <= 14
    common = axis_of(run, "word")
    assert len(common.names) == MOST_VALUES
    assert "often" in common.names
    assert common.of_sequences(np.array([0, 199])).tolist()[0] == common.names.index("often")


def test_steps_repeat_and_two_layers_remember_what_was_planted(tmp_path: Path) -> None:
    run = planted(tmp_path, labels=False)
    rows = step_repeat_rows(Subject(run))
    assert [(row["layer"], row["step"], row.get("control", "observed")) for row in rows] == [
        (1, 1, "observed"), (1, 1, "popularity"),
    ]  # fmt: skip
    trace = run.selections()
    assert rows[0]["value"] == pytest.approx(float(np.mean(trace.ids[1] == trace.ids[2])))
    assert rows[0]["low"] < 0.75 + 0.25 / EXPERTS < rows[0]["high"]
    assert rows[1]["value"] == pytest.approx(1 / EXPERTS, abs=0.01)
    memory = {(row["layer"], row["step"], row["control"]): row["value"] for row in layer_memory_rows(Subject(run))}
    assert memory[2, 0, "observed"] > 1.0  # the sum needs both calls
    assert memory[2, 0, "exchanged"] < 0.2
    assert memory[1, 1, "observed"] < 2 * memory[1, 1, "exchanged"]
    assert neighbour_rows(Subject(run)) == []


def test_neighbours_from_the_sums_of_a_run(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    first = rng.normal(size=(4, 32))
    outputs = {0: first, 1: rng.normal(size=(4, 32)), 3: np.roll(first, 1, axis=0)}
    outputs[1][2] = 3 * first[0]
    writer = RunWriter.create(tmp_path, "sums", RunInfo(model="m", num_layers=4))
    writer.write_shard(
        {
            "layer": pl.DataFrame([vars(LayerInfo(layer, 0, "m", "E", "R", 4, 1, 0, 4)) for layer in outputs]),
            "expert_vector": pl.concat(
                pl.DataFrame(
                    {"expert": range(4), "tokens": [tokens] * 4, "output_sum": (share * tokens * rows / 10).tolist()}
                ).with_columns(layer=pl.lit(layer), step=pl.lit(0), kind=pl.lit("routed"), domain=pl.lit(domain),
                               phase=pl.lit("prompt"))
                for layer, rows in outputs.items()
                for domain, tokens, share in (("a", 10, 1.0), ("b", 30, 0.5))
            ),
        }
    )  # fmt: skip
    rows = {
        (row["layer"], row["control"]): row["value"] for row in neighbour_rows(Subject(store.open_run(writer.finish())))
    }
    assert sorted({layer for layer, _ in rows}) == [1, 3]
    cosines = [max(a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a in first) for b in outputs[1]]
    assert rows[1, "observed"] == pytest.approx(np.mean(cosines), abs=1e-5)
    assert rows[1, "observed"] > rows[1, "shuffled"]
