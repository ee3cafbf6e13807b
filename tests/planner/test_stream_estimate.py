"""How far plans turn the residual stream: the sums' figures against every token of a tiny model, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from numpy.testing import assert_allclose

import profiler
import store
from compressor.edits.quantize import to_grid
from compressor.plan import (
    DropLayer,
    DropStep,
    ExpertBits,
    FactorGroup,
    FactorLayer,
    FactorStep,
    MergeGroup,
    MergeLayer,
    MergeStep,
    QuantizeLayer,
    QuantizeStep,
    SlimExpert,
    SlimLayer,
    SlimStep,
    Source,
    Step,
)
from planner.estimate.stream import KINDS, Turned, stream_turns
from planner.task import Task
from tests.compressor.edit_plans import plan
from tests.planner.collected import collected, task
from tests.profiler.capture.tiny import build
from tests.profiler.recorders.tokenwise import Array, LayerTokens, Tokenwise, observe, play

LAYER, OTHER = 0, 1
WIDTHS: tuple[Any, ...] = (2, 3, 4, 8)


def short(family: str = "qwen2_moe") -> Any:
    """Two layers of eight experts, two per token; qwen2_moe with a shared expert that has a gate."""
    types = {"layer_types": ["full_attention"] * 2} if family == "qwen2_moe" else {}
    return build(family, num_hidden_layers=2, **types)


@dataclass
class Case:
    """A run of every level that prices, with every token in its samples, and what happened token by token."""

    model: Any
    seen: Tokenwise
    task: Task

    @property
    def source(self) -> Source:
        return self.task.source

    def turns(self, *steps: Step, task: Task | None = None) -> dict[int, Turned]:
        found = stream_turns(plan(self.source, *steps), task or self.task)
        assert found is not None
        return found

    def parts(self, layer: int = LAYER, where: Any = None) -> Array:
        """(experts,) mean over tokens of the squared gated output as a part of the squared stream."""
        own, of = self.seen.layers[layer], self.seen.where() if where is None else where
        square = (own.gate[..., None] * own.output).__pow__(2).sum(-1) / own.stream[:, None]
        parts: Array = own.dense(square, of).sum(0) / of.sum()
        return parts


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    model, folder = short(), tmp_path_factory.mktemp("stream")
    level = {"level": "activations,similarity,errors", "similarity_every": 1, "errors_every": 1}
    with profiler.watch(model, store=folder, name="tiny", **level) as session:  # type: ignore[arg-type]
        play(model, session)
    assert session.path is not None
    return Case(model, observe(model), task(store.open_run(session.path)))


def _weights(case: Case, layer: int, expert: int) -> dict[str, torch.Tensor]:
    """Projections (outputs, inputs) of a routed expert, in float32."""
    own = case.seen.layers[layer].layer.experts
    gate, up = own.gate_up_proj[expert].detach().chunk(2, dim=0)
    return {"gate": gate, "up": up, "down": own.down_proj[expert].detach()}


def _run(weights: dict[str, torch.Tensor], inputs: Array) -> Array:
    """(tokens, hidden) of a SwiGLU expert, written down again."""
    gate, up, down = (weights[part].double().numpy() for part in ("gate", "up", "down"))
    first = inputs @ gate.T
    result: Array = (first / (1 + np.exp(-first)) * (inputs @ up.T)) @ down.T
    return result


def _narrow(weights: dict[str, torch.Tensor], bits: ExpertBits, step: QuantizeStep) -> dict[str, torch.Tensor]:
    widths = {part: bits.of(part) for part in weights}  # type: ignore[arg-type]
    return {
        part: matrix if (width := widths[part]) is None else to_grid(matrix, width, step).values()
        for part, matrix in weights.items()
    }


def _quantize(case: Case, experts: tuple[ExpertBits, ...], layer: int = LAYER, **more: Any) -> QuantizeStep:
    (group,) = set(case.task.run.table("expert_grid").filter(kind=experts[0].role)["group_size"])
    step = {"method": "test", "form": "dense", "group_size": group, **more}
    return QuantizeStep(layers=(QuantizeLayer(layer=layer, experts=experts),), **step)  # type: ignore[arg-type]


def _drop(*experts: int, layer: int = LAYER) -> DropStep:
    return DropStep(method="test", form="per_layer", layers=(DropLayer(layer=layer, experts=experts),))


def _slots(own: LayerTokens, expert: int) -> tuple[Array, Array, Array]:
    """Inputs (n, hidden), gate weights (n,) and squared streams (n,) of the tokens that chose an expert."""
    token, slot = np.nonzero(own.ids == expert)
    return own.inputs[token], own.gate[token, slot], own.stream[token]


def test_narrower_weights_of_all_experts(case: Case) -> None:
    """Each expert's relative error times its part of the stream, exactly; and near what really happens."""
    own = case.seen.layers[LAYER]
    experts = tuple(ExpertBits(expert=e, gate=w, up=w, down=w) for e, w in enumerate([2, 3, 4, 8, 2, 3, 4, 2]))
    step = _quantize(case, experts)
    parts, cost, moved = case.parts(), 0.0, np.zeros_like(own.total)
    for one in experts:
        inputs, gate, _ = _slots(own, one.expert)
        weights = _weights(case, LAYER, one.expert)
        change = gate[:, None] * (_run(_narrow(weights, one, step), inputs) - _run(weights, inputs))
        whole = (gate[:, None] * _run(weights, inputs)) ** 2
        cost += parts[one.expert] * (change**2).sum() / whole.sum()
        moved[np.nonzero(own.ids == one.expert)[0]] += change
    found = case.turns(step)
    assert found[LAYER].bits == pytest.approx(cost, rel=2e-3)
    assert found[LAYER].total == found[LAYER].bits and found[OTHER].total == 0
    # Errors of different experts meet in a token, and are not spread over tokens as outputs are: a third at most here.
    true = float(((moved**2).sum(1) / own.stream).mean())
    assert 0.67 * true < found[LAYER].bits < 1.5 * true


