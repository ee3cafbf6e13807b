"""Specialization in domains and tokens: by hand, against counting, with its controls, and as headline metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import store
from moescope.errors import MetricError
from profiler.headline.specialization import specialization_rows
from profiler.headline.subject import Subject
from profiler.metrics import specialization
from profiler.metrics._intervals import jackknife
from profiler.metrics.specialization import TokenIndex
from store import LayerInfo, RunInfo, RunWriter, pack_trace

EXPERTS, TOP_K, LENGTH, VOCABULARY = 8, 2, 50, 30
LAYERS = (1, 2)


def test_domain_figures_by_hand() -> None:
    shares = specialization.domain_shares(counts=[[8, 2, 0], [1, 9, 0]], tokens=[10, 10])
    np.testing.assert_allclose(shares, [[0.8, 0.2, 0], [0.1, 0.9, 0]])
    assert specialization.domain_specialization(shares=shares) == pytest.approx((0.8 + 0.9) / 2)
    variation = specialization.domain_variation(shares=shares)
    expected = [np.std([0.8, 0.1], ddof=1) / 0.45, np.std([0.2, 0.9], ddof=1) / 0.55]
    assert variation[:2] == pytest.approx(expected)
    assert np.isnan(variation[2])  # never used


def test_the_published_code_drops_the_domains_that_an_expert_does_not_serve() -> None:
    shares = np.array([[0.5, 0.3], [0.25, 0.0], [0.0, 0.3], [0.0, 0.3]])
    ours = specialization.domain_variation(shares=shares)
    assert ours == pytest.approx(np.std(shares, axis=0, ddof=1) / shares.mean(axis=0))
    published = specialization.domain_variation(shares=shares, least=1e-5)
    assert published == pytest.approx([np.std([0.5, 0.25], ddof=1) / 0.375, 0.0])
    alone = specialization.domain_variation(shares=[[0.5], [0.0]], least=1e-5)
    assert np.isnan(alone).all()  # one domain is left
    assert specialization.domain_variation(shares=[[0.5], [0.0]]) == pytest.approx(np.sqrt(2))  # the largest of two


def test_vocabulary_by_hand() -> None:
    token_ids = np.array([5, 5, 5, 5, 9, 9, -1, 3])
    ids = np.array([[0, 1], [0, 2], [0, 1], [1, 2], [2, 0], [1, 0], [2, 1], [-1, -1]], np.int16)
    index = TokenIndex.of(token_ids)
    counts = specialization.vocabulary_counts(ids=ids, index=index, num_experts=3)
    assert counts.token_ids.tolist() == [3, 5, 9]
    assert counts.occurrences.tolist() == [1, 4, 2]
    assert counts.expert.tolist() == [-1, 0, 0]  # id 5: experts 0 and 1 three times each, the smaller one counts
    assert counts.largest.tolist() == [0, 3, 2]
    assert specialization.vocabulary_specialization(counts=counts) == pytest.approx((0 + 3 / 4 + 1) / 3)
    assert specialization.vocabulary_specialization(counts=counts, min_occurrences=3) == pytest.approx(3 / 4)
    assert np.isnan(specialization.vocabulary_specialization(counts=counts, min_occurrences=5))
    first = specialization.vocabulary_counts(ids=ids[:, :1], index=index, num_experts=3)
    owned = specialization.first_choice_vocabulary(counts=first, num_experts=3, min_occurrences=2)
    assert owned[:2] == pytest.approx([3 / 4, 1 / 2])  # id 5 is expert 0's, id 9 is expert 1's by the tie
    assert np.isnan(owned[2])


@pytest.mark.parametrize("seed", range(3))
def test_vocabulary_equals_counting(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((700, EXPERTS)), axis=1)[:, :TOP_K].astype(np.int16)
    ids[rng.random(ids.shape) < 0.1] = -1
    token_ids, kept = rng.integers(-1, 25, 700), rng.random(700) < 0.8
    counts = specialization.vocabulary_counts(ids=ids, index=TokenIndex.of(token_ids, kept=kept), num_experts=EXPERTS)
    for place, token in enumerate(counts.token_ids):
        mine = (token_ids == token) & kept
        table = [(ids[mine] == expert).any(axis=1).sum() for expert in range(EXPERTS)]
        assert counts.occurrences[place] == mine.sum()
        assert counts.largest[place] == max(table)
        assert counts.expert[place] == int(np.argmax(table))
    assert counts.occurrences.sum() == ((token_ids >= 0) & kept).sum()


def test_shuffled_ids_give_the_popularity_of_experts() -> None:
    """With many occurrences of every id, all that is left of shuffled ids is the busiest expert's share."""
    rng = np.random.default_rng(0)
    token_ids = rng.integers(0, 4, 40_000)
    ids = np.where(rng.random(40_000) < 0.6, 0, 1 + token_ids)[:, None].astype(np.int16)
    counts = specialization.vocabulary_counts(ids=ids, index=TokenIndex.of(rng.permutation(token_ids)), num_experts=5)
    assert specialization.vocabulary_specialization(counts=counts) == pytest.approx(0.6, abs=0.01)


