"""Groups that plans merge: against scikit-learn and scipy, on models with copies, and with experts that stay alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from scipy.cluster.hierarchy import cut_tree, linkage
from scipy.spatial.distance import squareform
from sklearn.cluster import KMeans

import planner
import planner.importance as importance
import store
from compressor.plan import MergeStep, Plan, Protected
from moescope.errors import PlanError
from planner.guard import Guard
from planner.merge import logit_similarity
from planner.merge.copies import output_similarity
from planner.merge.linkage import labels_after, merge_sequence
from planner.merge.sub_moe import kernel_kmeans
from planner.presets import find
from tests.planner.collected import collected, task
from tests.profiler.capture.tiny import build


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, store.Run]]:
    """A router without groups, and one with two."""
    level = "activations,similarity,moments"
    opened = {
        name: collected(build(name), tmp_path_factory.mktemp(name), level=level) for name in ("olmoe", "deepseek_v3")
    }
    yield opened
    for run in opened.values():
        run.close()


@pytest.fixture(params=("olmoe", "deepseek_v3"))
def run(request: pytest.FixtureRequest, runs: dict[str, store.Run]) -> store.Run:
    return runs[request.param]


@pytest.fixture
def plain(runs: dict[str, store.Run]) -> store.Run:
    return runs["olmoe"]


def _step(plan: Plan) -> MergeStep:
    (step,) = plan.steps
    assert isinstance(step, MergeStep)
    return step


def _groups(step: MergeStep, layer: int) -> set[frozenset[int]]:
    (entry,) = [one for one in step.layers if one.layer == layer]
    return {frozenset(group.members) for group in entry.groups}


def _partition(labels: Any) -> set[frozenset[int]]:
    return {
        frozenset(np.flatnonzero(np.asarray(labels) == one).tolist())
        for one in set(np.asarray(labels).ravel().tolist())
    }


@pytest.mark.parametrize("seed", range(4))
def test_kernel_kmeans_is_kmeans_on_the_vectors(seed: int) -> None:
    generator = np.random.default_rng(seed)
    rows = generator.normal(size=(4, 30))[generator.integers(0, 4, 14)] * 3 + generator.normal(size=(14, 30))
    labels = kernel_kmeans(rows @ rows.T, 4, seed=seed)
    reference = KMeans(4, n_init=50, random_state=0).fit(rows)
    spread = sum(((rows[labels == one] - rows[labels == one].mean(0)) ** 2).sum() for one in range(4))
    assert spread == pytest.approx(reference.inertia_, rel=1e-9)
    assert _partition(labels) == _partition(reference.labels_)


def test_kernel_kmeans_meets_every_count() -> None:
    rows = np.repeat(np.random.default_rng(0).normal(size=(2, 5)), 4, axis=0)  # two vectors, four times each
    for count in range(1, 9):
        labels = kernel_kmeans(rows @ rows.T, count)
        assert sorted(set(labels.tolist())) == list(range(count))
        _, first = np.unique(labels, return_index=True)
        assert (np.diff(first) > 0).all()
    assert _partition(kernel_kmeans(rows @ rows.T, 2)) == {frozenset(range(4)), frozenset(range(4, 8))}


@pytest.mark.parametrize("method", ["complete", "average"])
@pytest.mark.parametrize("size", [2, 7, 25])
def test_merge_sequence_is_scipys(method: Any, size: int) -> None:
    points = np.random.default_rng(size).normal(size=(size, 4))
    distance = np.linalg.norm(points[:, None] - points[None], axis=2)
    tree = linkage(squareform(distance, checks=False), method)
    merges = merge_sequence(distance, linkage=method)
    assert_allclose([merge.distance for merge in merges], tree[:, 2], rtol=1e-9)
    for clusters in range(1, size + 1):
        expected = cut_tree(tree, n_clusters=clusters)[:, 0]
        assert _partition(labels_after(merges, size, size - clusters)) == _partition(expected)


@pytest.mark.parametrize("preset", ["m_smoe", "stun", "sub_moe", "hc_smoe", "dern", "sub_moe_truncated"])
@pytest.mark.parametrize("share", [0.25, 0.5])
def test_the_count_is_met_in_every_layer_and_group(run: store.Run, preset: str, share: float) -> None:
    step = _step(planner.make(run, preset=preset, share=share))
    for layer in step.layers:
        assert len(layer.groups) == 8 - 8 * share
        members = [one for group in layer.groups for one in group.members]
        assert sorted([*members, *(one.expert for one in layer.given_up)]) == list(range(8))
        if run.info.model_type == "deepseek_v3":
            assert all(len({one // 4 for one in group.members}) == 1 for group in layer.groups)
            assert sum(group.lead < 4 for group in layer.groups) == len(layer.groups) // 2


@pytest.mark.parametrize("preset", ["m_smoe", "sub_moe", "hc_smoe", "sub_moe_truncated"])
def test_members_count_by_their_use(run: store.Run, preset: str) -> None:
    frequency = importance.score(run, "frequency")
    for layer in _step(planner.make(run, preset=preset, share=0.5, mix="tokens")).layers:
        tokens = frequency.filter(layer=layer.layer).sort("expert")["value"].to_numpy()
        for group in layer.groups:
            own = tokens[list(group.members)]
            expected = own / own.sum() if own.sum() else np.full(len(own), 1 / len(own))
            assert_allclose(group.weights, expected, rtol=1e-9)
            assert tokens[group.lead] == own.max()


def test_methods_are_the_published_ones(run: store.Run) -> None:
    methods = {
        name: _step(planner.make(run, preset=name, share=0.25)) for name in ("m_smoe", "stun", "sub_moe", "dern")
    }
    assert {name: step.method for name, step in methods.items()} == {
        "m_smoe": "aligned", "stun": "nearest", "sub_moe": "average", "dern": "segments",
    }  # fmt: skip
    truncated = _step(planner.make(run, preset="sub_moe_truncated", share=0.25))
    width = run.layers[0].expert_width
    assert truncated.method == "subspace" and truncated.rank == round(0.9 * width)
    assert _step(planner.make(run, preset="sub_moe", share=0.25, rank=5)).rank == 5
    assert all(set(group.weights) == {1 / len(group.members)} for one in methods["stun"].layers for group in one.groups)


def test_sub_moe_clusters_outputs_on_the_same_tokens(plain: store.Run) -> None:
    step = _step(planner.make(plain, preset="sub_moe", share=0.5))
    table = plain.table("expert_similarity")
    for layer in step.layers:
        rows = table.filter(layer=layer.layer).group_by("expert").agg("product_sum").sort("expert")["product_sum"]
        gram = np.array([np.sum(part.to_list(), axis=0) for part in rows])
        spread = _spread(gram, _groups(step, layer.layer))
        assert spread <= min(_spread(gram, one) for one in _pairings()) * (1 + 1e-9)


def _spread(gram: Any, groups: Any) -> float:
    return sum(gram[list(one), list(one)].sum() - gram[np.ix_(list(one), list(one))].sum() / len(one) for one in groups)


def _pairings() -> Iterator[set[frozenset[int]]]:
    """Every way to make four pairs of eight."""

    def of(free: tuple[int, ...]) -> Iterator[set[frozenset[int]]]:
        if not free:
            yield set()
            return
        for other in free[1:]:
            for rest in of(tuple(one for one in free[1:] if one != other)):
                yield {frozenset((free[0], other)), *rest}

    yield from of(tuple(range(8)))


def test_hc_smoe_clusters_mean_outputs(plain: store.Run) -> None:
    step = _step(planner.make(plain, preset="hc_smoe", share=0.5))
    table = plain.table("expert_similarity")
    for layer in step.layers:
        rows = table.filter(layer=layer.layer).sort("expert", "phase", "domain")
        parts = [rows.filter(expert=one) for one in range(8)]
        means = np.array([np.sum(part["output_sum"].to_list(), axis=0) / part["tokens"].sum() for part in parts])
        assert _groups(step, layer.layer) == _partition(cut_tree(linkage(means, "average"), n_clusters=4)[:, 0])


def test_dern_gives_up_the_least_gate_share(run: store.Run) -> None:
    step = _step(planner.make(run, preset="dern", share=0.5, mix="tokens"))
    assert step.threshold == 0.6 and find("dern").defaults["threshold"] == 0.6
    scores = importance.score(run, "dern")
    for layer in step.layers:
        values = scores.filter(layer=layer.layer).sort("expert")["value"].to_numpy()
        assert_allclose(
            [one.weight for one in layer.given_up], values[[one.expert for one in layer.given_up]], rtol=1e-5
        )
        assert_allclose([one.weight for one in layer.groups], values[[one.lead for one in layer.groups]], rtol=1e-5)
        assert all(group.members == (group.lead,) for group in layer.groups)


@pytest.mark.parametrize("preset", ["m_smoe", "stun", "sub_moe", "hc_smoe", "dern"])
def test_protected_experts_stay_alone(run: store.Run, preset: str) -> None:
    first = run.layers[0].layer
    guard = Guard(protected=tuple(Protected(layer=first, expert=one, reason="super") for one in (1, 6)), active=True)
    draft = find(preset).function(task(run, share=0.5, guard=guard))
    (step,) = draft.steps
    assert isinstance(step, MergeStep)
    groups = {group.lead: group for group in step.layers[0].groups}
    assert len(groups) == 4
    for expert in (1, 6):
        assert groups[expert].members == (expert,)
        assert preset != "dern" or groups[expert].fixed
    everyone = Guard(
        protected=tuple(Protected(layer=first, expert=one, reason="super") for one in range(6)), active=True
    )
    with pytest.raises(PlanError, match="super experts"):
        find(preset).function(task(run, share=0.5, guard=everyone))


def test_m_smoe_over_all_layers(plain: store.Run) -> None:
    options: dict[str, Any] = {"form": "per_layer", "engine": "transformers", "mix": "tokens"}
    step = _step(planner.make(plain, preset="m_smoe", share=0.5, **options))
    counts = [len(layer.groups) for layer in step.layers]
    assert sum(counts) == 4 * len(counts) and min(counts) >= 2
    tokens = importance.score(plain, "frequency").sort("layer", "expert")["value"].to_numpy().reshape(-1, 8)
    share = tokens / tokens.sum(1, keepdims=True)
    for row in share:
        row[np.argsort(-row, kind="stable")[:2]] = 2.0  # at least as many as a token uses
    leaders = {(int(place) // 8, int(place) % 8) for place in np.argsort(-share.ravel(), kind="stable")[:16]}
    assert {(layer.layer, group.lead) for layer in step.layers for group in layer.groups} == leaders


def test_m_smoe_keeps_groups_of_the_router_alike(runs: dict[str, store.Run]) -> None:
    with pytest.raises(PlanError, match="routes within groups of experts, which must stay alike: use form uniform"):
        planner.make(runs["deepseek_v3"], preset="m_smoe", share=0.5, form="padded")


def test_m_smoe_joins_the_expert_routed_most_alike(plain: store.Run) -> None:
    step = _step(planner.make(plain, preset="m_smoe", share=0.5, mix="tokens"))
    for layer in step.layers:
        rows = plain.table("expert_pair").filter(layer=layer.layer).sort("expert")
        gram = np.array([np.sum(rows.filter(expert=one)["logit_products"].to_list(), axis=0) for one in range(8)])
        cosine = logit_similarity(gram)
        leaders = [group.lead for group in layer.groups]
        for group in layer.groups:
            for member in set(group.members) - {group.lead}:
                assert leaders[int(cosine[member, leaders].argmax())] == group.lead


# Copies


def _with_copies(places: dict[int, list[tuple[int, int]]]) -> Any:
    """A model in which, per layer, the second expert of each pair is the first with its neurons in another order."""
    model = build("olmoe")
    with torch.no_grad():
        for layer, pairs in places.items():
            experts = model.model.layers[layer].mlp.experts
            width = experts.down_proj.shape[2]
            order = torch.randperm(width, generator=torch.Generator().manual_seed(3))
            for first, second in pairs:
                experts.gate_up_proj[second] = experts.gate_up_proj[first][torch.cat([order, order + width])]
                experts.down_proj[second] = experts.down_proj[first][:, order]
    return model


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[store.Run]:
    """One pair of copies in layers 0 and 3, two pairs in layer 2, none in layer 1."""
    model = _with_copies({0: [(2, 5)], 2: [(1, 7), (0, 4)], 3: [(3, 6)]})
    with collected(model, tmp_path_factory.mktemp("copied"), level="activations,similarity") as opened:
        yield opened


def test_copies_merge_and_nothing_else(copied: store.Run) -> None:
    plan = planner.make(copied, preset="copies", share=4 / 32 + 1e-9, form="per_layer", engine="transformers")
    step = _step(plan)
    merged = {(one.layer, group.members) for one in step.layers for group in one.groups if len(group.members) > 1}
    assert merged == {(0, (2, 5)), (2, (0, 4)), (2, (1, 7)), (3, (3, 6))}
    assert step.method == "aligned"
    assert plan.estimate.expert_parameters_after == plan.estimate.expert_parameters * 28 // 32
    assert plan.evidence[0].notes[0].startswith("Similarity within groups 1.000")


def test_more_than_the_copies_is_refused(copied: store.Run) -> None:
    with pytest.raises(PlanError, match="4 of 32 experts are copies .* share 0.25 asks for 8"):
        planner.make(copied, preset="copies", share=0.25, form="per_layer", engine="transformers")
    with pytest.raises(
        PlanError, match="layer 1 has 0 copies .* share 0.125 asks for 1; the model has 4: use form per_layer"
    ):
        planner.make(copied, preset="copies", share=0.125, engine="any")


def test_copies_of_a_whole_model_are_counted_together_where_the_router_stays(copied: store.Run) -> None:
    plan = planner.make(copied, preset="copies", share=1 / 32, engine="transformers")
    (pair,) = [
        (one.layer, group.members) for one in _step(plan).layers for group in one.groups if len(group.members) > 1
    ]
    assert pair in {(0, (2, 5)), (2, (0, 4)), (2, (1, 7)), (3, (3, 6))} and _step(plan).form == "shared"
    before, after = plan.estimate.expert_parameters, plan.estimate.expert_parameters_after
    assert after == before * 31 // 32 and plan.estimate.active_parameters == plan.estimate.active_parameters_after
    with pytest.raises(PlanError, match="4 of 32 experts are copies .* asks for 5"):
        planner.make(copied, preset="copies", share=5 / 32, engine="transformers")
    with pytest.raises(PlanError, match="share 0.03 of 32 experts removes none: ask for at least 0.03125"):
        planner.make(copied, preset="copies", share=0.03, engine="transformers")
    assert (
        find("copies").forms[0] == "shared"
        and planner.make(copied, preset="m_smoe", share=0.25).steps[0].form == "uniform"
    )


@pytest.mark.parametrize("preset", ["m_smoe", "sub_moe", "hc_smoe", "sub_moe_truncated"])
def test_neither_groups_nor_k_bind_merges_in_which_the_router_stays(run: store.Run, preset: str) -> None:
    with pytest.raises(PlanError, match="ask for at most|groups"):
        planner.make(run, preset=preset, share=0.875)
    plan = planner.make(run, preset=preset, share=0.875, form="shared", engine="transformers")
    kept = [len(layer.groups) for layer in _step(plan).layers]
    assert sum(kept) == len(kept) and (set(kept) == {1} or preset == "m_smoe")
    assert plan.estimate.expert_parameters_after < plan.estimate.expert_parameters
    with pytest.raises(PlanError, match="the router keeps its rows are loaded by compressor.load only"):
        planner.make(run, preset=preset, share=0.5, form="shared", engine="any")


def test_a_copy_is_merged_first_by_uniform_plans_too(tmp_path: Path) -> None:
    model = _with_copies({layer: [(2, 5)] for layer in range(4)})
    with collected(model, tmp_path, level="activations,similarity") as run:
        for preset in ("copies", "sub_moe", "hc_smoe"):
            step = _step(planner.make(run, preset=preset, share=0.125))
            for layer in step.layers:
                assert [group.members for group in layer.groups if len(group.members) > 1] == [(2, 5)], preset


def test_similarity_of_outputs_sees_loudness() -> None:
    rows = np.random.default_rng(0).normal(size=(2, 9))
    gram = np.vstack([rows, 2 * rows[:1]]) @ np.vstack([rows, 2 * rows[:1]]).T
    similarity = output_similarity(gram)
    assert_allclose(np.diag(similarity), 1.0)
    assert similarity[0, 2] == pytest.approx(0.8)  # a cosine would say 1
    assert output_similarity(np.zeros((2, 2))).tolist() == [[0.0, 0.0], [0.0, 0.0]]
