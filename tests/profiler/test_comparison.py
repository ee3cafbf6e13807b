"""Two runs on the same tokens: against loops over sets, shuffled and random selections, alignment and its refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import profiler.alignment
import profiler.comparison
import store
from moescope.errors import InputError, MetricError
from profiler.alignment import Alignment, align
from profiler.comparison import compare
from profiler.importers.job import import_run
from profiler.importers.recording import ImportOptions
from profiler.metrics import comparison
from tests.profiler.paired import EXPERTS, TOP_K, draw, routed, texts, write

# --- the arithmetic -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_agreement_equals_sets(seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = draw(rng, 400, missing=0.3), draw(rng, 400, top_k=2 + seed % 2, missing=0.3)
    second[:100] = first[:100, : second.shape[1]]
    tokens = comparison.token_agreement(first=first, second=second)
    for row, (one, other) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
        a, b = set(one) - {-1}, set(other) - {-1}
        assert tokens.counted[row] == bool(a and b)
        if not (a and b):
            assert tokens.overlap[row] == tokens.jaccard[row] == 0 and not tokens.exact[row]
            assert not tokens.first_choice[row] and not tokens.kept[row].any()
            continue
        assert tokens.overlap[row] == pytest.approx(len(a & b) / max(len(a), len(b)))
        assert tokens.jaccard[row] == pytest.approx(len(a & b) / len(a | b))
        assert tokens.exact[row] == (a == b) == (not tokens.flipped[row])
        assert tokens.first_choice[row] == (one[0] == other[0])
        assert [expert for expert, kept in zip(one, tokens.kept[row], strict=True) if kept] == [
            expert for expert in one if expert in a & b
        ]


def test_selections_of_other_tokens_are_refused() -> None:
    with pytest.raises(MetricError, match=r"\(3, 2\) and \(4, 2\)"):
        comparison.token_agreement(first=np.zeros((3, 2), np.int16), second=np.zeros((4, 2), np.int16))


def test_saturation_by_hand() -> None:
    final = np.array([[[0, 1], [2, 3]], [[4, 5], [-1, -1]]], np.int16)
    earlier = np.array([[[1, 0], [3, 4]], [[4, 6], [0, 1]]], np.int16)
    np.testing.assert_allclose(comparison.router_saturation(selections=earlier, final=final), [0.75, 0.5])
    np.testing.assert_allclose(comparison.router_saturation(selections=final, final=final), 1.0)


@pytest.mark.parametrize("seed", range(3))
def test_sums_by_group_equal_loops(seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, second, group = draw(rng, 300, missing=0.2), draw(rng, 300, missing=0.2), rng.integers(0, 5, 300)
    tokens = comparison.token_agreement(first=first, second=second)
    sums = comparison.agreement_sums(tokens=tokens, group=group, num_groups=6)
    loads = comparison.load_sums(ids=first, group=group, num_groups=6, num_experts=EXPERTS)
    for number in range(6):
        mine = group == number
        expected = [getattr(tokens, name)[mine].sum() for name in comparison.AGREEMENTS]
        np.testing.assert_allclose(sums[number], [*expected, tokens.counted[mine].sum()])
        assert loads[number].tolist() == [(first[mine] == expert).sum() for expert in range(EXPERTS)]


def test_baselines_are_those_of_random_and_of_shuffled_tokens() -> None:
    rng = np.random.default_rng(0)
    first, second = draw(rng, 60_000), draw(rng, 60_000)
    tokens = comparison.token_agreement(first=first, second=second)
    expected = comparison.chance_overlap(top_k=(TOP_K, TOP_K), num_experts=EXPERTS)
    assert tokens.overlap.mean() == pytest.approx(expected, abs=4 * tokens.overlap.std() / np.sqrt(60_000))
    fewer = comparison.token_agreement(first=first, second=second[:, :2]).overlap.mean()
    assert fewer == pytest.approx(comparison.chance_overlap(top_k=(TOP_K, 2), num_experts=EXPERTS), abs=0.005)
    skewed = np.argsort(rng.gumbel(size=(400, EXPERTS)) - np.arange(EXPERTS), axis=1)[:, :TOP_K].astype(np.int16)
    load = np.bincount(skewed.ravel(), minlength=EXPERTS)
    popularity = comparison.popularity_overlap(first=load, second=load, tokens=400)
    pairs = [(a, b) for a in skewed.tolist() for b in skewed.tolist()]  # every token beside every other
    assert popularity == pytest.approx(np.mean([len({*a} & {*b}) / TOP_K for a, b in pairs]))
    assert popularity > expected + 0.1
    assert np.isnan(comparison.popularity_overlap(first=load * 0, second=load * 0, tokens=0))


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    held = 0
    for trial in range(200):
        exact = rng.binomial(100, rng.beta(16, 4, 40))[:, None]  # sequences differ
        sums = np.concatenate([np.repeat(exact, 4, axis=1), np.full((40, 1), 100)], axis=1).astype(float)
        found = comparison.agreement(sums=sums, num_resamples=400, seed=trial)["exact"]
        held += found.low <= 0.8 <= found.high
        assert found.value == pytest.approx(exact.sum() / 4000)
    assert 0.88 < held / 200 < 0.99
    alone = comparison.agreement(sums=sums[:1])["overlap"]
    assert np.isnan([alone.low, alone.high]).all() and np.isfinite(alone.value)


def test_load_difference_by_hand() -> None:
    first, second = np.array([[6, 2, 0], [4, 0, 0]]), np.array([[2, 4, 2], [4, 0, 0]])
    found = comparison.load_difference(first=first, second=second)
    np.testing.assert_allclose(found.difference, [-4 / 12, 2 / 12, 2 / 12])
    moved = found.total_variation
    assert moved.value == pytest.approx(4 / 12)
    assert moved.low == 0.0 and moved.high == 1.0  # two sequences, one of which moved nothing
    rng = np.random.default_rng(0)
    loads = rng.integers(0, 50, (2, 20, EXPERTS))
    shares = [np.delete(loads, out, axis=1).sum(1) for out in range(20)]
    without = [0.5 * np.abs(b / b.sum() - a / a.sum()).sum() for a, b in shares]
    found = comparison.load_difference(first=loads[0], second=loads[1]).total_variation
    error = np.sqrt(19 / 20 * ((without - np.mean(without)) ** 2).sum())
    assert found.high - found.value == pytest.approx(2.0930 * error, rel=1e-4)  # Student's t of 19 degrees, 97.5 %
    same = comparison.load_difference(first=first, second=first).total_variation
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)


def test_margins_by_hand() -> None:
    first, second = np.array([[0, 1], [0, 1], [2, -1], [3, 4]], np.int16), np.array([[0, 2], [1, 0], [2, 3], [5, 6]])
    weights, there = np.array([[0.6, 0.2], [0.3, 0.1], [0.5, 0], [0, 0]]), np.array([[3, 1], [1, 1], [1, 3], [1, 0]])
    tokens = comparison.token_agreement(first=first, second=second.astype(np.int16))
    assert tokens.flipped.tolist() == [True, False, True, True]
    left = comparison.left_weight(ids=first, weights=weights, kept=tokens.kept)
    np.testing.assert_allclose(left, [0.25, 0.0, 0.0, np.nan])
    gap = comparison.weight_gap(
        first=first, first_weights=weights, second=second.astype(np.int16), second_weights=there
    )
    np.testing.assert_allclose(gap, [0.0, 0.0, 0.75, np.nan])
    logits = np.array([[3.0, 2.0, 0.5], [3.0, 2.5, 2.5], [3.0, 2.0, 1.0], [np.nan] * 3])
    margin = comparison.boundary_margin(ids=first, logits=logits)
    np.testing.assert_allclose(margin, [1.5, 0.0, 1.0, np.nan])
    assert np.isnan(comparison.boundary_margin(ids=first, logits=logits[:, :2])[0])  # no further logit


def test_histogram_equals_counting() -> None:
    values = np.array([0.0, 0.049, 0.05, 0.99, 1.0, np.nan, 7.0])
    counts = comparison.histogram(values=values, edges=comparison.SHARES)
    assert (counts[0], counts[1], counts[-1], counts.sum()) == (2, 1, 3, 6)
    rng = np.random.default_rng(0)
    many = rng.exponential(size=500)
    counts = comparison.histogram(values=many, edges=comparison.LOGITS)
    edges = zip(comparison.LOGITS[:-1], comparison.LOGITS[1:], strict=True)
    assert counts.tolist() == [((many >= low) & (many < high)).sum() for low, high in edges]


# --- two runs -------------------------------------------------------------------------------------------------------


def test_a_run_agrees_with_itself(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tokens = texts(rng, [20, 31, 9])
    with write(tmp_path, "one", tokens, routed(rng, tokens)) as run:
        found = compare(align(run, run))
        for layer in found.layers:
            assert layer.sums.sum(0).tolist() == [60.0] * 5
            assert not any(margin.any() for margin in layer.margins.values())
            assert np.array_equal(*layer.loads) and np.array_equal(*layer.firsts)
        assert found.alignment.left_out == (0, 0)


@pytest.mark.parametrize("block", [1, 64, 1 << 18])
def test_sequences_meet_by_their_tokens_whatever_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(profiler.alignment, "BLOCK_TOKENS", block)
    rng = np.random.default_rng(0)
    common = texts(rng, [int(length) for length in rng.integers(5, 40, 12)])
    common[4] = common[7]  # the same text twice
    only_here, only_there = texts(rng, [30, 8]), texts(rng, [11])
    ids, ids_there = routed(rng, common), routed(rng, common)
    order = rng.permutation(12)
    first = write(tmp_path, "a", common + only_here, ids + routed(rng, only_here))
    second = write(
        tmp_path, "b", only_there + [common[at] for at in order],
        routed(rng, only_there) + [ids_there[at] for at in order],
    )  # fmt: skip
    with first, second:
        alignment = align(first, second)
        assert (len(alignment.pairs), alignment.left_out, alignment.by) == (12, (2, 1), "token ids")
        assert alignment.tokens == sum(len(one) for one in common)
        assert len(set(alignment.pairs[:, 1].tolist())) == 12  # each once
        partner = [order[there // 3 - 2] for there in alignment.pairs[:, 1]]
        assert [4 if at == 7 else at for at in partner] == [4 if at == 7 else at for at in range(12)]
        found = compare(alignment)
        seen: dict[int, list[float]] = {}
        for axis, layer in enumerate(found.layers):
            overlaps, loads, left = [], np.zeros((2, EXPERTS)), []
            for one, here, there in zip(common, ids, [ids_there[at] for at in partner], strict=True):
                for token, a, b in zip(one.tolist(), here[axis].tolist(), there[axis].tolist(), strict=True):
                    overlaps.append(len({*a} & {*b}) / TOP_K)
                    seen.setdefault(token, []).append(overlaps[-1])
                    loads[0, a] += 1
                    loads[1, b] += 1
                    if {*a} != {*b}:
                        left.append(sum(1 / (rank + 1) for rank, one in enumerate(a) if one not in b) / (11 / 6))
            assert layer.sums[:, 0].sum() == pytest.approx(sum(overlaps))
            assert layer.sums[:, 4].sum() == len(overlaps)
            np.testing.assert_array_equal([load.sum(0) for load in layer.loads], loads)
            assert layer.margins["left_weight"][0].sum() == len(left)
            coarse = layer.margins["left_weight"][0] @ (np.arange(20) + 0.5) / 20
            assert coarse / len(left) == pytest.approx(np.mean(left), abs=0.03)  # weights are kept in 8 bits
        changes = found.changes
        assert changes is not None
        assert changes.token_ids.tolist() == sorted(seen)
        assert changes.occurrences.tolist() == [len(seen[token]) // 2 for token in sorted(seen)]
        np.testing.assert_allclose(changes.overlap, [sum(seen[token]) for token in sorted(seen)])


def test_distant_sequences_are_read_alone(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    common, between = texts(rng, [9, 7]), texts(rng, [5] * 40)
    ids, other = routed(rng, common), routed(rng, between)
    spread = write(tmp_path, "spread", [common[0], *between, common[1]], [ids[0], *other, ids[1]])
    with spread, write(tmp_path, "close", common, ids) as close:
        for pair in ((spread, close), (close, spread)):
            found = compare(align(*pair))
            assert len(found.alignment.pairs) == 2
            assert [layer.sums[:, 1].sum() for layer in found.layers] == [16.0, 16.0]


def test_domains_keep_their_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiler.comparison, "MAX_GROUPS", 6)
    rng = np.random.default_rng(0)
    tokens = texts(rng, [10] * 40)
    ids = routed(rng, tokens)
    changed = [one if place % 2 else one[..., ::-1] for place, one in enumerate(ids)]  # domain b: other order
    with write(tmp_path, "a", tokens, ids) as first, write(tmp_path, "b", tokens, changed) as second:
        found = compare(align(first, second))
    assert found.groups.count <= 6
    for domain, share in (("a", 1.0), ("b", 0.0)):
        sums = found.layers[0].sums[found.groups.domain == domain].sum(0)
        assert sums[2] / sums[4] == share
        assert sums[1] / sums[4] == 1.0  # the sets stay


# --- what cannot be compared ----------------------------------------------------------------------------------------


def test_other_models_are_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tokens = texts(rng, [10, 12])
    run = write(tmp_path, "a", tokens, routed(rng, tokens))
    more = write(tmp_path, "layers", tokens, routed(rng, tokens, 3), layers=(1, 2, 3))
    moved = write(tmp_path, "moved", tokens, routed(rng, tokens), layers=(1, 3))
    wide = write(tmp_path, "wide", tokens, routed(rng, tokens), experts=EXPERTS + 1)
    with run, more, moved, wide:
        for other, words in (
            (more, "'a' and 'layers' have 2 and 3 MoE layers"),
            (moved, "2 and 3 as index of a MoE layer"),
            (wide, "8 and 9 experts .layer 1."),
        ):
            with pytest.raises(InputError, match=words):
                align(run, other)


def test_other_tokenizers_and_texts_are_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tokens = texts(rng, [10, 12])
    pieces = {token: f"<{token}>".encode() for token in range(12)}
    changed = {**pieces, 5: b"other", 7: b"\xff"}
    run = write(tmp_path, "a", tokens, routed(rng, tokens), pieces=pieces)
    foreign = write(tmp_path, "foreign", tokens, routed(rng, tokens), pieces=changed)
    elsewhere = [np.concatenate([one[:4], [11 - one[4]], one[5:]]) for one in tokens]
    other_text = write(tmp_path, "text", elsewhere, routed(rng, tokens), pieces=pieces)
    with run, foreign, other_text:
        words = r"different tokenizers: id 5 is '<5>' in one and 'other' in the other \(2 of 12 common ids differ\)"
        with pytest.raises(InputError, match=words):
            align(run, foreign)
        words = f"no sequence of the same tokens: the first ones differ from token 4 on, id {tokens[0][4]} "
        with pytest.raises(InputError, match=words):
            align(run, other_text)


def test_without_token_ids_position_is_offered(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tokens = texts(rng, [10, 12, 7])
    ids = routed(rng, tokens)
    run = write(tmp_path, "a", tokens, ids)
    silent = write(
        tmp_path, "silent", [tokens[0], tokens[1], tokens[2][:5]], [*ids[:2], ids[2][:, :5]], keep_text=False
    )
    short = write(tmp_path, "short", texts(rng, [3]), [ids[0][:, :3]], keep_text=False)
    with run, silent, short:
        with pytest.raises(InputError, match=r"'silent' keeps no token ids \(it was collected with --no-text\); --by-"):
            align(run, silent)
        alignment = align(run, silent, by_position=True)
        assert (alignment.tokens, alignment.left_out, alignment.by) == (22, (1, 1), "position")
        found = compare(alignment)
        assert found.changes is None
        assert found.layers[0].sums[:, 1].sum() == 22
        with pytest.raises(InputError, match="no sequence of the same number and length: 3 and 1 sequences"):
            align(run, short, by_position=True)


def test_imports_give_their_reason(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "c.csv").write_text("layer,expert\n" + "\n".join(f"0,{rng.integers(8)}" for _ in range(50)))
    import_run("csv", tmp_path / "c.csv", directory=tmp_path, name="c", options=ImportOptions(num_experts=8, top_k=2))
    experts = np.stack([draw(rng, 40), draw(rng, 40)], axis=1).astype(np.uint8)
    np.savez(tmp_path / "t.npz", experts=experts, offsets=np.array([0, 25, 40]), num_experts=np.int64(8))
    import_run("npz", tmp_path / "t.npz", directory=tmp_path, name="t")
    with store.open_run(tmp_path / "c.duckdb") as counts, store.open_run(tmp_path / "t.duckdb") as trace:
        with pytest.raises(InputError, match="run 'c' has no tokens to compare: "):
            align(trace, counts)
        with pytest.raises(InputError, match="run 't' keeps no token ids .*--by-position"):
            align(trace, trace)
        found = compare(align(trace, trace, by_position=True))
        assert [layer.sums[:, 1].sum() for layer in found.layers] == [40, 40]
        assert not any(margin.any() for layer in found.layers for margin in layer.margins.values())


def test_imports_of_token_texts_meet_by_their_texts(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    words = [["the", " cat", " sat"], [" on", " the", " mat", "."], ["", "?"]]
    experts = [np.stack([draw(rng, len(one)), draw(rng, len(one))], axis=1).astype(np.uint8) for one in words]
    for name, order in (("a", (0, 1, 2)), ("b", (1, 0))):
        parts = [experts[at] for at in order]
        offsets = np.cumsum([0, *map(len, parts)])
        np.savez(tmp_path / f"{name}.npz", experts=np.concatenate(parts), offsets=offsets, num_experts=np.int64(8))
        (tmp_path / f"{name}.json").write_text(json.dumps([words[at] for at in order]))
        options = ImportOptions(extra={"tokens": tmp_path / f"{name}.json"})
        import_run("npz", tmp_path / f"{name}.npz", directory=tmp_path, name=name, options=options, metrics=False)
    with store.open_run(tmp_path / "a.duckdb") as first, store.open_run(tmp_path / "b.duckdb") as second:
        assert not np.array_equal(first.token_ids().ids[:3], second.token_ids().ids[4:7])  # numbered by themselves
        found = compare(align(first, second))
    assert found.alignment.pairs.tolist() == [[0, 1], [1, 0]]
    assert found.alignment.left_out == (1, 0)
    assert [layer.sums[:, 1].sum() for layer in found.layers] == [7, 7]


# --- a real model ---------------------------------------------------------------------------------------------------


TOKENS = 6_000


@pytest.fixture(scope="module")
def precisions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the bundled model on the same text in float32, with router scores, and in bfloat16."""
    pytest.importorskip("torch")
    import sample_data
    from profiler import load_model, load_tokenizer
    from profiler.collect import collect
    from profiler.corpus import open_corpus

    folder = tmp_path_factory.mktemp("precisions")
    tokenizer = load_tokenizer(sample_data.MODEL)
    for dtype in ("float32", "bfloat16"):
        corpus = open_corpus(sorted(sample_data.TEXTS.glob("*.jsonl")), tokenizer=tokenizer, token_budget=TOKENS)
        model = load_model(sample_data.MODEL, dtype=dtype, device="cpu")
        scores = -1 if dtype == "float32" else 0
        collect(
            model, corpus=corpus, store=folder, name=dtype, tokenizer=tokenizer, router_scores=scores, headline=False
        )
    return folder