def test_widths_of_single_projections_add_up(case: Case) -> None:
    bits = ExpertBits(expert=3, gate=4, up=None, down=2)
    step, own = _quantize(case, (bits,)), case.seen.layers[LAYER]
    inputs, gate, _ = _slots(own, 3)
    weights, cost = _weights(case, LAYER, 3), 0.0
    whole = ((gate[:, None] * _run(weights, inputs)) ** 2).sum()
    for one in (ExpertBits(expert=3, gate=4, up=None, down=None), ExpertBits(expert=3, gate=None, up=None, down=2)):
        change = gate[:, None] * (_run(_narrow(weights, one, step), inputs) - _run(weights, inputs))
        cost += case.parts()[3] * (change**2).sum() / whole
    assert case.turns(step)[LAYER].bits == pytest.approx(cost, rel=2e-3)


def test_narrower_shared_experts(case: Case) -> None:
    """Their error over the routed experts' outputs, times what those are of the stream."""
    bits = ExpertBits(expert=0, role="shared", gate=2, up=2, down=2)
    step, own = _quantize(case, (bits,)), case.seen.layers[LAYER]
    assert own.shared is not None and own.layer.shared is not None
    module = own.layer.shared.module
    weights = {part: getattr(module, f"{part}_proj").weight.detach() for part in ("gate", "up", "down")}
    narrow = _run(_narrow(weights, bits, step), own.shared.inputs)
    error = ((own.shared.gate[:, None] * (narrow - own.shared.output)) ** 2).sum()
    routed = ((own.gate[..., None] * own.output) ** 2).sum()
    assert case.turns(step)[LAYER].bits == pytest.approx(error / routed * case.parts().sum(), rel=2e-3)


def _gone(case: Case, experts: list[int], layer: int = LAYER) -> Array:
    """What each loses, and what the median expert would add with its gate weight."""
    own, of = case.seen.layers[layer], case.seen.where()
    gate = own.dense(own.gate**2 / own.stream[:, None], of).sum(0) / of.sum()
    norms = [(_run(_weights(case, layer, e), _slots(own, e)[0]) ** 2).sum(1).mean() for e in range(own.size)]
    cost: Array = case.parts(layer)[experts] + gate[experts] * np.median(norms)
    return cost