def test_says_what_does_not_fit() -> None:
    index = TokenIndex.of(np.arange(5))
    with pytest.raises(MetricError, match="selections of 4"):
        specialization.vocabulary_counts(ids=np.zeros((4, 1), np.int16), index=index, num_experts=2)
    with pytest.raises(MetricError, match="selections hold id 7"):
        specialization.vocabulary_counts(ids=np.full((5, 1), 7, np.int16), index=index, num_experts=2)


def test_correlation_leaves_out_what_one_side_lacks() -> None:
    first, second = np.array([1, 2, 3, np.nan, 5.0]), np.array([2, 1, 4, 9, np.nan])
    assert specialization.correlation(first, second) == pytest.approx(np.corrcoef([1, 2, 3], [2, 1, 4])[0, 1])
    assert np.isnan(specialization.correlation([1, 2], [1, 2]))
    assert np.isnan(specialization.correlation([1, 1, 1], [1, 2, 3]))


def test_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = np.random.default_rng(0).normal(size=16)
    without = np.array([np.delete(values, one).mean() for one in range(16)])
    low, high = jackknife(estimate=np.asarray(values.mean()), without=without, confidence=0.95)
    assert (high - low) / 2 == pytest.approx(2.1314495 * values.std(ddof=1) / 4)  # t with 15 degrees of freedom
    assert (high + low) / 2 == pytest.approx(values.mean())


def write(
    directory: Path, *, domains: tuple[str, ...] = ("code", "prose"), text: bool = True, trace: bool = True,
    predicted: bool = False, sequences: int = 24,
) -> Path:  # fmt: skip
    """A run in which layer 1 routes by token id and layer 2 by domain, each in three of four tokens."""
    rng = np.random.default_rng(3)
    writer = RunWriter.create(directory, "special", RunInfo(model="m", num_layers=3, text_kept=text))
    token_ids = rng.integers(0, VOCABULARY, (sequences, LENGTH))
    owner = np.array([len(domains) - 1 - number % len(domains) for number in range(sequences)])
    wanted = {1: token_ids % EXPERTS, 2: np.repeat(owner[:, None] * 4, LENGTH, axis=1)}
    rows, load = [], []
    position = np.tile(np.arange(LENGTH), sequences)
    for layer in LAYERS:
        first = np.where(rng.random(token_ids.shape) < 0.75, wanted[layer], rng.integers(0, EXPERTS, token_ids.shape))
        ids = np.stack([first, (first + rng.integers(1, EXPERTS, first.shape)) % EXPERTS], axis=-1)
        rows.append(
            pack_trace(
                layer=layer, sequence=np.repeat(np.arange(sequences), LENGTH), position=position,
                ids=ids.reshape(-1, TOP_K), weights=np.full((sequences * LENGTH, TOP_K), 0.5, np.float32),
                num_experts=EXPERTS,
            )
        )  # fmt: skip
        for index, domain in enumerate(domains):
            counts = np.bincount(ids[owner == index].ravel(), minlength=EXPERTS)
            load.append(
                pl.DataFrame({"expert": np.arange(EXPERTS), "tokens": counts}).with_columns(
                    layer=pl.lit(layer), step=pl.lit(0), kind=pl.lit("routed"), domain=pl.lit(domain),
                    phase=pl.lit("prompt"),
                )
            )  # fmt: skip
    shard: dict[str, pl.DataFrame] = {
        "layer": pl.DataFrame([vars(LayerInfo(layer, 0, "m", "E", "R", EXPERTS, TOP_K, 0, 4)) for layer in LAYERS]),
        "expert_load": pl.concat(load),
    }
    if trace:
        shard["route_chunk"] = pl.concat(rows)
        shard["sequence"] = pl.DataFrame(
            {
                "sequence": range(sequences),
                "domain": [domains[index] for index in owner],
                "source": [""] * sequences,
                "tokens": [LENGTH] * sequences,
                "prompt_tokens": [LENGTH] * sequences,
            }
        )
    if text:
        shard["sequence_token"] = pl.DataFrame(
            {
                "sequence": range(sequences),
                "start": [0] * sequences,
                "token_ids": token_ids.tolist(),
                "special": np.zeros_like(token_ids, bool).tolist(),
                "predicted": (token_ids + 100).tolist() if predicted else [None] * sequences,
            },
            schema_overrides={"predicted": pl.List(pl.UInt32)},
        )
    writer.write_shard(shard)
    return writer.finish()