def test_rounding_flips_few_tokens_at_small_margins(precisions: Path) -> None:
    runs = [store.open_run(precisions / f"{name}.duckdb") for name in ("float32", "bfloat16")]
    with runs[0], runs[1]:
        found = compare(align(*runs))
    assert found.alignment.tokens == TOKENS
    for layer in found.layers:
        overlap, exact, _, _, tokens = layer.sums.sum(0)
        assert 0.98 < overlap / tokens < 1.0
        assert 0.97 < exact / tokens < 1.0
        assert layer.margins["boundary_margin"].sum() == tokens
    flipped, unchanged = sum(layer.margins["boundary_margin"] for layer in found.layers)
    rate = flipped / np.maximum(flipped + unchanged, 1)
    small = comparison.LOGITS[1:] <= 1 / 32
    assert rate[small].max() > 0.2  # near a tie, rounding decides
    assert rate[~small].max() < 0.03  # elsewhere it hardly ever does
    assert flipped[small].sum() > 0.7 * flipped.sum()
    gap = sum(layer.margins["weight_gap"][0] for layer in found.layers)
    assert gap[:2].sum() > 0.95 * gap.sum()  # what left weighed as much as what came
    load = comparison.load_difference(first=found.layers[0].loads[0], second=found.layers[0].loads[1])
    sums = found.layers[0].sums.sum(0)
    assert load.total_variation.value <= 1 - sums[0] / sums[4]  # flips that cancel move no load