@pytest.mark.parametrize("experts", [(1,), (0, 2, 5), (0, 1, 2, 3, 4, 5)])
def test_experts_that_go(case: Case, experts: tuple[int, ...]) -> None:
    found = case.turns(_drop(*experts))
    assert found[LAYER].cut == pytest.approx(_gone(case, list(experts)).sum(), rel=1e-4)
    assert found[LAYER].total == found[LAYER].cut and found[OTHER] == Turned()


def test_one_domain_counts_its_own_tokens(case: Case) -> None:
    own = task(case.task.run, domains=("german",))
    of = case.seen.where("german")
    found = case.turns(DropStep(method="test", blocks=(OTHER,)), task=own)
    assert found[OTHER].cut == pytest.approx(case.parts(OTHER, of).sum(), rel=1e-4)
    assert abs(found[OTHER].cut - case.parts(OTHER).sum()) > 1e-3


def test_blocks_lose_all_that_their_experts_add(case: Case) -> None:
    found = case.turns(DropStep(method="test", blocks=(LAYER,)))
    assert found[LAYER].cut == pytest.approx(case.parts().sum(), rel=1e-4)


def test_decoder_layers_turn_the_stream_by_their_angle(case: Case) -> None:
    found = case.turns(DropStep(method="test", decoder_layers=(OTHER,)))
    entered, left = case.seen.entered[OTHER], case.seen.left[OTHER]
    cosine = (entered * left).sum(1) / np.linalg.norm(entered, axis=1) / np.linalg.norm(left, axis=1)
    means = [1 - cosine[case.seen.where(domain)].mean() for domain in ("code", "german")]
    assert found[OTHER].cut == pytest.approx(2 * np.mean(means), rel=1e-4)
    # Two streams of about the same length: twice the angle's defect is the squared change.
    true = (((left - entered) ** 2).sum(1) / np.sqrt((entered**2).sum(1) * (left**2).sum(1))).mean()
    ratio = (entered**2).sum(1) / (left**2).sum(1)
    assert found[OTHER].cut <= true and found[OTHER].cut > true - (np.sqrt(ratio) + 1 / np.sqrt(ratio) - 2).max()


def _merge(form: str, *groups: tuple[int, ...], weights: tuple[float, ...] = (0.7, 0.3)) -> MergeStep:
    grouped = {member for members in groups for member in members}
    parts = [(members, weights) for members in groups]
    parts += [((one,), (1.0,)) for one in range(8) if one not in grouped]
    made = [MergeGroup(lead=members[0], members=members, weights=weight) for members, weight in parts]
    ordered = tuple(sorted(made, key=lambda one: one.lead))
    layer = MergeLayer(layer=LAYER, groups=ordered)
    return MergeStep(grouping="test", method="average", form=form, layers=(layer,))  # type: ignore[arg-type]


def _differences(case: Case, members: tuple[int, ...], weights: tuple[float, ...]) -> Array:
    """(members,) |f_m - sum w f|^2 over |f_m|^2, all of them run on all tokens."""
    outputs = np.array([_run(_weights(case, LAYER, one), case.seen.layers[LAYER].inputs) for one in members])
    mean = np.tensordot(weights, outputs, 1)
    differs: Array = ((outputs - mean) ** 2).sum((1, 2)) / (outputs**2).sum((1, 2))
    return differs


def test_members_answer_as_their_mean(case: Case) -> None:
    groups, weights = ((1, 4), (2, 6)), (0.7, 0.3)
    parts = case.parts()
    wanted = sum(float(_differences(case, one, weights) @ parts[list(one)]) for one in groups)
    found = case.turns(_merge("shared", *groups, weights=weights))[LAYER]
    assert found.merged == pytest.approx(wanted, rel=2e-3) and found.total == found.merged


def test_members_whose_rows_go(case: Case) -> None:
    members, weights = (1, 4), (0.7, 0.3)
    lead, other = _differences(case, members, weights)
    wanted = lead * case.parts()[1] + min(other, 1.0) * _gone(case, [4])[0]
    found = case.turns(_merge("per_layer", members, weights=weights))[LAYER]
    assert found.merged == pytest.approx(wanted, rel=2e-3)


def _masks(experts: tuple[int, ...], width: int, *, seed: int = 0) -> dict[int, Any]:
    draw = np.random.default_rng(seed)
    return {one: draw.permutation(width) >= 6 for one in experts}