def rows_of(path: Path) -> list[dict[str, Any]]:
    with store.open_run(path) as run:
        rows = specialization_rows(Subject(run))
    return [
        {"control": "observed", "layer": None, "expert": None, "parameters": "{}", "at": None, **row} for row in rows
    ]


def pick(rows: list[dict[str, Any]], metric: str, **place: Any) -> dict[str, Any]:
    wanted = {"control": "observed", "layer": None, "expert": None, **place}
    (found,) = [
        row for row in rows if row["metric"] == metric and all(row[name] == value for name, value in wanted.items())
    ]
    return found


def test_planted_specialization_is_found_and_the_controls_lack_it(tmp_path: Path) -> None:
    rows = rows_of(write(tmp_path))
    by_domain = pick(rows, "domain_specialization", layer=2)
    assert by_domain["low"] < by_domain["value"] < by_domain["high"]
    # three of four tokens, an eighth of the rest, and what second choices give
    assert by_domain["value"] == pytest.approx(0.75 + 0.25 / 8 + (0.25 * 7 / 8) / 7, abs=0.05)
    assert pick(rows, "domain_specialization", layer=2, control="shuffled")["value"] < 0.6
    assert pick(rows, "domain_specialization", layer=2, control="uniform")["value"] == TOP_K / EXPERTS
    assert pick(rows, "domain_specialization", layer=1)["value"] < 0.35
    assert pick(rows, "domain_variation", layer=2)["value"] > 2 * pick(rows, "domain_variation", layer=1)["value"]
    owners = [pick(rows, "domain_variation", layer=2, expert=expert)["value"] for expert in range(EXPERTS)]
    assert set(np.argsort(owners)[-2:]) == {0, 4}  # the experts of the two domains

    text = {"parameters": json.dumps({"tokens": "input"})}
    by_token = pick(rows, "first_choice_vocabulary", layer=1, **text)
    assert by_token["low"] < by_token["value"] < by_token["high"]
    assert by_token["value"] == pytest.approx(0.75 + 0.25 / 8, abs=0.04)
    for control in ("shuffled", "shuffled_in_sequence"):
        assert pick(rows, "first_choice_vocabulary", layer=1, control=control, **text)["value"] < 0.35
    assert pick(rows, "first_choice_vocabulary", layer=2, **text)["value"] < 0.55
    following = {"parameters": json.dumps({"tokens": "next"})}
    assert pick(rows, "first_choice_vocabulary", layer=1, **following)["value"] < 0.35
    whole = [pick(rows, "vocabulary_specialization", layer=layer, at=10.0, **text)["value"] for layer in LAYERS]
    assert pick(rows, "vocabulary_specialization", at=10.0, **text)["value"] == pytest.approx(np.mean(whole))


