"""The whole evaluation: its figures are those of its parts, its document is plain JSON, and what it refuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import store
from moescope.errors import CorpusError, InputError, ModelError, RunError
from profiler import evaluate as perplexities
from profiler.corpus import TokenBatch
from profiler.evaluation import Evaluation, divergence, document, evaluate
from profiler.evaluation.harness import run_harness
from profiler.evaluation.report import verdict
from profiler.evaluation.size import size_of
from profiler.evaluation.speed import summarize as summarize_speed
from profiler.evaluation.tokenizers import require_same_tokenizer
from tests.profiler.capture.tiny import build, tokenizer
from tests.profiler.evaluation.test_distribution import damaged
from tests.profiler.test_evaluate import batches


def long_batches() -> Iterator[TokenBatch]:
    return batches(3, length=48)


def text_of(model: Any) -> Iterator[TokenBatch]:
    """Text that a model finds likely: each token is its likeliest one."""
    batch = next(batches(1, length=20))
    batch.attention_mask[:] = 1
    for place in range(1, 20):
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(batch.input_ids[:, :place])).logits
        batch.input_ids[:, place] = logits[:, -1].argmax(-1).numpy()
    yield batch


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    base = build("olmoe")
    return damaged(base, strength=0.3), base


@pytest.fixture(scope="module")
def found(pair: tuple[Any, Any]) -> Evaluation:
    return evaluate(*pair, long_batches, tokenizer=tokenizer(), skip=["speed"], new_tokens=6)


def test_its_figures_are_those_of_its_parts(pair: tuple[Any, Any], found: Evaluation) -> None:
    model, base = pair
    expected = divergence(model, base, long_batches())
    assert found.divergence.kl == pytest.approx(expected.kl, rel=1e-6)
    assert found.divergence.per_domain["code"].high == pytest.approx(expected.per_domain["code"].high, rel=1e-6)
    after, before = (perplexities.perplexity(one, long_batches()) for one in pair)
    assert found.perplexity.value == pytest.approx(after.value, rel=1e-5)
    assert found.base_perplexity.per_domain["prose"].value == pytest.approx(before.per_domain["prose"].value, rel=1e-5)
    assert found.generation is not None and found.generation.prompts == 9
    assert found.routing is not None and len(found.routing.layers) == len(model.model.layers)


def test_the_document_is_plain_json(found: Evaluation) -> None:
    data = {"corpus_sha256": "0"}
    written = document(found, model={"name": "small"}, base={"name": "large"}, data=data, plan="abc")
    read = json.loads(store.evaluation_text(written))
    assert read == json.loads(json.dumps(written))
    assert read["plan"] == "abc" and read["held_out"] is True and read["speed"] is None
    assert read["divergence"]["kl"]["value"] == found.divergence.kl
    assert read["perplexity"]["ratio"]["value"] == found.divergence.ratio.value
    assert [one["name"] for one in read["probes"]] == [one.name for one in found.probes]
    assert {row["layer"] for row in read["routing"]["layers"]} == {key[0] for key in found.routing.layers}  # type: ignore[union-attr]
    assert read["generation"]["measures"]["entropy"]["model"]["value"] > 0
    assert read["verdict"] == verdict(found)


def test_what_is_skipped_is_null(pair: tuple[Any, Any]) -> None:
    bare = evaluate(*pair, long_batches, skip=["routing", "generation", "probes", "speed"])
    written = document(bare, model={}, base={}, data={})
    assert written["routing"] is written["generation"] is written["speed"] is written["lm_eval"] is None
    assert written["probes"] == [] and written["divergence"]["kl"]["value"] > 0
    store.evaluation_text(written)


def test_the_verdict(pair: tuple[Any, Any], found: Evaluation) -> None:
    sentence = verdict(found)
    assert sentence.startswith("Perplexity shows no clear change (x") and "but the predictions have moved" in sentence
    assert "nats per token" in sentence and "most is lost in " in sentence
    better = evaluate(pair[1], pair[0], lambda: text_of(pair[1]), skip=["generation", "probes", "speed"])
    assert better.divergence.ratio.high < 1 and verdict(better).startswith("Perplexity has fallen (x")
    worse = evaluate(*pair, lambda: text_of(pair[1]), skip=["generation", "probes", "speed"])
    assert verdict(worse).startswith("Perplexity has risen (x")
    assert verdict(found, held_out=False).startswith("Not on held-out text, so the damage is understated: ")
    same = evaluate(pair[1], pair[1], long_batches, skip=["generation", "probes", "speed"])
    assert verdict(same).startswith("No difference: both models predict the same on ")


def test_progress_is_told(pair: tuple[Any, Any]) -> None:
    told: list[tuple[str, float]] = []
    evaluate(*pair, long_batches, skip=["speed"], new_tokens=3, progress=lambda part, share: told.append((part, share)))
    parts = list(dict.fromkeys(part for part, _ in told))
    assert parts == ["divergence", "generation", "probes"]
    for part in parts:
        shares = [share for name, share in told if name == part]
        assert shares == sorted(shares) and shares[-1] == pytest.approx(1.0)


def test_a_text_without_long_sequences_generates_nothing(pair: tuple[Any, Any]) -> None:
    short = evaluate(*pair, lambda: batches(2), skip=["speed", "probes"])
    assert short.generation is None
    assert any("No prompt of 32 tokens in prose, code" in note for note in short.notes)


def test_what_is_refused(pair: tuple[Any, Any]) -> None:
    model, base = pair
    with pytest.raises(InputError, match="no part 'sizes' to skip; there are routing, generation"):
        evaluate(model, base, long_batches, skip=["sizes"])
    with pytest.raises(CorpusError, match="too short: 1 sequence, and intervals take 2"):
        evaluate(model, base, lambda: batches(1, rows=1))
    with pytest.raises(ModelError, match="predict 128 and 110 tokens"):
        evaluate(model, build("olmoe", vocab_size=110), long_batches)
    with pytest.raises(ModelError, match="has an encoder"):
        evaluate(build("switch_transformers"), base, long_batches)
    with pytest.raises(ModelError, match="no language-model head"):
        evaluate(build("qwen3_vl_moe_text"), base, long_batches)
    with pytest.raises(ModelError, match="positions of the model"):
        evaluate(model, base, lambda: batches(2, length=model.config.max_position_embeddings + 1))
    broken = damaged(model)
    broken.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(RunError, match="the model puts out NaN or infinity on 9 of 9 sequences"):
        evaluate(broken, base, long_batches)


def test_out_of_memory_is_one_line(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object, **options: object) -> None:
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(pair[0].model, "forward", fails)
    with pytest.raises(RunError, match="out of memory: use a smaller --batch-size"):
        evaluate(*pair, long_batches)


def test_tokenizers() -> None:
    require_same_tokenizer(tokenizer(), tokenizer())
    with pytest.raises(ModelError, match="differ in 1 tokens, such as"):
        require_same_tokenizer(tokenizer(80), tokenizer(81))
    other = tokenizer()
    other.backend_tokenizer.normalizer = __import__("tokenizers").normalizers.Lowercase()
    with pytest.raises(ModelError, match="cut the same text differently"):
        require_same_tokenizer(tokenizer(), other)


def test_sizes_by_hand(tmp_path: Any) -> None:
    model = build("olmoe")
    model.save_pretrained(tmp_path)
    found = size_of(model, tmp_path)
    config = model.config
    expert = 3 * config.hidden_size * config.intermediate_size
    layers = config.num_hidden_layers
    assert found.expert_parameters == layers * config.num_experts * expert
    assert found.experts_per_layer == [config.num_experts] * layers and found.experts == layers * config.num_experts
    idle = layers * (config.num_experts - config.num_experts_per_tok) * expert
    assert found.parameters - found.active_parameters == idle
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.memory_bytes >= 4 * found.parameters
    assert found.file_bytes == sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert size_of(model).file_bytes is None
    dense = size_of(torch.nn.Linear(3, 4))
    assert dense.parameters == dense.active_parameters == 16 and dense.experts == 0


def test_speeds_from_seconds() -> None:
    found = summarize_speed({"model": [1.0, 2.0, 4.0], "base": [2.0, 4.0, 8.0]}, 100)
    assert (found.model.value, found.model.low, found.model.high) == (50.0, 25.0, 100.0)
    assert (found.ratio.value, found.ratio.low, found.ratio.high) == (2.0, 2.0, 2.0)
    assert found.rounds == 3 and found.tokens == 100


def test_speed_is_a_part(pair: tuple[Any, Any]) -> None:
    from profiler.evaluation.speed import measure_speed

    prompts = next(long_batches()).input_ids[:, :16]
    found = measure_speed(*pair, prompts, rounds=2, decode_tokens=4)
    assert set(found) == {"prompt", "decode"}
    assert found["prompt"].tokens == prompts.size and found["decode"].tokens == 4 * len(prompts)
    assert found["decode"].model.low <= found["decode"].model.value <= found["decode"].model.high


class _Harness:
    """A stand-in for lm_eval that remembers what it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[dict[str, Any]] = []
        package, models, huggingface = (ModuleType(name) for name in _NAMES)
        package.simple_evaluate = self._evaluate  # type: ignore[attr-defined]
        package.__version__ = "0.4.9"  # type: ignore[attr-defined]
        huggingface.HFLM = lambda **options: SimpleNamespace(**options)  # type: ignore[attr-defined]
        for name, module in zip(_NAMES, (package, models, huggingface), strict=True):
            monkeypatch.setitem(sys.modules, name, module)

    def _evaluate(self, **options: Any) -> dict[str, Any]:
        self.asked.append(options)
        if "nonsense" in options["tasks"]:
            raise KeyError("nonsense")
        accuracy = 0.25 * len(self.asked)
        values = {"alias": "arc", "acc,none": accuracy, "acc_stderr,none": "N/A", "other": float("nan")}
        return {"results": {"arc": values}, "versions": {"arc": 1.0}}


_NAMES = ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface")


def test_tasks_go_to_the_harness(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    harness, words = _Harness(monkeypatch), tokenizer()
    skip = ["routing", "generation", "probes", "speed"]
    found = evaluate(*pair, long_batches, tokenizer=words, skip=skip, tasks=["arc"], task_limit=5)
    assert found.harness == {
        "version": "0.4.9",
        "tasks": {"arc": 1.0},
        "limit": 5,
        "results": {"base": {"arc": {"acc,none": 0.25}}, "model": {"arc": {"acc,none": 0.5}}},
    }
    assert [one["model"].pretrained for one in harness.asked] == [pair[1], pair[0]]
    assert all(one["tasks"] == ["arc"] and one["limit"] == 5 for one in harness.asked)
    assert harness.asked[0]["model"].tokenizer is words
    store.evaluation_text(document(found, model={}, base={}, data={}))
    with pytest.raises(InputError, match="lm-eval cannot run nonsense"):
        run_harness({"model": pair[0]}, ["nonsense"], tokenizer=words)


def test_without_the_harness(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match="pip install lm-eval"):
        evaluate(*pair, long_batches, tasks=["arc"])
