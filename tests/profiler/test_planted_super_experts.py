"""Super experts that were put into a model are found exactly, and switching them off does what the paper says."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import polars as pl
import pytest
import torch

import profiler
import store
from profiler.ablation import Expert
from profiler.ablation.measure import Ablation, ablate
from profiler.ablation.report import layer_table, verdict
from profiler.headline import compute_and_store
from profiler.metrics.super_experts import forming_layers, massive_activation_layers
from tests.profiler.planted import CHANNEL, PLANTED, counting_batches, planted_model

EXPERTS = [Expert(layer, 0, "routed", expert) for layer, expert, _ in PLANTED]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[store.Run]:
    model, folder = planted_model(), tmp_path_factory.mktemp("planted")
    with profiler.watch(model, store=folder, name="planted", level="activations,attention") as session, torch.no_grad():
        for batch in counting_batches():
            session.label(domains=batch.domains)
            model(input_ids=torch.from_numpy(batch.input_ids), attention_mask=torch.from_numpy(batch.attention_mask))
    assert session.path is not None
    compute_and_store(session.path)
    with store.open_run(session.path) as opened:
        yield opened


@pytest.fixture(scope="module")
def ablation() -> Ablation:
    return ablate(planted_model(), counting_batches, experts=EXPERTS, controls=5)


@pytest.mark.parametrize("rule", ["paper", "code"])
@pytest.mark.parametrize("tokens", ["all", "first_routed"])
def test_exactly_these_are_found(run: store.Run, rule: str, tokens: str) -> None:
    parameters = f'{{"rule": "{rule}", "tokens": "{tokens}"}}'
    found = run.metrics("super_experts").filter((pl.col("parameters") == parameters) & pl.col("layer").is_not_null())
    assert sorted(found.select("layer", "expert").rows()) == [(layer, expert) for layer, expert, _ in PLANTED]


def test_their_output_stands_in_the_planted_channel_at_position_0(run: store.Run) -> None:
    table = run.table("expert_output")
    for layer, expert, size in PLANTED:
        top = (
            table.filter((pl.col("layer") == layer) & (pl.col("expert") == expert))
            .sort("output_max")
            .row(-1, named=True)
        )
        assert (top["output_max_channel"], top["output_max_position"]) == (CHANNEL, 0)
        assert top["output_max"] == pytest.approx(size, rel=0.05)  # the norm leaves a little to the other channels
    others = table.join(
        pl.DataFrame([one[:2] for one in PLANTED], schema={"layer": pl.Int32, "expert": pl.Int32}, orient="row"),
        on=["layer", "expert"],
        how="anti",
    )
    assert len(others) > 400
    assert others["output_max"].max() < 5


def test_massive_activations_form_where_they_stand(run: store.Run) -> None:
    table = run.table("residual").group_by("layer").agg(pl.all().sort_by("absolute_max").last()).sort("layer")
    arguments = {
        "residual_max": table["absolute_max"].to_numpy(),
        "residual_median": table["median_there"].to_numpy(),
        "layers": table["layer"].to_list(),
    }
    assert massive_activation_layers(**arguments) == list(range(1, 12))
    assert forming_layers(**arguments) == [1, 2, 3]
    assert set(table.filter(pl.col("layer") > 0)["channel"]) == {CHANNEL}


def test_later_layers_look_at_position_0(run: store.Run) -> None:
    table = run.table("attention").group_by("layer").agg(pl.col("queries").sum(), pl.col("sink_sum").list.sum().sum())
    mass = dict(table.select("layer", pl.col("sink_sum") / pl.col("queries") / 2).iter_rows())
    assert all(mass[layer] > 0.999 for layer in range(2, 12))
    # Before they form, attention is even: a query at position t gives 1 / (t + 1) to each.
    lengths = [int(row.sum()) for batch in counting_batches() for row in batch.attention_mask]
    even = sum((1 / np.arange(2, length + 1)).sum() for length in lengths) / sum(length - 1 for length in lengths)
    assert mass[0] == pytest.approx(even, rel=1e-5)


def test_switching_them_off_breaks_the_model_and_the_controls_do_not(ablation: Ablation) -> None:
    assert verdict(ablation).more_than_controls is True
    assert ablation.ablated.ratio.value > 10
    assert len(ablation.controls) == 10
    assert all(0.9 < control.ratio.value < 1.1 for control in ablation.controls)


def test_massive_activations_and_sinks_go_with_them(ablation: Ablation) -> None:
    table = layer_table(ablation)
    assert table["massive"].to_list() == [False] + [True] * 11
    assert not table["massive_ablated"].any()
    assert table["sink_decay"][0] == table["sink_decay"][1] == 0.0
    assert (table["sink_decay"][2:] > 0.9).all()
    assert table["control_sink_decay"].abs().max() < 1e-3  # the controls leave the sinks alone


def test_each_one_alone(run: store.Run) -> None:
    # The later ones read what the first one wrote: without it there is nothing left, without the last most remains.
    model = planted_model()
    first = layer_table(ablate(model, counting_batches, experts=EXPERTS[:1], controls=0))
    last = layer_table(ablate(model, counting_batches, experts=EXPERTS[2:], controls=0))
    assert first["residual_max_ablated"][3] < 5
    assert last["residual_max_ablated"][3] == pytest.approx(last["residual_max"][2], rel=1e-3)
    assert last["sink_decay"].abs().max() < 1e-3


def test_other_experts_do_not_matter(ablation: Ablation) -> None:
    found = ablate(planted_model(), counting_batches, experts=[Expert(5, 0, "routed", 3)], controls=5)
    assert verdict(found).more_than_controls is False
    assert verdict(found).sentence.startswith("No: switching off 1 expert multiplies the perplexity by")