def _slim(masks: dict[int, Any]) -> SlimStep:
    entries = tuple(SlimExpert.of(expert=one, mask=mask) for one, mask in masks.items())
    return SlimStep(method="test", form="masked", layers=(SlimLayer(layer=LAYER, experts=entries),))


def _slimmed(case: Case, masks: dict[int, Any]) -> float:
    own, cost = case.seen.layers[LAYER], 0.0
    for expert, mask in masks.items():
        token, slot = np.nonzero(own.ids == expert)
        columns = (_weights(case, LAYER, expert)["down"].double().numpy() ** 2).sum(0)
        energy = ((own.gate[token, slot, None] * own.activation[token, slot]) ** 2).sum(0) * columns
        cost += case.parts()[expert] * energy[~mask].sum() / energy.sum()
    return cost


def test_neurons_that_go(case: Case) -> None:
    masks = _masks((0, 3, 7), case.source.layers[LAYER].width)
    found = case.turns(_slim(masks))[LAYER]
    assert found.slimmed == pytest.approx(_slimmed(case, masks), rel=1e-3) and found.total == found.slimmed


def test_mixtures_add_up_over_what_stays(case: Case) -> None:
    masks = _masks((0, 3), case.source.layers[LAYER].width)
    left = tuple(expert for expert in range(8) if expert not in (2, 5))
    bits = _quantize(case, tuple(ExpertBits(expert=e, gate=2, up=2, down=2) for e in left))
    found = case.turns(_drop(2, 5), _slim(masks), bits)[LAYER]
    assert found.cut == pytest.approx(case.turns(_drop(2, 5))[LAYER].cut)
    assert found.slimmed == pytest.approx(case.turns(_slim(masks))[LAYER].slimmed)
    assert found.bits == pytest.approx(case.turns(bits)[LAYER].bits)
    assert found.total == pytest.approx(sum(getattr(found, kind) for kind in KINDS)) and found.merged == 0


def test_merged_experts_have_their_members_errors(case: Case) -> None:
    """Bits of a merged expert: the lead's relative error on all that its members put out."""
    one = _quantize(case, (ExpertBits(expert=1, gate=2, up=2, down=2),))
    alone, parts = case.turns(one)[LAYER].bits, case.parts()
    merged = case.turns(_merge("shared", (1, 4)), one)[LAYER].bits
    assert merged == pytest.approx(alone * (parts[1] + parts[4]) / parts[1], rel=1e-3)


def test_without_a_sample_members_have_nothing_in_common(tmp_path: Path) -> None:
    with collected(short(), tmp_path, level="activations") as run:
        of = task(run)
        found = stream_turns(plan(of.source, _merge("shared", (1, 4))), of)
        silent = stream_turns(plan(of.source, DropStep(method="test", blocks=(LAYER,))), of)
        assert found is not None and silent is not None
        rows = run.table("expert_output").filter(layer=LAYER, kind="routed")
        sums = rows.group_by("expert").agg(pl.col("stream_square_sum").sum()).sort("expert")["stream_square_sum"]
        assert found[LAYER].merged == pytest.approx(silent[LAYER].cut * (sums[1] + sums[4]) / sums.sum())


def test_what_no_run_can_price(case: Case, tmp_path: Path) -> None:
    group = (FactorGroup(lead=0, members=(0,), weights=(1.0,)),)
    layers = (FactorLayer(layer=LAYER, groups=group),)
    factor = FactorStep(grouping="test", method="low_rank_sparse", rank=4, density=0.1, layers=layers)
    narrow = _quantize(case, (ExpertBits(expert=0, gate=4, up=4, down=4),), activation_bits=8)
    for step in (factor, narrow):
        assert stream_turns(plan(case.source, step), case.task) is None
    for level in ("routing", "errors"):
        with collected(short("olmoe"), tmp_path / level, level=level, errors_every=4) as run:
            of = task(run)
            assert stream_turns(plan(of.source, DropStep(method="test", blocks=(LAYER,))), of) is None


def test_factors_do_not_change_what_is_estimated(case: Case) -> None:
    """They steer choices; what a plan changes is what it changes."""
    steered = task(case.task.run, factors=(4.0, 0.25))
    assert_allclose(case.turns(_drop(1), task=steered)[LAYER].cut, case.turns(_drop(1))[LAYER].cut)