def test_shuffled_tokens_agree_by_popularity(precisions: Path) -> None:
    with store.open_run(precisions / "float32.duckdb") as run:
        ids = run.layer_selections(layer=run.layers[-1].layer).ids
        load = np.bincount(ids.ravel(), minlength=run.layers[-1].num_experts)
    shuffled = ids[np.random.default_rng(0).permutation(len(ids))]
    overlap = comparison.token_agreement(first=ids, second=shuffled).overlap
    expected = comparison.popularity_overlap(first=load, second=load, tokens=len(ids))
    assert overlap.mean() == pytest.approx(expected, abs=4 * overlap.std() / np.sqrt(len(ids)))


def test_chance_knows_experts_that_became_one() -> None:
    """Drawn: eight experts of which three and two became one, against the five that are left."""
    rng = np.random.default_rng(3)
    names, left = np.array([0, 1, 1, 3, 4, 4, 4, 7]), np.array([0, 1, 3, 4, 7])
    overlaps, firsts = [], []
    for _ in range(20_000):
        one, other = names[rng.permutation(8)[:2]], left[rng.permutation(5)[:2]]
        overlaps.append(len({*one.tolist()} & {*other.tolist()}) / 2)
        firsts.append(one[0] == other[0])
    sizes = np.bincount(names, minlength=8), np.bincount(left, minlength=8)
    overlap, first = comparison.chance_agreement(top_k=(2, 2), sizes=sizes)
    assert overlap == pytest.approx(np.mean(overlaps), abs=0.01) and first == pytest.approx(np.mean(firsts), abs=0.01)
    alone = np.ones(8, np.int64)
    plain = comparison.chance_agreement(top_k=(3, 2), sizes=(alone, alone))
    assert plain == pytest.approx((comparison.chance_overlap(top_k=(3, 2), num_experts=8), 1 / 8))


def test_a_part_of_long_runs_is_stretches_of_pairs() -> None:
    lengths = np.full(200, 10)
    numbers = np.arange(200)
    whole = Alignment(None, None, np.stack([numbers, numbers], 1), lengths, "position", (0, 0), [])  # type: ignore[arg-type]
    assert whole.part(2000) is whole and whole.of_tokens is None
    part = whole.part(640)
    assert part.of_tokens == 2000 and 640 <= part.tokens <= 640 + 16 * 10
    gaps = np.diff(part.pairs[:, 0])
    assert np.count_nonzero(gaps > 1) == 15 and part.pairs[0, 0] == 0 and part.pairs[-1, 0] > 185
    assert len(whole.part(1).pairs) == 16