def test_experts_of_domains_serve_segments(tmp_path: Path) -> None:
    rows = rows_of(write(tmp_path))
    found = pick(rows, "specialization_correlation", parameters=json.dumps({"of": "domain"}))
    band = pick(rows, "specialization_correlation", parameters=json.dumps({"of": "domain"}), control="renamed")
    assert found["at"] == 16.0
    assert found["value"] > max(0.9, band["high"])
    assert band["low"] < band["value"] < 0.5


def test_predicted_tokens_count_where_they_were_recorded(tmp_path: Path) -> None:
    rows = rows_of(write(tmp_path, predicted=True))
    given = {name: json.dumps({"tokens": name}) for name in ("input", "predicted")}
    values = [pick(rows, "first_choice_vocabulary", layer=1, parameters=text)["value"] for text in given.values()]
    assert values[0] == pytest.approx(values[1])  # planted: the predicted id is the token's own plus 100


def test_what_a_run_lacks_gives_no_rows(tmp_path: Path) -> None:
    metrics = lambda name, **options: {row["metric"] for row in rows_of(write(tmp_path / name, **options))}  # noqa: E731
    assert metrics("one", domains=("text",)) == {
        "vocabulary_specialization",
        "first_choice_vocabulary",
        "specialization_correlation",
    }
    assert metrics("without", text=False) == {
        "domain_specialization",
        "domain_variation",
        "specialization_correlation",
    }
    assert metrics("counts", text=False, trace=False) == {"domain_specialization", "domain_variation"}
    assert metrics("nothing", text=False, trace=False, domains=("text",)) == set()


def test_counts_alone_give_the_same_without_an_interval(tmp_path: Path) -> None:
    traced, counted = rows_of(write(tmp_path / "a")), rows_of(write(tmp_path / "b", text=False, trace=False))
    for metric in ("domain_specialization", "domain_variation"):
        row = pick(counted, metric, layer=2)
        assert row["value"] == pytest.approx(pick(traced, metric, layer=2)["value"])
        assert "low" not in row


def test_token_ids_stand_beside_the_selections(tmp_path: Path) -> None:
    with store.open_run(write(tmp_path, predicted=True)) as run:
        assert run.has_tokens and run.has_predictions
        whole, part = run.token_ids(), run.token_ids(first=3, last=5)
        texts = [run.sequence_text(number) for number in range(3, 6)]
        text = np.concatenate([one.token_ids for one in texts if one is not None])
        np.testing.assert_array_equal(part.ids, text)
        np.testing.assert_array_equal(part.ids, whole.ids[whole.offsets[3] : whole.offsets[6]])
        np.testing.assert_array_equal(part.predicted, part.ids + 100)
        np.testing.assert_array_equal(part.sequences, [3, 4, 5])
        ends = part.offsets[1:] - 1
        assert (part.following[ends] == -1).all()
        np.testing.assert_array_equal(np.delete(part.following, ends), np.delete(part.ids, part.offsets[:-1]))
    with store.open_run(write(tmp_path / "without", text=False)) as run:
        assert not run.has_tokens and not run.has_predictions
        assert set(run.token_ids().ids.tolist()) == {-1}


def test_texts_that_an_import_does_not_know_are_no_tokens(tmp_path: Path) -> None:
    words = pl.DataFrame({"token_id": [0, 1], "bytes": [b"", b"a"]})
    tokens = pl.DataFrame({"sequence": [0], "start": [0], "token_ids": [[0, 1, 0]], "special": [[False] * 3]})
    text = pl.DataFrame({"sequence": [0], "domain": ["d"], "source": [""], "tokens": [3], "prompt_tokens": [3]})
    for origin, expected in (("import npz", [-1, 1, -1]), ("collect", [0, 1, 0])):
        writer = RunWriter.create(tmp_path, origin.replace(" ", "-"), RunInfo(model="m", origin=origin))
        writer.write_shard({"vocabulary": words, "sequence_token": tokens, "sequence": text})
        with store.open_run(writer.finish()) as run:
            assert run.token_ids().ids.tolist() == expected
