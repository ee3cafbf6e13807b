"""Level ``predictions`` against the arg-max of the model's own logits, over families, padding, caches and parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from numpy.testing import assert_array_equal
from torch import nn

import profiler
import profiler.collect as collect_module
import store
from moescope.errors import InputError, ModelError
from profiler.corpus import Corpus, open_corpus
from profiler.generation import Sampling
from profiler.recorders import predictions
from profiler.stream.levels import require_levels
from tests.profiler.capture.tiny import FAST, batch, build, tokenizer

LEVEL = "routing,predictions"
FAMILIES = (*FAST, "gemma4_text", "granitemoe", "qwen3_next")
"""Beside the usual ones: soft caps, logits divided by a constant, and linear attention."""


def watch(model: Any, folder: Path, *batches: dict[str, Any], **options: Any) -> store.Run:
    with torch.no_grad(), profiler.watch(
        model, store=folder, name="tiny", level=LEVEL, tokenizer=tokenizer(), **options
    ):  # fmt: skip
        for inputs in batches:
            model(**inputs)
    return store.open_run(folder / "tiny.duckdb")


def corpus(folder: Path, **options: Any) -> Corpus:
    (folder / "text.txt").write_text("It was a bright cold day in April.\n\n" * 40)
    settings = {"sequence_length": 64, "batch_size": 4, "token_budget": 600, **options}
    return open_corpus([folder / "text.txt"], tokenizer=tokenizer(), **settings)


def collect(model: Any, folder: Path, **options: Any) -> store.Run:
    path = collect_module.collect(
        model, corpus=corpus(folder), store=folder, name="tiny", tokenizer=tokenizer(), headline=False,
        **{"level": LEVEL, **options},
    )  # fmt: skip
    return store.open_run(path)


def proof(run: store.Run) -> dict[str, Any]:
    (row,) = run.table("check").filter(name="predictions").to_dicts()
    return row


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding", ["right", "left"])
def test_predictions_are_those_of_the_logits(family: str, padding: str, tmp_path: Path) -> None:
    model, inputs = build(family), batch(padding=padding)
    with torch.no_grad():
        expected = model(**inputs).logits.argmax(-1)
    with watch(model, tmp_path, inputs) as run:
        found = run.token_ids()
        for row, mask in enumerate(inputs["attention_mask"]):
            mine = slice(found.offsets[row], found.offsets[row + 1])
            assert_array_equal(found.predicted[mine], expected[row][mask == 1].numpy())
        assert run.has_predictions and proof(run)["status"] == "skipped"


def test_parts_of_the_logits_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = build("olmoe"), batch()
    with watch(model, tmp_path / "whole", inputs) as whole:
        monkeypatch.setattr(predictions, "MAX_VALUES", 5 * model.config.vocab_size)
        sizes: list[int] = []
        model.lm_head.register_forward_hook(lambda module, args, output: sizes.append(output.numel()))
        with watch(model, tmp_path / "parts", inputs) as parts:
            assert_array_equal(parts.token_ids().predicted, whole.token_ids().predicted)
            tokens = parts.info.tokens
    asked = sizes[:-1]  # the last call is the model's own
    assert max(asked) == 5 * model.config.vocab_size
    assert sum(asked) == tokens * model.config.vocab_size


def test_predicted_tokens_are_described(tmp_path: Path) -> None:
    with watch(build("olmoe"), tmp_path, batch()) as run:
        predicted = np.unique(run.token_ids().predicted).tolist()
        assert set(predicted) <= set(run.table("vocabulary")["token_id"])
        assert run.table("sequence_token")["predicted"].dtype == pl.List(pl.UInt32)


def test_collect_holds_them_against_the_logits(tmp_path: Path) -> None:
    model = build("qwen3_moe")
    with collect(model, tmp_path) as run:
        assert run.badge.status == "valid", run.badge.reason
        assert (proof(run)["status"], proof(run)["value"]) == ("pass", 0.0)
        text, found = run.sequence_text(1), run.token_ids(first=1, last=1)
        assert text is not None
        with torch.no_grad():
            logits = model(torch.from_numpy(text.token_ids)[None]).logits
        assert_array_equal(found.predicted, logits[0].argmax(-1).numpy())
        assert (run.token_ids().predicted >= 0).all()


def test_a_head_that_is_not_all_of_it_is_found_out(tmp_path: Path) -> None:
    model = build("olmoe")
    forward = model.forward

    def changed(*args: Any, **options: Any) -> Any:
        output = forward(*args, **options)
        output.logits = output.logits.flip(-1)  # a model that does more to its logits than the head
        return output

    model.forward = changed
    with collect(model, tmp_path) as run:
        assert proof(run)["status"] == "fail"
        assert run.badge.status == "invalid"


def test_answers_have_predictions_at_every_position(tmp_path: Path) -> None:
    model = build("olmoe")
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    with collect(model, tmp_path, generate=4, sampling=Sampling()) as run:
        found = run.token_ids()
        prompts = run.table("sequence").sort("sequence")["prompt_tokens"].to_numpy()
        assert (found.predicted >= 0).all()
        assert proof(run)["status"] == "skipped"
        for start, end, prompt in zip(found.offsets[:-1], found.offsets[1:], prompts, strict=True):
            # The likeliest token is what was said next.
            answered = slice(start + int(prompt) - 1, end - 1)
            assert_array_equal(found.predicted[answered], found.ids[start + int(prompt) : end])


def test_a_forward_that_fails_leaves_nothing(tmp_path: Path) -> None:
    model, inputs = build("olmoe"), batch()
    with profiler.watch(model, store=tmp_path, name="tiny", level=LEVEL, tokenizer=tokenizer()), torch.no_grad():
        layer = model.model.layers[-1]
        handle = layer.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("full")))
        with pytest.raises(RuntimeError, match="full"):
            model(**inputs)
        handle.remove()
        model(**batch(seed=2))
    with store.open_run(tmp_path / "tiny.duckdb") as run, torch.no_grad():
        expected = model(**batch(seed=2)).logits.argmax(-1)[0]
        assert_array_equal(run.token_ids(first=0, last=0).predicted, expected.numpy())


def test_other_levels_keep_none(tmp_path: Path) -> None:
    with collect(build("olmoe"), tmp_path, level="routing") as run:
        assert not run.has_predictions
        assert (run.token_ids().predicted == -1).all()
        assert run.table("check").filter(name="predictions").is_empty()


def test_what_cannot_be_is_refused_early(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="leave out --no-text"):
        collect(build("olmoe"), tmp_path, keep_text=False)
    headless = build("olmoe")
    headless.get_output_embeddings = lambda: None
    with pytest.raises(ModelError, match="has no language-model head"):
        collect(headless, tmp_path)
    with pytest.raises(InputError, match="layer-stream: the language-model head"):
        require_levels(LEVEL)
    assert not list(tmp_path.glob("*.duckdb"))


def test_likeliest_takes_the_first_of_equals() -> None:
    head = nn.Linear(2, 3, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]]))
        found = predictions.likeliest(head, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert found.tolist() == [0, 2]
    assert found.dtype == torch.int32
